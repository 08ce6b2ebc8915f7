"""Settings that every world model shares; free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from mapo_lightning.types import ConfigError

MLPStyle: TypeAlias = Literal["elu", "rms_silu"]
"""What follows the hidden layers of a perceptron: ELU (DreamerV2), or RMS norm and SiLU
(DreamerV3)."""
ScalarKind: TypeAlias = Literal["normal", "twohot"]
"""How a network says a number: as the mean of a unit normal (DreamerV2), or by weights of 255 fixed
values on a symlog scale (DreamerV3)."""

Recompute: TypeAlias = Literal["none", "cheap", "all"]
"""What a part of a network computes again in the backward; see `recomputed`."""


@dataclass
class ObjectiveConfig:
    """Weights of the loss terms of one stage (facts 2.3, O14, O20, O21, O26, O37)."""

    scales: dict[str, float] = field(default_factory=dict)
    """Weight of every loss term; its keys must be exactly the terms that the model has."""
    kl: float = 1.0
    """β_z of eq. (1): multiplies the scales of all ``kl_`` terms. 0.1 in APV's own pre-training; a
    small one keeps short trainings from giving up on the latent state."""
    reward: float = 1.0
    """Multiplies the scales of ``reward`` and ``aux_reward``: one number stands against thousands
    of pixels, and a short training does not see it. 1 as published."""
    free_nats: float = 0.0
    """Mean KL below this many nats per step is not penalised (O20)."""

    def __post_init__(self) -> None:
        for name in ("kl", "reward", "free_nats"):
            if getattr(self, name) < 0.0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")

    @property
    def weights(self) -> dict[str, float]:
        """Scale of every term with its common factor multiplied in."""
        factors = {"kl_lower": self.kl, "kl_upper": self.kl}
        factors |= {"reward": self.reward, "aux_reward": self.reward}
        return {name: scale * factors.get(name, 1.0) for name, scale in self.scales.items()}
