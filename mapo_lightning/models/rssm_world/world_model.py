"""The stacked world model: five published systems are five ways to fill its plugs.

Shapes: B batch, T time, H W image, E embed, F feat, A action, N = B*T, I imagined steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mapo_lightning.models.objective import check_scales, weigh
from mapo_lightning.models.rssm_world.action_source import Driven, build_action_source
from mapo_lightning.models.rssm_world.belief import Belief, Fit, Observed
from mapo_lightning.models.rssm_world.consistency import LatentAction, consistency
from mapo_lightning.models.rssm_world.context import NO_CONTEXT, FrameContext
from mapo_lightning.models.rssm_world.decoder import build_decoder
from mapo_lightning.models.rssm_world.encoder import build_encoder, normalised
from mapo_lightning.models.rssm_world.heads import Heads
from mapo_lightning.models.rssm_world.intrinsic import VideoBonus
from mapo_lightning.models.rssm_world.rssm import RSSM, RSSMState
from mapo_lightning.models.rssm_world.settings import (
    WorldModelConfig,
)
from mapo_lightning.models.settings import ObjectiveConfig
from mapo_lightning.types import Batch, ConfigError


class WorldModel(nn.Module):
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
        self.encoder = build_encoder(cfg.image)
        self.context = None
        if cfg.context.kind != "none":
            self.context = FrameContext(cfg.context, cfg.image, augment=controls)
        embed = self.encoder.embed_dim
        self.source, self.lower, self.upper = None, None, None
        feat, seen = 0, embed
        if cfg.lower is not None:
            env_dim = action_dim if cfg.upper is None else None
            self.source = build_action_source(
                cfg.source, cfg.image, cfg.lower.hidden, semantic_dim, env_dim
            )
            self.lower = RSSM(cfg.lower, self.source.action_dim, embed)
            feat = cfg.lower.feat
            seen = feat + embed * cfg.concat_embed
        if action_dim is not None and cfg.upper is not None:
            self.upper = RSSM(cfg.upper, action_dim, seen)
            feat = cfg.upper.feat
        self.feat_dim = feat
        self.decoder = build_decoder(cfg.image, feat, cfg.context)
        wanted = {"reward": True, "aux_reward": cfg.aux_reward, "discount": cfg.discount_head}
        named = [name for name, want in wanted.items() if want and controls]
        self.heads = Heads(named, feat, cfg.head_units, cfg.head_layers)
        # PreLAR's bonus compares embeddings, that of the stacked systems lower states.
        compared = cfg.lower.feat if cfg.lower is not None and self.upper is not None else embed
        self.bonus = VideoBonus(cfg.bonus, compared) if controls and cfg.bonus.beta else None
        names = {"image", *self.heads, *(f"kl_{n}" for n in ("lower", "upper") if getattr(self, n))}
        for part in (self.source, self.context):
            names |= set(part.terms if part is not None else ())
        check_scales(names, objective.scales)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def observe(self, batch: Batch, start: Belief | None = None) -> Observed:
        """Follow a sequence of frames with every dynamics in use.

        ``batch`` needs ``action`` only for an upper dynamics; ``start`` is the belief before the
        first frame, axes (B,).
        """
        obs, first_BT = batch["obs"], batch["is_first"]
        embed_BTE = self.encoder(normalised(obs)).view(*obs.shape[:2], -1)
        lower, upper = None, None
        prior: dict[str, tuple[RSSMState, Tensor]] = {}
        terms: dict[str, Tensor] = {}
        latent: LatentAction | None = None
        seen_BTE = embed_BTE
        if self.lower is not None and self.source is not None:
            action_BTA, terms, latent = self.source(batch)
            before = start.lower if start else None
            lower, logits = self.lower.observe(action_BTA, embed_BTE, first_BT, before)
            prior["lower"] = lower, logits
            seen_BTE = lower.feat
            if self.cfg.concat_embed:
                seen_BTE = torch.cat([embed_BTE, seen_BTE], dim=-1)
        if self.upper is not None:
            before = start.upper if start else None
            upper, logits = self.upper.observe(batch["action"], seen_BTE, first_BT, before)
            prior["upper"] = upper, logits
        return Observed(Belief(lower, upper), embed_BTE, prior, terms, latent)

    def loss(self, batch: Batch) -> Fit:
        """Eq. (2) in pre-training, eq. (3) in fine-tuning, plus the terms of the method's plugs."""
        seen = self.observe(batch)
        terms = dict(seen.terms)
        log: dict[str, Tensor] = {}
        for name, (post, prior_BTSK) in seen.prior.items():
            dynamics = self.lower if name == "lower" else self.upper
            assert dynamics is not None
            terms[f"kl_{name}"] = dynamics.kl(post.logits, prior_BTSK, self.objective.free_nats)
        if seen.latent is not None:
            assert self.lower is not None
            terms["consistency"] = consistency(
                self.cfg.source.consistency, seen.latent, self.lower, *seen.prior["lower"]
            )
        feat_BTF = seen.belief.control.feat
        context = self.context(batch["obs"]) if self.context is not None else NO_CONTEXT
        terms |= context.terms
        mean_NCHW = self.decoder(feat_BTF.flatten(0, 1), context.maps).float()
        error_NCHW = mean_NCHW - normalised(batch["obs"])
        # -ln p(o_t | s_t, e_i): unit-variance Gaussian without its constant, summed over pixels.
        terms["image"] = 0.5 * error_NCHW.pow(2).sum(dim=(1, 2, 3)).mean()
        if self.heads:
            bonus_BT = self._bonus(seen)
            if bonus_BT is not None:
                log["bonus"] = bonus_BT.mean()
                bonus_BT = self.cfg.bonus.beta * bonus_BT
            terms |= self.heads.terms(batch, feat_BTF, bonus_BT)
        total, weighed = weigh(terms, self.objective.weights)
        return Fit(total, log | weighed, seen.belief)

    def _bonus(self, seen: Observed) -> Tensor | None:
        """Intrinsic bonus of the first steps, (B, T - window + 1); None without one."""
        if self.bonus is None:
            return None
        lower = seen.belief.lower
        assert lower is not None
        compared = lower.feat if self.upper is not None else seen.embed
        bonus_BT: Tensor = self.bonus(compared.detach())
        return bonus_BT

    def head(self, name: str, feat: Tensor) -> Tensor:
        """Output of one head, (..., F) -> (...), float32."""
        return self.heads.read(name, feat)

    def imagine(
        self,
        start_NF: Tensor,
        action_of: Callable[[int, Tensor], Tensor],
        steps: int,
        replay: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Dream with the control dynamics; no frames and no phrases are needed there (O8).

        Arguments and result of `RSSM.imagine`: features (I + 1, N, F), the start first.
        """
        dynamics = self.upper or self.lower
        assert dynamics is not None

        def drive(i: int, feat_NF: Tensor) -> Tensor:
            return self._encode_action(action_of(i, feat_NF))

        again = None if replay is None else lambda: self._encode_action(replay())
        return dynamics.imagine(start_NF, drive, steps, again)

    def _encode_action(self, action_BA: Tensor) -> Tensor:
        """What an environment action becomes before it drives the control dynamics."""
        if self.upper is not None or self.source is None:
            return action_BA
        driven: Driven = self.source({"action": action_BA})
        return driven.action

    @torch.no_grad()
    def open_loop(self, batch: Batch, seen: int) -> Tensor:
        """Watch the first ``seen`` frames, then dream the rest from the actions alone.

        Args:
            batch: Sequences of T > ``seen`` frames.
            seen: Number of frames that are shown.

        Returns:
            Frames (B, T, H, W, 3) in [0, 1]; the scene's context comes from what was shown.
        """
        shown = {key: value[:, :seen] for key, value in batch.items()}
        belief = self.observe(shown).belief
        dynamics = self.upper or self.lower
        assert dynamics is not None
        if self.upper is not None or self.source is None:
            drive_BTA = batch["action"]
        else:
            drive_BTA = self.source(batch).action
        dreamt_IBF = dynamics.imagine(
            belief.at(seen - 1).control.feat,
            lambda i, _: drive_BTA[:, seen + i],
            batch["obs"].shape[1] - seen,
        )[1:]
        feat_BTF = torch.cat([belief.control.feat, dreamt_IBF.transpose(0, 1)], dim=1)
        context = self.context(shown["obs"]) if self.context is not None else NO_CONTEXT
        mean_NCHW = self.decoder(feat_BTF.flatten(0, 1), context.maps).float()
        frame_NHWC: Tensor = (mean_NCHW + 0.5).clamp(0.0, 1.0).permute(0, 2, 3, 1)
        return frame_NHWC.reshape(batch["obs"].shape)
