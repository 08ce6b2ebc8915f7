"""Settings that every world model shares; free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from mapo_lightning.types import ConfigError


@dataclass
class ObjectiveConfig:
    """Weights of the loss terms of one stage (facts 2.3, O14, O20, O21, O26, O37)."""

    scales: dict[str, float] = field(default_factory=dict)
    """Weight of every loss term; its keys must be exactly the terms that the model has."""
    kl: float = 1.0
    """β_z of eq. (1): multiplies the scales of all ``kl_`` terms. 0.1 in APV's own pre-training; a
    small one keeps short trainings from giving up on the latent state."""
    free_nats: float = 0.0
    """Mean KL below this many nats per step is not penalised (O20)."""

    def __post_init__(self) -> None:
        if self.free_nats < 0.0 or self.kl < 0.0:
            raise ConfigError(
                f"free_nats and kl must not be negative, got {self.free_nats} and {self.kl}"
            )

    @property
    def weights(self) -> dict[str, float]:
        """Scale of every term with β_z multiplied in."""
        return {
            name: scale * (self.kl if name.startswith("kl_") else 1.0)
            for name, scale in self.scales.items()
        }
