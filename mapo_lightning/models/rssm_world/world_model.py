"""The stacked world model: five published systems are five ways to fill its plugs.

Shapes: B batch, T time, H W image, E embed, F feat, A action, N = B*T, I imagined steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from mapo_lightning.models.blocks import evaluation_mode
from mapo_lightning.models.interfaces import Belief, Dream, DreamPolicy, Driver, Fit, Policy
from mapo_lightning.models.objective import check_scales, weigh
from mapo_lightning.models.rssm_world.action_source import (
    Driven,
    InverseAction,
    SemanticAction,
    build_action_source,
)
from mapo_lightning.models.rssm_world.belief import DreamtBelief, Followed, RSSMBelief
from mapo_lightning.models.rssm_world.context import NO_CONTEXT, Context, FrameContext
from mapo_lightning.models.rssm_world.decoder import build_decoder
from mapo_lightning.models.rssm_world.dreaming import Foretold, Parts, RSSMDreaming
from mapo_lightning.models.rssm_world.dynamics import Dynamics, HasFeat, LatentState
from mapo_lightning.models.rssm_world.encoder import build_encoder, normalised
from mapo_lightning.models.rssm_world.ensemble import Ensemble
from mapo_lightning.models.rssm_world.fused.policy import remembered
from mapo_lightning.models.rssm_world.fused.rssm import FusedRSSM
from mapo_lightning.models.rssm_world.heads import Heads
from mapo_lightning.models.rssm_world.intrinsic import VideoBonus
from mapo_lightning.models.rssm_world.rssm import RSSM
from mapo_lightning.models.rssm_world.settings import RSSMConfig, WorldModelConfig
from mapo_lightning.models.rssm_world.transformer import TransformerDynamics
from mapo_lightning.models.settings import ObjectiveConfig
from mapo_lightning.types import Batch, ConfigError

RECURRENCE: dict[str, type[RSSM]] = {"plain": RSSM, "fused": FusedRSSM}


class RSSMWorldModel(nn.Module):
    """Encoder, context, lower and upper dynamics, decoder, heads.

    Args:
        cfg: Plugs and sizes.
        objective: Loss weights of the stage.
        semantic_dim: Width V of the semantic vectors in the batch.
        action_dim: Width A of the environment's action; None builds the pre-training model, without
            upper dynamics and heads.

    Raises:
        ConfigError: A method without lower dynamics is asked to pre-train.
    """

    def __init__(
        self,
        cfg: WorldModelConfig,
        objective: ObjectiveConfig,
        semantic_dim: int,
        action_dim: int | None,
    ) -> None:
        super().__init__()
        controls = action_dim is not None
        if not controls and cfg.lower is None:
            raise ConfigError(
                "this method has no lower dynamics, so there is nothing to pre-train on videos; "
                "use stage=finetune, or choose another method"
            )
        self.cfg, self.objective = cfg, objective
        self.action_dim = action_dim
        self.encoder = build_encoder(cfg.image)
        self.context = None
        if cfg.context.kind != "none":
            self.context = FrameContext(cfg.context, cfg.image, augment=controls)
        embed = self.encoder.embed_dim
        self.source = None
        self.lower: Dynamics[Any] | None = None
        self.upper: Dynamics[Any] | None = None
        feat, seen = 0, embed
        if cfg.lower is not None:
            env_dim = action_dim if cfg.upper is None else None
            self.source = build_action_source(
                cfg.source, cfg.image, cfg.lower.hidden, semantic_dim, env_dim
            )
            self.lower = _dynamics(cfg, cfg.lower, self.source.action_dim, embed)
            feat = cfg.lower.feat
            seen = feat + embed * cfg.concat_embed
        if action_dim is not None and cfg.upper is not None:
            self.upper = _dynamics(cfg, cfg.upper, action_dim, seen)
            feat = cfg.upper.feat
        self.feat_dim = feat
        self.decoder = build_decoder(cfg.image, feat, cfg.context)
        self.heads = _heads(cfg, feat, controls)
        # PreLAR's bonus compares embeddings, that of the stacked systems lower states.
        compared = cfg.lower.feat if cfg.lower is not None and self.upper is not None else embed
        self.bonus = VideoBonus(cfg.bonus, compared) if controls and cfg.bonus.beta else None
        self.ensemble = _ensemble(cfg, action_dim)
        self._check_scales()
        parts = (self.encoder, self.source, self.lower, self.upper)
        seeing = [m for part in parts if part is not None for m in part.modules()]
        self._moded = [m for m in seeing if isinstance(m, nn.BatchNorm2d | nn.Dropout)]
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _check_scales(self) -> None:
        """Hold the names of the loss terms against those of their weights."""
        names = {"image", *self.heads, *(f"kl_{n}" for n in ("lower", "upper") if getattr(self, n))}
        for part in (self.source, self.context):
            names |= set(part.terms if part is not None else ())
        check_scales(names, self.objective.scales)

    def observe(self, batch: Batch, start: Belief | None = None) -> RSSMBelief:
        """Posterior states after each frame, axes (B, T).

        ``batch`` needs ``action`` only for dynamics that it drives; ``start`` is the belief before
        the first frame, axes (B,).
        """
        return self.follow(batch, start).belief

    def follow(self, batch: Batch, start: Belief | None = None) -> Followed:
        """As `observe`, with everything that the loss reads.

        Raises:
            TypeError: ``start`` is not a belief of this model.
        """
        if start is not None and not isinstance(start, RSSMBelief):
            raise TypeError(f"start must be an RSSMBelief, got {type(start).__name__}")
        obs, first_BT = batch["obs"], batch["is_first"]
        embed_BTE = self.encoder(normalised(obs)).view(*obs.shape[:2], -1)
        lower, upper = None, None
        prior: dict[str, tuple[LatentState, Tensor]] = {}
        driven: Driven | None = None
        seen_BTE = embed_BTE
        if self.lower is not None and self.source is not None:
            driven = self.source(batch)
            before = start.lower if start else None
            lower, logits = self.lower.observe(driven.action, embed_BTE, first_BT, before)
            prior["lower"] = lower, logits
            seen_BTE = lower.feat
            if self.cfg.concat_embed:
                seen_BTE = torch.cat([embed_BTE, seen_BTE], dim=-1)
        if self.upper is not None:
            before = start.upper if start else None
            upper, logits = self.upper.observe(batch["action"], seen_BTE, first_BT, before)
            prior["upper"] = upper, logits
        return Followed(RSSMBelief(lower, upper), embed_BTE, prior, driven)

    def loss(self, batch: Batch) -> Fit:
        """Eq. (2) in pre-training, eq. (3) in fine-tuning, plus the terms of the method's plugs."""
        seen = self.follow(batch)
        terms: dict[str, Tensor] = {}
        log: dict[str, Tensor] = {}
        if self.source is not None and self.lower is not None and seen.driven is not None:
            terms |= self.source.losses(seen.driven, self.lower, *seen.prior["lower"])
            log |= seen.driven.log
        for name, (post, prior_BTSK) in seen.prior.items():
            dynamics = self.lower if name == "lower" else self.upper
            assert dynamics is not None
            terms[f"kl_{name}"] = dynamics.kl(post.logits, prior_BTSK, self.objective.free_nats)
        feat_BTF = seen.belief.feat
        context = self._look(batch["obs"], batch.get("episode"))
        terms |= context.terms
        mean_NCHW = self.decoder(feat_BTF.flatten(0, 1), context.maps).float()
        error_NCHW = mean_NCHW - normalised(batch["obs"])
        # -ln p(o_t | s_t, e_i): unit-variance Gaussian without its constant, summed over pixels.
        terms["image"] = 0.5 * error_NCHW.pow(2).sum(dim=(1, 2, 3)).mean()
        if self.heads:
            bonus_BT = self._bonus(seen, batch.get("episode"))
            if bonus_BT is not None:
                log["bonus"] = bonus_BT.mean()
                bonus_BT = self.cfg.bonus.beta * bonus_BT
            terms |= self.heads.terms(batch, feat_BTF, bonus_BT)
        total, weighed = weigh(terms, self.objective.weights)
        if self.ensemble is not None:
            # Without a weight: no other parameter sees it, and Adam would divide it out.
            control, dynamics = seen.belief.control, self._dreaming
            drawn_from = dynamics.mixed(control.logits)
            error = self.ensemble.loss(control.feat, drawn_from, batch["action"], batch["is_first"])
            total, log = total + error, log | {"ensemble": error.detach()}
        return Fit(total, log | weighed, seen.belief)

    @torch.no_grad()
    def imagine(self, start: Belief, policy: Policy, steps: int) -> Dream:
        """Dream with the control dynamics; no frames and no phrases are needed there (O8)."""
        actions: list[Tensor] = []
        number = count()

        def act(feat_NF: Tensor) -> Tensor:
            actions.append(policy(next(number), DreamtBelief(feat_NF)))
            return actions[-1]

        feat_INF = self._dreaming.imagine(_left(start), act, steps, self._encoder_of_actions)
        return self._dream(feat_INF, actions)._replace(action=torch.stack(actions))

    def imagine_with_gradients(self, start: Belief, policy: DreamPolicy, steps: int) -> Dream:
        """As `imagine`, differentiable in the policy's actions."""
        actions: list[Tensor] = []
        if self.ensemble is not None:
            policy = remembered(policy, actions)
        feat_INF = self._dreaming.imagine(_left(start), policy, steps, self._encoder_of_actions)
        return self._dream(feat_INF, actions)

    def _dream(self, feat_INF: Tensor, actions: Sequence[Tensor]) -> Dream:
        reward_IN = self.heads.read("reward", feat_INF)
        if "discount" in self.heads:
            discount_IN = self.heads.read("discount", feat_INF).sigmoid()
        else:
            discount_IN = torch.ones_like(reward_IN)
        dream = Dream(feat_INF, reward_IN, discount_IN)
        if self.ensemble is None:
            return dream
        unknown_IN = self.ensemble.disagreement(feat_INF[:-1].detach(), torch.stack([*actions]))
        start_1N = torch.zeros_like(unknown_IN[:1])
        return dream._replace(uncertainty=torch.cat([start_1N, unknown_IN]))

    @property
    def _dreaming(self) -> Dynamics[Any]:
        """The control dynamics."""
        dynamics = self.upper or self.lower
        assert dynamics is not None
        return dynamics

    @property
    def _encoder_of_actions(self) -> Callable[[Tensor], Tensor] | None:
        """What an action passes before it drives the control dynamics, if anything."""
        source = self.source
        if self.upper is not None or source is None:
            return None
        return lambda action: source({"action": action}).action

    def _look(self, obs: Tensor, episode_BT: Tensor | None = None) -> Context:
        """The scene's context, of frames (B, T, H, W, 3), or of each episode in them."""
        found: Context = NO_CONTEXT if self.context is None else self.context(obs, episode_BT)
        return found

    def _bonus(self, seen: Followed, episode_BT: Tensor | None) -> Tensor | None:
        """Intrinsic bonus of the first steps, (B, T - window + 1); None without one."""
        if self.bonus is None:
            return None
        lower = seen.belief.lower
        assert lower is not None
        compared = lower.feat if self.upper is not None else seen.embed
        bonus_BT: Tensor = self.bonus(compared.detach(), episode_BT)
        return bonus_BT

    @torch.no_grad()
    def open_loop(self, batch: Batch, seen: int) -> Tensor:
        """Watch the first ``seen`` frames, then dream the rest from the actions alone.

        In evaluation mode, whatever mode the model is in.

        Args:
            batch: Sequences of T > ``seen`` frames.
            seen: Number of frames that are shown.

        Returns:
            Frames (B, T, H, W, 3) in [0, 1]; the scene's context comes from what was shown.
        """
        with evaluation_mode(list(self.modules())):
            return self._open_loop(batch, seen)

    def _open_loop(self, batch: Batch, seen: int) -> Tensor:
        shown = {key: value[:, :seen] for key, value in batch.items()}
        belief = self.observe(shown)
        if self.upper is not None or self.source is None:
            drive_BTA = batch["action"]
        else:
            drive_BTA = self.source(batch).action
        actions = iter(drive_BTA[:, seen:].unbind(1))
        ahead = batch["obs"].shape[1] - seen
        dreamt_IBF = self._dreaming.imagine(
            belief.at(seen - 1).control, lambda _: next(actions), ahead
        )[1:]
        feat_BTF = torch.cat([belief.feat, dreamt_IBF.transpose(0, 1)], dim=1)
        return self.draw(feat_BTF, shown["obs"])

    @torch.no_grad()
    def draw(self, feat: Tensor, shown: Tensor) -> Tensor:
        """Frames (B, T, H, W, 3) in [0, 1] of features (B, T, F), as `Draughtsman` says.

        The scene's context comes from the frames that were ``shown``, (B, S, H, W, 3) uint8.
        """
        frame_NHWC = self._draw(feat.flatten(0, 1), self._look(shown))
        return frame_NHWC.reshape(*feat.shape[:2], *shown.shape[2:])

    def _draw(self, feat_NF: Tensor, context: Context) -> Tensor:
        """Pictures (N, H, W, 3) in [0, 1]."""
        mean_NCHW: Tensor = self.decoder(feat_NF, context.maps).float()
        return (mean_NCHW + 0.5).clamp(0.0, 1.0).permute(0, 2, 3, 1)

    @property
    def driver(self) -> Driver:
        """What leads its dreams: after fine-tuning the robot, before it what `source` takes."""
        if self.action_dim is not None:
            return "action"
        if isinstance(self.source, SemanticAction):
            return "phrase"
        return "latent" if isinstance(self.source, InverseAction) else "nothing"

    @property
    def drive_dim(self) -> int:
        """Width of the actions, or inferred actions, that lead its dreams; 0: none do."""
        if self.action_dim is not None:
            return self.action_dim
        return self.source.action_dim if isinstance(self.source, InverseAction) else 0

    @torch.no_grad()
    def dreaming(self, start: Belief, shown: Tensor) -> RSSMDreaming:
        """Begin a dream that goes on step by step; see `models.interfaces.Stepwise`.

        Raises:
            TypeError: ``start`` is not a belief of this model.
        """
        if not isinstance(start, RSSMBelief):
            raise TypeError(f"start must be an RSSMBelief, got {type(start).__name__}")
        modules = list(self.modules())
        with evaluation_mode(modules):
            context = self._look(shown)

        def draw(feat_NF: Tensor) -> Tensor:
            # The residual decoder draws which tokens it asks: a dream goes on as if unseen.
            devices = [feat_NF.device] if feat_NF.is_cuda else []
            with evaluation_mode(modules), torch.random.fork_rng(devices):
                return self._draw(feat_NF, context)

        parts = Parts(self._dreaming, self._led, self._foretold, draw)
        return RSSMDreaming.begin(parts, start.control)

    def _led(self, drive: Batch, rows: int) -> Tensor:
        """What leads a dream one step on -> actions (N, A) of the control dynamics."""
        if self.upper is not None or self.source is None or self.driver == "latent":
            return drive["action"]
        one = {key: value[:, None] for key, value in drive.items()}
        like = next(self.parameters())
        one["is_first"] = torch.zeros(rows, 1, dtype=torch.bool, device=like.device)
        found: Tensor = self.source(one).action[:, 0]
        return found

    def _foretold(
        self, before: LatentState | None, state: LatentState, action_NA: Tensor | None
    ) -> Foretold:
        reward_N = self.heads.read("reward", state.feat) if "reward" in self.heads else None
        if self.ensemble is None:
            return Foretold(reward_N, None)
        if before is None or action_NA is None:
            return Foretold(reward_N, state.feat.new_zeros(len(state.feat)))
        return Foretold(reward_N, self.ensemble.disagreement(before.feat, action_NA))

    def parts(self) -> Mapping[str, nn.Module]:
        """Every part that this method has: encoder, context, source, lower, upper, decoder ..."""
        return {name: part for name, part in self.named_children() if part is not None}

    def groups(self) -> Mapping[str, list[nn.Parameter]]:
        """``lower``: encoder, context and lower dynamics. ``model``: everything else.

        Without lower dynamics there is one group for both, as in DreamerV2 (facts 7.1). An
        ``ensemble`` is a group of its own, whose gradients have no part in the norms of others.
        """
        early = {"encoder", "context", "source", "lower"} if self.lower is not None else set()
        if self.upper is None:
            early -= {"source"}  # PreLAR's action encoder is fresh in fine-tuning (facts 2.5)
        found: dict[str, list[nn.Parameter]] = {"lower": [], "model": []}
        for name, parameter in self.named_parameters():
            part = name.split(".")[0]
            group = "lower" if part in early else "ensemble" if part == "ensemble" else "model"
            found.setdefault(group, []).append(parameter)
        return found

    def evaluating(self) -> AbstractContextManager[None]:
        """Evaluation mode for what `observe` uses: batch norms and dropout, all that differs."""
        return evaluation_mode(self._moded)


def _dynamics(
    cfg: WorldModelConfig, sizes: RSSMConfig, action_dim: int, seen: int
) -> Dynamics[Any]:
    """Lower or upper dynamics, driven by ``action_dim`` numbers, that sees ``seen``."""
    kind: type[RSSM | TransformerDynamics] = RECURRENCE[cfg.recurrence]
    if sizes.kind == "transformer":
        kind = TransformerDynamics
    return kind(sizes, action_dim, seen, cfg.unimix)


def _left(start: Belief) -> HasFeat:
    """The state that a dream leaves from, or all that is known of it."""
    return start.control if isinstance(start, RSSMBelief) else start


def _heads(cfg: WorldModelConfig, feat: int, controls: bool) -> Heads:
    """The heads that the configuration wants; none in pre-training."""
    wanted = {"reward": True, "aux_reward": cfg.aux_reward, "discount": cfg.discount_head}
    named = [name for name, want in wanted.items() if want and controls]
    return Heads(named, feat, cfg.head_units, cfg.head_layers, cfg.head_style, cfg.rewards)


def _ensemble(cfg: WorldModelConfig, action_dim: int | None) -> Ensemble | None:
    """Predictors of the control state, if the configuration wants them; none in pre-training."""
    dynamics = cfg.upper or cfg.lower
    if action_dim is None or dynamics is None or not cfg.ensemble.members:
        return None
    return Ensemble(cfg.ensemble, dynamics, action_dim)
