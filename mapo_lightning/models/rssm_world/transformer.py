"""Latent dynamics with a transformer in the GRU's place: one categorical state per frame.

Shapes: B batch, T time, S groups, K classes, D deter, X width of a token, P tokens before, J
layers, A action, E embed, I imagined, N rows of a dream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mapo_lightning.models.blocks import evaluation_mode, xavier
from mapo_lightning.models.distributions import one_hot_sample
from mapo_lightning.models.rssm_world.attention import Attention, Memory, Recall
from mapo_lightning.models.rssm_world.dynamics import Dynamics, FeaturePolicy, HasFeat
from mapo_lightning.models.rssm_world.rssm import RSSMState
from mapo_lightning.models.rssm_world.settings import RSSMConfig


class TransformerState(NamedTuple):
    """What the model believes, and what it can look back at; leading axes are (B,) or (B, T)."""

    now: RSSMState
    memory: Memory

    @property
    def feat(self) -> Tensor:
        """Flat feature that decoder and heads read: sample, then deter, (..., S*K + D)."""
        return self.now.feat

    @property
    def logits(self) -> Tensor:
        """What the sample was drawn from, before `Dynamics.mixed`, (..., S, K)."""
        return self.now.logits

    @property
    def stoch(self) -> Tensor:
        """One-hot sample of the present, straight-through, (..., S, K)."""
        return self.now.stoch

    @property
    def deter(self) -> Tensor:
        """What attention made of the past, (..., D)."""
        return self.now.deter

    def at(self, t: int) -> TransformerState:
        """State at one time: axes (B, T) -> (B,)."""
        return TransformerState(self.now.at(t), self.memory.at(t))

    def until(self, end: int) -> TransformerState:
        """States before time ``end``: axes (B, T) -> (B, end)."""
        return TransformerState(self.now.until(end), self.memory.until(end))

    def flatten(self) -> TransformerState:
        """Merge batch and time: axes (B, T) -> (B*T,)."""
        return TransformerState(self.now.flatten(), self.memory.flatten())

    def repeat(self, times: int) -> TransformerState:
        """Every row ``times`` times: axes (B,) -> (B*times,)."""
        return TransformerState(self.now.repeat(times), self.memory.repeat(times))

    def detach(self) -> TransformerState:
        """The same values without their graph."""
        return TransformerState(self.now.detach(), self.memory.detach())


class TransformerDynamics(Dynamics[TransformerState]):
    """Latent dynamics that looks back at the steps of the episode instead of summing them up.

    The token of step t mixes the sample of step t - 1 with the action that led to t. What causal
    attention over the tokens so far makes of it takes the place of the recurrent state: the prior
    of step t and all readers of features see it. Feature, KL and actions are those of the GRU.

    Deviation: frame-posterior. The posterior sees what was observed at its step and no summary of
    the past, as in STORM and TWISTER and unlike an RSSM: otherwise no step could be computed before
    the one before it. So a sequence takes one pass.

    Only `observe` has dropout, and only in training: dreams are what the model knows best.

    Args:
        cfg: Sizes.
        action_dim: Width A of the actions it is given; at most ``cfg.action_slot`` if that is set.
        embed_dim: Width E of what the posterior sees.
        unimix: Share of the uniform distribution in all categoricals.

    Source:
        STORM, arXiv:2310.09615; TWISTER, arXiv:2503.04416, without its contrastive loss.
    """

    def __init__(
        self, cfg: RSSMConfig, action_dim: int, embed_dim: int, unimix: float = 0.0
    ) -> None:
        sizes = cfg.transformer
        super().__init__(cfg, action_dim, unimix, sizes.width)
        self.mix = nn.Sequential(
            nn.LayerNorm(sizes.width), nn.ELU(), xavier(nn.Linear(sizes.width, sizes.width))
        )
        self.attention = Attention(sizes)
        self.out = xavier(nn.Linear(sizes.width, cfg.deter))
        self.prior, self.posterior = self._head(cfg.deter), self._head(embed_dim)
        self.dropouts = [m for m in self.attention.modules() if isinstance(m, nn.Dropout)]

    def initial(self, batch: int, like: Tensor) -> TransformerState:
        """All-zero state of ``batch`` sequences without a past, on the device of ``like``."""
        logits = like.new_zeros(batch, self.cfg.stoch, self.cfg.classes, dtype=torch.float32)
        sizes = self.cfg.transformer
        tokens = logits.new_zeros(batch, 0, sizes.layers, 2, sizes.width)
        none = torch.zeros(batch, dtype=torch.long, device=like.device)
        now = RSSMState(logits.new_zeros(batch, self.cfg.feat), logits)
        return TransformerState(now, Memory(tokens, none, none))

    def observe(
        self,
        action_BTA: Tensor,
        embed_BTE: Tensor,
        is_first_BT: Tensor,
        start: TransformerState | None = None,
        noise_BTS: Tensor | None = None,
    ) -> tuple[TransformerState, Tensor]:
        """As `Dynamics.observe`: all posteriors, then one causal pass."""
        batch, steps = is_first_BT.shape
        state = start or self.initial(batch, embed_BTE)
        if noise_BTS is None:
            noise_BTS = torch.rand(batch, steps, self.cfg.stoch, device=embed_BTE.device)
        keep_BT1 = (~is_first_BT).float()[..., None]
        logits_BTSK = self._grouped(exact(self.posterior(embed_BTE)))
        sample_BTSK = one_hot_sample(self.mixed(logits_BTSK), noise_BTS)
        before_BTSK = torch.cat([state.stoch[:, None], sample_BTSK[:, :-1]], dim=1)
        x_BTX = self._token(action_BTA * keep_BT1, before_BTSK.flatten(-2) * keep_BT1)
        # One token fewer than the window: the present one has its place in it.
        past_BPJ2X, begin_B = state.memory.last(self.cfg.transformer.window - 1)
        place_T = past_BPJ2X.shape[1] + torch.arange(steps, device=is_first_BT.device)
        first_BT = torch.where(is_first_BT, place_T, begin_B[:, None])
        begin_BT = first_BT.cummax(dim=1).values
        hidden_BTX, fresh_BTJ2X = self.attention(x_BTX, past_BPJ2X, begin_BT)
        now = RSSMState.of(exact(self.out(hidden_BTX)), sample_BTSK, logits_BTSK)
        tokens = torch.cat([past_BPJ2X, fresh_BTJ2X], dim=1)
        # Not expanded: a checkpoint holds the belief of acting, and tensors there own their memory.
        memory = Memory(tokens, begin_BT, (place_T + 1).repeat(batch, 1))
        return TransformerState(now, memory), self._grouped(self.prior(now.deter))

    def imagine(
        self,
        start: HasFeat,
        policy: FeaturePolicy,
        steps: int,
        encode: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """As `Dynamics.imagine`.

        Raises:
            TypeError: ``start`` is no state of this model, so there is nothing to look back at.
        """
        if not isinstance(start, TransformerState):
            raise TypeError(
                "a transformer dreams on from a TransformerState, which holds what it looks back "
                f"at, got {type(start).__name__}: start from what observe returned"
            )
        rows = len(start.feat)
        noise_INS = torch.rand((steps, rows, self.cfg.stoch), device=start.feat.device)
        recall, state = Recall(self.attention, start.memory, steps), start.now
        feats = [state.feat]
        for noise_NS in noise_INS:
            action_NA = policy(state.feat)
            driven = action_NA if encode is None else encode(action_NA)
            state = self._step(recall, state, driven, noise_NS)
            feats.append(state.feat)
        return torch.stack(feats)

    def imagine_step(
        self, prev: TransformerState, action_BA: Tensor, noise_BS: Tensor
    ) -> RSSMState:
        """As `Dynamics.imagine_step`; what it returns cannot be dreamt on from, see `imagine`."""
        return self._step(Recall(self.attention, prev.memory, 1), prev.now, action_BA, noise_BS)

    def _step(
        self, recall: Recall, prev: RSSMState, action_NA: Tensor, noise_NS: Tensor
    ) -> RSSMState:
        with evaluation_mode(self.dropouts):
            hidden_NX = recall.step(self._token(action_NA, prev.stoch.flatten(-2)))
        return self._sampled(hidden_NX, noise_NS)

    def dream_on(
        self, prev: TransformerState, action_BA: Tensor, noise_BS: Tensor
    ) -> TransformerState:
        """As `Dynamics.dream_on`; the memory keeps the newest tokens, as many as are looked at."""
        past_BPJ2X, begin_B = prev.memory.last(self.cfg.transformer.window - 1)
        x_BX = self._token(action_BA, prev.stoch.flatten(-2))
        with evaluation_mode(self.dropouts):
            hidden_BTX, fresh_BTJ2X = self.attention(x_BX[:, None], past_BPJ2X, begin_B[:, None])
        tokens = torch.cat([past_BPJ2X, fresh_BTJ2X], dim=1)
        memory = Memory(tokens, begin_B, torch.full_like(begin_B, tokens.shape[1]))
        return TransformerState(self._sampled(hidden_BTX[:, 0], noise_BS), memory)

    def _sampled(self, hidden_NX: Tensor, noise_NS: Tensor) -> RSSMState:
        """State that attention's result (N, X) foretells."""
        deter_ND = exact(self.out(hidden_NX))
        logits_NSK = self._grouped(exact(self.prior(deter_ND)))
        sample_NSK = one_hot_sample(self.mixed(logits_NSK), noise_NS)
        return RSSMState.of(deter_ND, sample_NSK, logits_NSK)

    def _token(self, action: Tensor, stoch: Tensor) -> Tensor:
        """What attention gets of a step: the action to it (..., A), the sample before, (..., X)."""
        driven = self.drive(action)
        weight = self.inp.weight[:, : self.cfg.stoch * self.cfg.classes]
        return exact(self.mix(driven + F.linear(stoch.to(driven.dtype), weight)))


def exact(x: Tensor) -> Tensor:
    """In float32 at least: what autocast made smaller becomes float32 again."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
