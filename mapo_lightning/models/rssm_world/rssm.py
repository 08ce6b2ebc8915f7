"""Recurrent state-space model: a GRU as lower (video) and as upper (control) dynamics.

This is the readable specification, in plain autograd. `fused` has the same recurrence with a
backward written by hand; ``world_model.recurrence`` chooses between them.

Shapes: B batch, T time, D deter, S groups, K classes, U hidden, A action, E embed, I imagined.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mapo_lightning.models.distributions import one_hot_sample
from mapo_lightning.models.rssm_world.dynamics import Dynamics, FeaturePolicy, HasFeat
from mapo_lightning.models.rssm_world.settings import RSSMConfig

NORM_EPS = 1e-3


class RSSMState(NamedTuple):
    """What the model believes; leading axes are (B,) or (B, T)."""

    feat: Tensor  # (..., S*K + D) flat feature that decoder and heads read: sample, then deter
    logits: Tensor  # (..., S, K) what the sample was drawn from, before `RSSM.mixed`

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

    def map(self, change: Callable[[Tensor], Tensor]) -> RSSMState:
        """The state with ``change`` made to each of its tensors."""
        return RSSMState(*map(change, self))

    def at(self, t: int) -> RSSMState:
        """State at one time: (B, T, ...) -> (B, ...)."""
        return self.map(lambda x: x[:, t])

    def until(self, end: int) -> RSSMState:
        """States before time ``end``: (B, T, ...) -> (B, end, ...)."""
        return self.map(lambda x: x[:, :end])

    def flatten(self) -> RSSMState:
        """Merge the two leading axes: (B, T, ...) -> (B*T, ...)."""
        return self.map(lambda x: x.flatten(0, 1))

    def repeat(self, times: int) -> RSSMState:
        """Every row ``times`` times: (B, ...) -> (B*times, ...)."""
        return self.map(lambda x: x.repeat_interleave(times, dim=0))

    def detach(self) -> RSSMState:
        """The same values without their graph."""
        return self.map(Tensor.detach)


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
        gates_BG = self.linear(torch.cat([x_BU, deter_BD.to(x_BU.dtype)], dim=-1)).float()
        offset_G = update_bias(self.norm.bias)
        normed_BG = F.layer_norm(
            gates_BG, gates_BG.shape[-1:], self.norm.weight, offset_G, self.norm.eps
        )
        reset, candidate, update = normed_BG.chunk(3, dim=-1)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        return torch.lerp(deter_BD, candidate, torch.sigmoid(update))


def update_bias(beta_G: Tensor) -> Tensor:
    """The norm's offset with -1 for the update gate, so that a fresh cell remembers; (3D,)."""
    third = beta_G.shape[0] // 3
    return torch.cat([beta_G[: 2 * third], beta_G[2 * third :] - 1.0])


class RSSM(Dynamics[RSSMState]):
    """Latent dynamics with a recurrent state.

    What does not depend on the recurrence is computed outside it: the products with actions and
    embeddings for all steps at once, and the prior from all states.

    Args:
        cfg: Sizes.
        action_dim: Width A of the actions it is given; at most ``cfg.action_slot`` if that is set.
        embed_dim: Width E of what the posterior sees.
        unimix: Share of the uniform distribution in all categoricals.

    Source:
        facts 2.2; eq. (2) and (3) of the MAPO paper.
    """

    def __init__(
        self, cfg: RSSMConfig, action_dim: int, embed_dim: int, unimix: float = 0.0
    ) -> None:
        super().__init__(cfg, action_dim, unimix, cfg.hidden)
        self.cell = NormedGRU(cfg.hidden, cfg.deter)
        self.prior, self.posterior = self._head(cfg.deter), self._head(cfg.deter + embed_dim)

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
        """As `Dynamics.observe`; the state before the first step is zero without ``start``."""
        batch, steps = is_first_BT.shape
        state = start or self.initial(batch, embed_BTE)
        if noise_BTS is None:
            noise_BTS = torch.rand(batch, steps, self.cfg.stoch, device=embed_BTE.device)
        keep_BT1 = (~is_first_BT).float()[..., None]
        driven_BTU = self.drive(action_BTA * keep_BT1)
        seen_BTU, deter_weight = self._see(embed_BTE)
        states: list[RSSMState] = []
        for t in range(steps):
            stoch_BX = state.stoch.flatten(-2) * keep_BT1[:, t]
            deter_BD = self._recur(driven_BTU[:, t], stoch_BX, state.deter * keep_BT1[:, t])
            hidden_BU = F.elu(seen_BTU[:, t] + F.linear(deter_BD, deter_weight))
            logits_BSK = self._grouped(self.posterior[2](hidden_BU).float())
            sample_BSK = one_hot_sample(self.mixed(logits_BSK), noise_BTS[:, t])
            state = RSSMState.of(deter_BD, sample_BSK, logits_BSK)
            states.append(state)
        post = RSSMState(*(torch.stack(parts, dim=1) for parts in zip(*states, strict=True)))
        return post, self._grouped(self.prior(post.deter))

    def imagine(
        self,
        start: HasFeat,
        policy: FeaturePolicy,
        steps: int,
        encode: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """As `Dynamics.imagine`; features are all that it reads of ``start``."""
        start_BF = start.feat
        shape = len(start_BF), self.cfg.stoch, self.cfg.classes
        noise_IBS = torch.rand((steps, *shape[:2]), device=start_BF.device)
        state = RSSMState(start_BF, start_BF.new_zeros(shape))
        feats = [start_BF]
        for noise_BS in noise_IBS:
            action_BA = policy(state.feat)
            driven = action_BA if encode is None else encode(action_BA)
            state = self.imagine_step(state, driven, noise_BS)
            feats.append(state.feat)
        return torch.stack(feats)

    def imagine_step(self, prev: RSSMState, action_BA: Tensor, noise_BS: Tensor) -> RSSMState:
        """Predict one step: p(s_t | s_{t-1}, a_{t-1})."""
        deter_BD = self._recur(self.drive(action_BA), prev.stoch.flatten(-2), prev.deter)
        logits_BSK = self._grouped(self.prior(deter_BD).float())
        sample_BSK = one_hot_sample(self.mixed(logits_BSK), noise_BS)
        return RSSMState.of(deter_BD, sample_BSK, logits_BSK)

    def dream_on(self, prev: RSSMState, action_BA: Tensor, noise_BS: Tensor) -> RSSMState:
        """As `Dynamics.dream_on`: a state holds all that there is."""
        return self.imagine_step(prev, action_BA, noise_BS)

    def _recur(self, driven_BU: Tensor, stoch_BX: Tensor, deter_BD: Tensor) -> Tensor:
        """Next recurrent state (B, D), from the action's part of the input layer and the state."""
        weight = self.inp.weight[:, : self.cfg.stoch * self.cfg.classes]
        x_BU = F.elu(driven_BU + F.linear(stoch_BX, weight))
        next_BD: Tensor = self.cell(x_BU, deter_BD)
        return next_BD

    def _see(self, embed_BTE: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior's first layer: its part for what was seen, (B, T, U), and its state weights."""
        first = self.posterior[0]
        assert isinstance(first, nn.Linear)
        deter_weight, seen_weight = first.weight.split_with_sizes(
            [self.cfg.deter, embed_BTE.shape[-1]], dim=1
        )
        return F.linear(embed_BTE, seen_weight, first.bias), deter_weight
