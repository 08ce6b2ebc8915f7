"""What drives the lower dynamics: nothing, a phrase, an inferred action, or the robot's own.

This plug is the first of the five places where the published systems differ (docs/methods.md).
Shapes: B batch, T time, A action, V semantic vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mapo_lightning.models.blocks import mlp, position_code, xavier
from mapo_lightning.models.rssm_world.consistency import LatentAction, consistency, gaussian_kl
from mapo_lightning.models.rssm_world.dynamics import Dynamics, LatentState
from mapo_lightning.models.rssm_world.encoder import (
    CHANNELS,
    build_encoder,
    frame_pairs,
    normalised,
)
from mapo_lightning.models.rssm_world.settings import ImageConfig, SourceConfig
from mapo_lightning.types import Batch, ConfigError


class Driven(NamedTuple):
    """An action sequence, and where it came from."""

    action: Tensor  # (B, T, A)
    latent: LatentAction | None = None  # where the action was inferred from frames
    log: Mapping[str, Tensor] = MappingProxyType({})  # detached scalars for the curves


class ActionSource(nn.Module):
    """Turns a batch into the action sequence that drives one dynamics model.

    Attributes:
        action_dim: Width A of its actions.
        terms: Names of the loss terms that it adds.
    """

    action_dim: int
    terms: tuple[str, ...] = ()

    def forward(self, batch: Batch) -> Driven:
        """Actions (B, T, A) that led to each frame of the batch."""
        raise NotImplementedError

    def losses(
        self, driven: Driven, dynamics: Dynamics[Any], post: LatentState, prior_BTSK: Tensor
    ) -> dict[str, Tensor]:
        """Loss terms of the source, by the names of ``terms``.

        Args:
            driven: What ``forward`` gave.
            dynamics: Model that was driven by it.
            post: Its posterior states, axes (B, T).
            prior_BTSK: Its prior logits, (B, T, S, K).
        """
        return {}


class NullAction(ActionSource):
    """APV and ContextWM: the video model is told nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.action_dim = width

    def forward(self, batch: Batch) -> Driven:
        """Zeros, (B, T, A)."""
        first_BT = batch["is_first"]
        return Driven(torch.zeros(*first_BT.shape, self.action_dim, device=first_BT.device))


class SemanticAction(ActionSource):
    """MAPO: a trainable projection of the embedded phrase, plus the position code.

    The code has the norm sqrt(A / 2). Those of the phrases are learned; the largest of a batch is
    logged as ``phrase_norm``.
    Frames without a significant action are the zero vector before the code is added (O4).
    Source: Sec. 4.1 (1) and Algorithm 1, line 10; facts O1, O4, O9.
    """

    def __init__(self, semantic_dim: int, cfg: SourceConfig) -> None:
        super().__init__()
        self.action_dim, self.position = cfg.width, cfg.position
        self.project = xavier(nn.Linear(semantic_dim, cfg.width))

    def forward(self, batch: Batch) -> Driven:
        """Projected phrases, (B, T, A)."""
        action = self.project(batch["semantic"]) * batch["has_semantic"][..., None]
        loudest = action.detach().norm(dim=-1).amax()
        if self.position:
            action = action + position_code(batch["position"], self.action_dim)
        return Driven(action, log={"phrase_norm": loudest})


class InverseAction(ActionSource):
    """PreLAR: a Gaussian latent action inferred from two consecutive frames.

    Source: facts 7.4.
    """

    terms = ("latent_action_kl", "consistency")

    def __init__(self, image: ImageConfig, cfg: SourceConfig, hidden: int) -> None:
        super().__init__()
        self.action_dim, self.prior_std, self.sampled = cfg.width, cfg.prior_std, cfg.sampled
        self.consistency = cfg.consistency
        self.encoder = build_encoder(image, inputs=2 * CHANNELS)
        self.infer = mlp(self.encoder.embed_dim, hidden, 1, 2 * cfg.width)

    def forward(self, batch: Batch) -> Driven:
        """Inferred actions, (B, T, A), the first one zero."""
        obs = batch["obs"]
        frame_NCHW = normalised(obs)
        pairs = frame_pairs(frame_NCHW.view(*obs.shape[:2], *frame_NCHW.shape[1:]))
        raw = self.infer(self.encoder(pairs.flatten(0, 1))).view(
            *pairs.shape[:2], 2 * self.action_dim
        )
        mean, raw_std = raw.float().chunk(2, dim=-1)
        std = 2.0 * torch.sigmoid(raw_std / 2.0)
        action = mean + std * torch.randn_like(std) if self.sampled else mean
        episode_BT, whole = batch.get("episode"), None
        if episode_BT is not None:  # what lies between two episodes is no action
            whole = episode_BT[:, 1:] == episode_BT[:, :-1]
        return Driven(F.pad(action, (0, 0, 1, 0)), LatentAction(mean, std, action, whole))

    def losses(
        self, driven: Driven, dynamics: Dynamics[Any], post: LatentState, prior_BTSK: Tensor
    ) -> dict[str, Tensor]:
        """KL of the inferred actions, and how well they agree with the changes of the state."""
        latent = driven.latent
        assert latent is not None
        prior = torch.zeros_like(latent.mean), torch.full_like(latent.std, self.prior_std)
        kl = gaussian_kl(latent.mean, latent.std, *prior)
        return {
            "latent_action_kl": (kl if latent.whole is None else kl[latent.whole]).mean(),
            "consistency": consistency(self.consistency, latent, dynamics, post, prior_BTSK),
        }


class PaddedAction(ActionSource):
    """A video model without actions, driven by the robot's: PreLAR's naive fine-tuning."""

    def __init__(self, env_action_dim: int, width: int) -> None:
        super().__init__()
        if env_action_dim > width:
            raise ConfigError(
                f"the action has {env_action_dim} numbers but world_model.source.width leaves room "
                f"for {width}; pre-train with a wider one"
            )
        self.action_dim = width

    def forward(self, batch: Batch) -> Driven:
        """Actions padded with zeros, (B, T, A)."""
        action = batch["action"]
        return Driven(F.pad(action, (0, self.action_dim - action.shape[-1])))


class EnvAction(ActionSource):
    """PreLAR in fine-tuning: the robot's action, encoded to the width of the latent action."""

    def __init__(self, env_action_dim: int, cfg: SourceConfig, hidden: int) -> None:
        super().__init__()
        self.action_dim = cfg.width
        self.encode = mlp(env_action_dim, hidden, 1, cfg.width)

    def forward(self, batch: Batch) -> Driven:
        """Encoded actions, (B, T, A)."""
        return Driven(self.encode(batch["action"]))


def build_action_source(
    cfg: SourceConfig,
    image: ImageConfig,
    hidden: int,
    semantic_dim: int,
    env_action_dim: int | None,
) -> ActionSource:
    """Source of the chosen kind.

    ``env_action_dim`` is the width of the environment's action where that is to drive the lower
    dynamics, which is in fine-tuning without upper dynamics; None elsewhere.
    """
    if cfg.kind == "semantic":
        return SemanticAction(semantic_dim, cfg)
    if cfg.kind == "null":
        return (
            NullAction(cfg.width)
            if env_action_dim is None
            else PaddedAction(env_action_dim, cfg.width)
        )
    if env_action_dim is None:
        return InverseAction(image, cfg, hidden)
    return EnvAction(env_action_dim, cfg, hidden)
