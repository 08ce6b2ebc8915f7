"""What the kinds of latent dynamics share: categorical states, their KL, how an action enters.

Shapes: B batch, T time, S groups, K classes, U width of what an action enters, A action, E embed,
I imagined, F feat.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeAlias, TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from mapo_lightning.models.blocks import xavier
from mapo_lightning.models.distributions import balanced_kl, mixed
from mapo_lightning.models.rssm_world.settings import RSSMConfig
from mapo_lightning.types import ConfigError

FeaturePolicy: TypeAlias = Callable[[Tensor], Tensor]
"""Features (B, F) of the present states -> action (B, A)."""

S = TypeVar("S", bound="LatentState")


class HasFeat(Protocol):
    """Anything with features (..., F): a state, or a belief."""

    @property
    def feat(self) -> Tensor:
        """The features."""
        ...


class LatentState(HasFeat, Protocol):
    """What one dynamics believes; leading axes are (B,) or (B, T)."""

    @property
    def logits(self) -> Tensor:
        """What the sample was drawn from, before `Dynamics.mixed`, (..., S, K)."""
        ...

    @property
    def stoch(self) -> Tensor:
        """One-hot sample of the present, straight-through, (..., S, K)."""
        ...

    @property
    def deter(self) -> Tensor:
        """Summary of the past, (..., D)."""
        ...

    def at(self: S, t: int) -> S:
        """State at one time: axes (B, T) -> (B,)."""
        ...

    def until(self: S, end: int) -> S:
        """States before time ``end``: axes (B, T) -> (B, end)."""
        ...

    def flatten(self: S) -> S:
        """Merge batch and time: axes (B, T) -> (B*T,)."""
        ...

    def repeat(self: S, times: int) -> S:
        """Every row ``times`` times, one after the other: axes (B,) -> (B*times,)."""
        ...

    def detach(self: S) -> S:
        """The same values without their graph."""
        ...


class Dynamics(nn.Module, Generic[S]):
    """Latent dynamics that any action vector can drive: real, semantic, inferred or null.

    Args:
        cfg: Sizes.
        action_dim: Width A of the actions it is given; at most ``cfg.action_slot`` if that is set.
        unimix: Share of the uniform distribution in all categoricals.
        width: Width U of what sample and action become before anything else happens to them.

    Raises:
        ConfigError: The action is wider than its slot.
    """

    def __init__(self, cfg: RSSMConfig, action_dim: int, unimix: float, width: int) -> None:
        super().__init__()
        if cfg.action_slot and action_dim > cfg.action_slot:
            raise ConfigError(
                f"the action has {action_dim} numbers but action_slot leaves room for "
                f"{cfg.action_slot}; raise it or set it to 0"
            )
        self.cfg, self.action_slot = cfg, cfg.action_slot or action_dim
        self.unimix = unimix
        self.inp = xavier(nn.Linear(cfg.stoch * cfg.classes + self.action_slot, width))

    def _head(self, inputs: int) -> nn.Sequential:
        """What says the logits of a stochastic state, (..., inputs) -> (..., S*K)."""
        cfg = self.cfg
        return nn.Sequential(
            xavier(nn.Linear(inputs, cfg.hidden)),
            nn.ELU(),
            xavier(nn.Linear(cfg.hidden, cfg.stoch * cfg.classes)),
        )

    def initial(self, batch: int, like: Tensor) -> S:
        """State of ``batch`` sequences that nothing is known of, on the device of ``like``."""
        raise NotImplementedError

    def observe(
        self,
        action_BTA: Tensor,
        embed_BTE: Tensor,
        is_first_BT: Tensor,
        start: S | None = None,
        noise_BTS: Tensor | None = None,
    ) -> tuple[S, Tensor]:
        """Follow a sequence: predict, then correct with what was seen.

        Args:
            action_BTA: Action that led to each step, (B, T, A).
            embed_BTE: What was seen, (B, T, E).
            is_first_BT: True where state and action are forgotten, (B, T) bool.
            start: State before the first step; that of `initial` if None.
            noise_BTS: Uniform noise that draws the samples; fresh if None.

        Returns:
            Posterior states with axes (B, T), and the prior's logits (B, T, S, K).
        """
        raise NotImplementedError

    def imagine(
        self,
        start: HasFeat,
        policy: FeaturePolicy,
        steps: int,
        encode: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Roll the prior out.

        Args:
            start: States to leave from, axes (B,).
            policy: Asked once a step, in order. Gradients of the result reach its actions.
            steps: Number I of steps.
            encode: What an action becomes before it drives the model, (..., A) -> (..., A');
                None: itself.

        Returns:
            Features (I + 1, B, F), the start first.
        """
        raise NotImplementedError

    def imagine_step(self, prev: S, action_BA: Tensor, noise_BS: Tensor) -> LatentState:
        """Predict one step: p(s_t | s_{t-1}, a_{t-1})."""
        raise NotImplementedError

    def dream_on(self, prev: S, action_BA: Tensor, noise_BS: Tensor) -> S:
        """As `imagine_step`; the next step can be dreamt from what it returns.

        Costs the same at every step, however long the dream is. For whole dreams `imagine` is
        cheaper.
        """
        raise NotImplementedError

    def kl(self, post_BTSK: Tensor, prior_BTSK: Tensor, free_nats: float) -> Tensor:
        """Balanced KL of this model, scalar nats per step."""
        post_BTSK, prior_BTSK = self.mixed(post_BTSK), self.mixed(prior_BTSK)
        return balanced_kl(post_BTSK, prior_BTSK, self.cfg.kl_balance, free_nats)

    def mixed(self, logits: Tensor) -> Tensor:
        """Logits of the distribution that is drawn from, (..., K)."""
        return mixed(logits, self.unimix)

    def drive(self, action: Tensor) -> Tensor:
        """Part of the input layer that the action feeds, (..., A) -> (..., U)."""
        weight = self.inp.weight[:, self.cfg.stoch * self.cfg.classes :]
        # Slicing to the action's width equals padding the action with zeros.
        return F.linear(action, weight[:, : action.shape[-1]], self.inp.bias)

    def _grouped(self, flat: Tensor) -> Tensor:
        """(..., S*K) -> (..., S, K)."""
        return flat.view(*flat.shape[:-1], self.cfg.stoch, self.cfg.classes)
