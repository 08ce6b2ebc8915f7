"""What drives the lower dynamics: nothing, a phrase, an inferred action, or the robot's own.

This plug is the first of the five places where the published systems differ (docs/methods.md).
Shapes: B batch, T time, A action, V semantic vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mapo_lightning.models.blocks import mlp, position_code, xavier
from mapo_lightning.models.encoder import (
    CHANNELS,
    ImageConfig,
    ResNetEncoder,
    frame_pairs,
    normalised,
)
from mapo_lightning.types import Batch, ConfigError


@dataclass
class SourceConfig:
    """Where the lower dynamics takes its actions from."""

    kind: Literal["null", "semantic", "inverse"] = "semantic"
    """Zeros (APV, ContextWM), the embedded phrase (MAPO), or inferred from two frames (PreLAR,
    where the environment's action takes its place in fine-tuning)."""
    width: int = 64
    """Width of the action vector: d_a = 64 (O1); APV and ContextWM give zeros of width 50."""
    position: bool = True
    """Add the sine-cosine position code to the phrase vector (O9)."""
    prior_std: float = 1.2449
    """PreLAR: standard deviation of the action prior. Published: 2·sigmoid(1/2) = 1.245, because
    the released code transforms the prior's 1 as well; intended: 1 (facts 7.4)."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"width must be at least 1, got {self.width}")
        if self.prior_std <= 0.0:
            raise ConfigError(f"prior_std must be positive, got {self.prior_std}")


class Driven(NamedTuple):
    """An action sequence and the loss terms its source adds."""

    action: Tensor  # (B, T, A)
    terms: dict[str, Tensor]  # scalars


class ActionSource(Protocol):
    """Turns a batch into the action sequence that drives one dynamics model."""

    action_dim: int
    terms: tuple[str, ...]
    """Names of the loss terms that it adds."""

    def __call__(self, batch: Batch) -> Driven:
        """Actions (B, T, A) that led to each frame of the batch, and loss terms."""
        ...


class NullAction(nn.Module):
    """APV and ContextWM: the video model is told nothing."""

    terms: tuple[str, ...] = ()

    def __init__(self, width: int) -> None:
        super().__init__()
        self.action_dim = width

    def forward(self, batch: Batch) -> Driven:
        """Zeros, (B, T, A)."""
        first_BT = batch["is_first"]
        return Driven(torch.zeros(*first_BT.shape, self.action_dim, device=first_BT.device), {})


class SemanticAction(nn.Module):
    """MAPO: a trainable projection of the embedded phrase, plus the position code.

    Frames without a significant action are the zero vector before the code is added (O4).
    Source: Sec. 4.1 (1) and Algorithm 1, line 10; facts O1, O4, O9.
    """

    terms: tuple[str, ...] = ()

    def __init__(self, semantic_dim: int, cfg: SourceConfig) -> None:
        super().__init__()
        self.action_dim, self.position = cfg.width, cfg.position
        self.project = xavier(nn.Linear(semantic_dim, cfg.width))

    def forward(self, batch: Batch) -> Driven:
        """Projected phrases, (B, T, A)."""
        action = self.project(batch["semantic"]) * batch["has_semantic"][..., None]
        if self.position:
            action = action + position_code(batch["position"], self.action_dim)
        return Driven(action, {})


class InverseAction(nn.Module):
    """PreLAR: a Gaussian latent action inferred from two consecutive frames.

    Source: facts 7.4.
    """

    terms: tuple[str, ...] = ("latent_action_kl",)

    def __init__(self, image: ImageConfig, cfg: SourceConfig, hidden: int) -> None:
        super().__init__()
        self.action_dim, self.prior_std = cfg.width, cfg.prior_std
        self.encoder = ResNetEncoder(image, inputs=2 * CHANNELS)
        self.infer = mlp(self.encoder.embed_dim, hidden, 1, 2 * cfg.width)

    def forward(self, batch: Batch) -> Driven:
        """Sampled actions, (B, T, A), the first one zero; term ``latent_action_kl``."""
        obs = batch["obs"]
        frame_NCHW = normalised(obs)
        pairs = frame_pairs(frame_NCHW.view(*obs.shape[:2], *frame_NCHW.shape[1:]))
        raw = self.infer(self.encoder(pairs.flatten(0, 1))).view(*pairs.shape[:2], -1)
        mean, raw_std = raw.float().chunk(2, dim=-1)
        std = 2.0 * torch.sigmoid(raw_std / 2.0)
        action = mean + std * torch.randn_like(std)
        ratio = std / self.prior_std
        kl = 0.5 * ((mean / self.prior_std) ** 2 + ratio**2 - 1.0) - ratio.log()
        return Driven(F.pad(action, (0, 0, 1, 0)), {"latent_action_kl": kl.sum(-1).mean()})


class EnvAction(nn.Module):
    """PreLAR in fine-tuning: the robot's action, encoded to the width of the latent action."""

    terms: tuple[str, ...] = ()

    def __init__(self, env_action_dim: int, cfg: SourceConfig, hidden: int) -> None:
        super().__init__()
        self.action_dim = cfg.width
        self.encode = mlp(env_action_dim, hidden, 1, cfg.width)

    def forward(self, batch: Batch) -> Driven:
        """Encoded actions, (B, T, A)."""
        return Driven(self.encode(batch["action"]), {})


def build_action_source(
    cfg: SourceConfig,
    image: ImageConfig,
    hidden: int,
    semantic_dim: int,
    env_action_dim: int | None,
) -> NullAction | SemanticAction | InverseAction | EnvAction:
    """Source of the chosen kind; ``env_action_dim`` is None in pre-training."""
    if cfg.kind == "null":
        return NullAction(cfg.width)
    if cfg.kind == "semantic":
        return SemanticAction(semantic_dim, cfg)
    if env_action_dim is None:
        return InverseAction(image, cfg, hidden)
    return EnvAction(env_action_dim, cfg, hidden)
