"""Named loss terms and their weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mapo_lightning.types import ConfigError


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
