"""Named loss terms and their weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

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


def weigh(
    terms: Mapping[str, Tensor], scales: Mapping[str, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add up named loss terms.

    Args:
        terms: Unscaled scalar terms.
        scales: Weight of every term; its keys must be exactly those of ``terms``.

    Returns:
        The scalar to back-propagate, and the detached unscaled terms for the log.

    Raises:
        ConfigError: A term has no scale, or a scale has no term. Either is a typo that would
            otherwise train another objective without a word.
    """
    check_scales(terms, scales)
    # A term of weight 0 stays in the sum, as in the published code (APV's lower KL, facts 2.3): its
    # parameters keep getting a zero gradient, hence their weight decay, on every rank alike.
    total = torch.stack([scales[name] * term for name, term in terms.items()]).sum()
    return total, {name: term.detach() for name, term in terms.items()}


def check_scales(terms: Iterable[str], scales: Iterable[str]) -> None:
    """Hold the names of loss terms against those of their weights.

    Raises:
        ConfigError: A term has no scale, or a scale has no term.
    """
    missing, unknown = sorted(set(terms) - set(scales)), sorted(set(scales) - set(terms))
    if missing or unknown:
        raise ConfigError(
            f"objective.scales must name every loss term of the model: terms without a scale: "
            f"{missing}, scales without a term: {unknown}"
        )
