"""Recurrent state-space model: one class for the lower (video) and the upper (control) dynamics.

Shapes: B batch, T time, D deter, S groups, K classes, U hidden, A action, E embed, I imagined.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mapo_lightning.models.blocks import xavier
from mapo_lightning.models.distributions import balanced_kl, one_hot_sample
from mapo_lightning.models.rssm_world.fused.backward import Weights
from mapo_lightning.models.rssm_world.fused.scan import NORM_EPS, Unrolled, gru, remembering
from mapo_lightning.models.rssm_world.settings import RSSMConfig
from mapo_lightning.types import ConfigError


class RSSMState(NamedTuple):
    """What the model believes; leading axes are (B,) or (B, T)."""

    feat: Tensor  # (..., S*K + D) flat feature that decoder and heads read: sample, then deter
    logits: Tensor  # (..., S, K) what the sample was drawn from

    @classmethod
    def of(cls, deter: Tensor, stoch: Tensor, logits: Tensor) -> RSSMState:
        """From its parts: (..., D), one-hot (..., S, K), and logits (..., S, K)."""
        return cls(torch.cat([stoch.flatten(-2), deter], dim=-1), logits)

    @property
    def stoch(self) -> Tensor:
        """One-hot sample of the present, straight-through, (..., S, K)."""
        groups = self.logits.shape[-2:]
        flat = self.feat[..., : groups.numel()]
        return flat.view(*flat.shape[:-1], *groups)

    @property
    def deter(self) -> Tensor:
        """Summary of the past, (..., D)."""
        return self.feat[..., self.logits.shape[-2:].numel() :]

    def flatten(self) -> RSSMState:
        """Merge the two leading axes: (B, T, ...) -> (B*T, ...)."""
        return RSSMState(*(x.flatten(0, 1) for x in self))


class NormedGRU(nn.Module):
    """GRU cell with one layer norm over all gates; gate order reset, candidate, update.

    Source: facts 2.2.
    """

    def __init__(self, inputs: int, deter: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs + deter, 3 * deter)
        self.norm = nn.LayerNorm(3 * deter, eps=NORM_EPS)

    def forward(self, x_BU: Tensor, deter_BD: Tensor) -> Tensor:
        """Next state (B, D) from the input (B, U) and the last one."""
        entry = torch.cat([x_BU, deter_BD.to(x_BU.dtype)], dim=-1)
        gates_BG = self.linear(entry).float()
        return gru(gates_BG, deter_BD, (self.norm.weight, remembering(self.norm.bias)))[0]


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
        logits = like.new_zeros(batch, self.cfg.stoch, self.cfg.classes, dtype=torch.float32)
        return RSSMState(logits.new_zeros(batch, self.cfg.feat), logits)

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
        driven_BTU = self._drive(action_BTA * keep_BT1)
        seen_BTU = F.linear(embed_BTE, seen_weight, correct.bias)
        weights = self._weights(deter_weight, self.posterior)
        sequence = self._unrolled(weights, state.feat, steps, 1, keep_BT1)
        with torch.no_grad():
            noise = noise_BTS.transpose(0, 1).contiguous().unbind()
            for given in zip(driven_BTU.unbind(1), seen_BTU.unbind(1), noise, strict=True):
                sequence.step(*given)
        feat, logits = sequence.attached(driven_BTU, seen_BTU, state.feat)
        assert logits is not None
        post = RSSMState(feat, self._grouped(logits))
        return post, self._grouped(self.prior(post.deter))

    def imagine_step(self, prev: RSSMState, action_BA: Tensor, noise_BS: Tensor) -> RSSMState:
        """Predict one step with autograd: p(s_t | s_{t-1}, a_{t-1})."""
        inp_weight, _ = self._input_weights()
        x_BU = F.elu(self._drive(action_BA) + F.linear(prev.stoch.flatten(-2), inp_weight))
        deter_BD = self.cell(x_BU, prev.deter)
        logits_BSK = self._grouped(self.prior(deter_BD))
        return RSSMState.of(deter_BD, one_hot_sample(logits_BSK, noise_BS), logits_BSK)

    def imagine(
        self,
        start_BF: Tensor,
        action_of: Callable[[int, Tensor], Tensor],
        steps: int,
        replay: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Roll the prior out.

        Args:
            start_BF: Features of the states to leave from, (B, F).
            action_of: Action (B, A) to take in the state that step i starts from, given its
                features; asked without autograd.
            steps: Number I of steps.
            replay: The actions that ``action_of`` gave, (I, B, A), in a graph: gradients of the
                features reach them, and no other input. None: no gradients at all.

        Returns:
            Features (I + 1, B, F), the start first.
        """
        first = self.prior[0]
        assert isinstance(first, nn.Linear)
        noise_IBS = torch.rand((steps, len(start_BF), self.cfg.stoch), device=start_BF.device)
        with torch.no_grad():
            weights = self._weights(first.weight, self.prior)
            bias = first.bias.to(weights.gates.dtype)
            dream = self._unrolled(weights, start_BF, steps, 0)
            for i in range(steps):
                driven_BU = self._drive(action_of(i, dream.states[i]))
                dream.step(driven_BU, bias, noise_IBS[i])
        if replay is None:
            return dream.states
        return dream.attached(self._drive(replay()), bias, start_BF)[0]

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

    def _weights(self, deter_weight: Tensor, head: nn.Sequential) -> Weights:
        """What a step multiplies with, in the dtype of the products, to be cast once a sequence.

        ``head`` is prior or posterior, ``deter_weight`` its first layer's part for the state.
        """
        kind = deter_weight.device.type
        given = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if given else deter_weight.dtype
        linear, norm, last = self.cell.linear, self.cell.norm, head[2]
        assert isinstance(last, nn.Linear)
        entry, deter = linear.weight.split_with_sizes([self.cfg.hidden, self.cfg.deter], dim=1)
        return Weights(
            self._input_weights()[0].to(dtype),
            torch.cat([deter, entry], dim=1).to(dtype),
            linear.bias.to(dtype),
            norm.weight,
            remembering(norm.bias),
            deter_weight.to(dtype),
            last.weight.to(dtype),
            last.bias.to(dtype),
        )

    def _unrolled(
        self, weights: Weights, start_BF: Tensor, steps: int, axis: int, keep: Tensor | None = None
    ) -> Unrolled:
        return Unrolled(
            weights, (self.cfg.stoch, self.cfg.classes), start_BF.detach(), steps, axis, keep
        )

    def _grouped(self, flat: Tensor) -> Tensor:
        """(..., S*K) -> (..., S, K)."""
        return flat.view(*flat.shape[:-1], self.cfg.stoch, self.cfg.classes)
