"""Recurrent state-space model: one class for the lower (video) and the upper (control) dynamics.

Shapes: B batch, T time, D deter, S groups, K classes, U hidden, A action, E embed, I imagined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mapo_lightning.models.blocks import xavier
from mapo_lightning.models.distributions import balanced_kl, one_hot_sample
from mapo_lightning.types import ConfigError


@dataclass
class RSSMConfig:
    """Sizes of one recurrent state-space model, and how its KL term is shaped (facts 2.1, 2.3)."""

    deter: int = 1024
    """Width D of the recurrent state: 1024, or DreamerV2's own 200 (O19, O38)."""
    hidden: int = 1024
    """Width U of the hidden layers."""
    stoch: int = 32
    """Number S of categorical variables in the stochastic state."""
    classes: int = 32
    """Number K of classes of each variable."""
    action_slot: int = 0
    """Width of the action input; shorter actions are padded with zeros. 0: the action's own."""
    kl_balance: float = 0.8
    """Share of the KL gradient that moves the prior towards the posterior, in [0, 1] (O20)."""

    def __post_init__(self) -> None:
        for name in ("deter", "hidden", "stoch", "classes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 <= self.kl_balance <= 1.0:
            raise ConfigError(f"kl_balance must lie in [0, 1], got {self.kl_balance}")

    @property
    def feat(self) -> int:
        """Width F of the flat feature."""
        return self.deter + self.stoch * self.classes


class RSSMState(NamedTuple):
    """What the model believes; leading axes are (B,) or (B, T)."""

    deter: Tensor  # (..., D) summary of the past
    stoch: Tensor  # (..., S, K) one-hot sample of the present, straight-through
    logits: Tensor  # (..., S, K) what `stoch` was drawn from

    @property
    def feat(self) -> Tensor:
        """Flat feature (..., S*K + D) that decoder and heads read: stochastic part first."""
        return torch.cat([self.stoch.flatten(-2), self.deter], dim=-1)

    def detach(self) -> RSSMState:
        """The same values without their history."""
        return RSSMState(*(x.detach() for x in self))

    def flatten(self) -> RSSMState:
        """Merge the two leading axes: (B, T, ...) -> (B*T, ...)."""
        return RSSMState(*(x.flatten(0, 1) for x in self))


class NormedGRU(nn.Module):
    """GRU cell with one layer norm over all gates; gate order reset, candidate, update.

    The update gate's bias of -1 makes a fresh cell remember. Source: facts 2.2.
    """

    def __init__(self, inputs: int, deter: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs + deter, 3 * deter)
        self.norm = nn.LayerNorm(3 * deter, eps=1e-3)

    def forward(self, x_BU: Tensor, deter_BD: Tensor) -> Tensor:
        """Next state (B, D) from the input (B, U) and the last one."""
        gates = self.norm(self.linear(torch.cat([x_BU, deter_BD.to(x_BU.dtype)], dim=-1)))
        reset_BD, candidate_BD, update_BD = gates.float().chunk(3, dim=-1)
        candidate_BD = torch.tanh(torch.sigmoid(reset_BD) * candidate_BD)
        return torch.lerp(deter_BD, candidate_BD, torch.sigmoid(update_BD - 1.0))


class RSSM(nn.Module):
    """Latent dynamics that any action vector can drive: real, semantic, inferred or null.

    ``observe`` hoists everything out of the recurrence that does not depend on it: the products
    with actions and embeddings are taken for all steps at once, and the prior comes afterwards.

    Args:
        cfg: Sizes.
        action_dim: Width A of the actions it is given; at most ``cfg.action_slot`` if that is set.
        embed_dim: Width E of what the posterior sees.

    Source:
        facts 2.2; eq. (2) and (3) of the MAPO paper.
    """

    def __init__(self, cfg: RSSMConfig, action_dim: int, embed_dim: int) -> None:
        super().__init__()
        if cfg.action_slot and action_dim > cfg.action_slot:
            raise ConfigError(
                f"the action has {action_dim} numbers but action_slot leaves room for "
                f"{cfg.action_slot}; raise it or set it to 0"
            )
        self.cfg, self.action_slot = cfg, cfg.action_slot or action_dim
        flat = cfg.stoch * cfg.classes
        self.inp = xavier(nn.Linear(flat + self.action_slot, cfg.hidden))
        self.cell = NormedGRU(cfg.hidden, cfg.deter)
        self.prior = nn.Sequential(
            xavier(nn.Linear(cfg.deter, cfg.hidden)),
            nn.ELU(),
            xavier(nn.Linear(cfg.hidden, flat)),
        )
        self.posterior = nn.Sequential(
            xavier(nn.Linear(cfg.deter + embed_dim, cfg.hidden)),
            nn.ELU(),
            xavier(nn.Linear(cfg.hidden, flat)),
        )

    def initial(self, batch: int, like: Tensor) -> RSSMState:
        """All-zero state of ``batch`` sequences on the device of ``like``."""
        stoch = like.new_zeros(batch, self.cfg.stoch, self.cfg.classes, dtype=torch.float32)
        deter = like.new_zeros(batch, self.cfg.deter, dtype=torch.float32)
        return RSSMState(deter, stoch, stoch)

    def observe(
        self,
        action_BTA: Tensor,
        embed_BTE: Tensor,
        is_first_BT: Tensor,
        start: RSSMState | None = None,
        noise_BTS: Tensor | None = None,
    ) -> tuple[RSSMState, Tensor]:
        """Follow a sequence: predict, then correct with what was seen.

        Args:
            action_BTA: Action that led to each step, (B, T, A).
            embed_BTE: What was seen, (B, T, E).
            is_first_BT: True where state and action are forgotten, (B, T) bool.
            start: State before the first step; zeros if None.
            noise_BTS: Uniform noise that draws the samples; fresh if None.

        Returns:
            Posterior states with axes (B, T), and the prior's logits (B, T, S, K).
        """
        batch, steps = is_first_BT.shape
        state = start or self.initial(batch, embed_BTE)
        if noise_BTS is None:
            noise_BTS = torch.rand(batch, steps, self.cfg.stoch, device=embed_BTE.device)
        keep_BT1 = (~is_first_BT).float()[..., None]
        correct = self.posterior[0]
        assert isinstance(correct, nn.Linear)
        deter_weight, seen_weight = correct.weight.split_with_sizes(
            [self.cfg.deter, embed_BTE.shape[-1]], dim=1
        )
        hoisted = (
            self._drive(action_BTA * keep_BT1),
            F.linear(embed_BTE, seen_weight, correct.bias),
            keep_BT1,
            noise_BTS,
        )
        post = self._scan(state, hoisted, deter_weight)
        return post, self._grouped(self.prior(post.deter))

    def _scan(
        self, state: RSSMState, hoisted: tuple[Tensor, ...], deter_weight: Tensor
    ) -> RSSMState:
        """The recurrence itself, over (driven, seen, keep, noise), each (B, T, ...)."""
        inp_weight, _ = self._input_weights()
        deter_BD, stoch_BSK = state.deter, state.stoch
        deters, stochs, logits = [], [], []
        for driven_BU, seen_BU, keep_B1, noise_BS in zip(
            *(x.unbind(1) for x in hoisted), strict=True
        ):
            kept_BX = stoch_BSK.flatten(-2) * keep_B1
            x_BU = F.elu(driven_BU + F.linear(kept_BX, inp_weight))
            deter_BD = self.cell(x_BU, deter_BD * keep_B1)
            hidden_BU = F.elu(seen_BU + F.linear(deter_BD, deter_weight))
            logits_BSK = self._grouped(self.posterior[2](hidden_BU))
            stoch_BSK = one_hot_sample(logits_BSK, noise_BS)
            deters.append(deter_BD)
            stochs.append(stoch_BSK)
            logits.append(logits_BSK)
        return RSSMState(*(torch.stack(parts, 1) for parts in (deters, stochs, logits)))

    def imagine_step(self, prev: RSSMState, action_BA: Tensor, noise_BS: Tensor) -> RSSMState:
        """Predict one step: p(s_t | s_{t-1}, a_{t-1})."""
        inp_weight, _ = self._input_weights()
        x_BU = F.elu(self._drive(action_BA) + F.linear(prev.stoch.flatten(-2), inp_weight))
        deter_BD = self.cell(x_BU, prev.deter)
        logits_BSK = self._grouped(self.prior(deter_BD))
        return RSSMState(deter_BD, one_hot_sample(logits_BSK, noise_BS), logits_BSK)

    def imagine(
        self, start: RSSMState, action_of: Callable[[int, RSSMState], Tensor], steps: int
    ) -> list[RSSMState]:
        """Roll the prior out.

        Args:
            start: States to leave from, axes (B,).
            action_of: Action (B, A) to take in the state that step i starts from.
            steps: Number I of steps.

        Returns:
            ``steps`` states, the start not included.
        """
        shape = (steps, *start.stoch.shape[:-1])
        noise_IBS = torch.rand(shape, device=start.deter.device)
        states, state = [], start
        for i in range(steps):
            state = self.imagine_step(state, action_of(i, state), noise_IBS[i])
            states.append(state)
        return states

    def kl(self, post_BTSK: Tensor, prior_BTSK: Tensor, free_nats: float) -> Tensor:
        """Balanced KL of this model, scalar nats per step."""
        return balanced_kl(post_BTSK, prior_BTSK, self.cfg.kl_balance, free_nats)

    def _drive(self, action: Tensor) -> Tensor:
        """Part of the input layer that the action feeds, (..., A) -> (..., U)."""
        _, action_weight = self._input_weights()
        return F.linear(action, action_weight[:, : action.shape[-1]], self.inp.bias)

    def _input_weights(self) -> tuple[Tensor, Tensor]:
        """Input layer's weights for the stochastic state and for the action.

        Slicing the action's part to the action's width equals padding the action with zeros.
        """
        flat = self.cfg.stoch * self.cfg.classes
        return self.inp.weight[:, :flat], self.inp.weight[:, flat:]

    def _grouped(self, flat: Tensor) -> Tensor:
        """(..., S*K) -> (..., S, K)."""
        return flat.view(*flat.shape[:-1], self.cfg.stoch, self.cfg.classes)
