"""What a setting is worth over several training seeds, as opposed to one agent's episodes.

One number per seed: the mean return of its agent's test episodes. Sources: Agarwal et al.,
arXiv:2108.13264, for the interquartile mean and its bootstrap interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from mapo_lightning.training.evaluation import CONFIDENCE
from mapo_lightning.training.told import student

_CUT = 0.25  # share of the seeds that the interquartile mean leaves out at each end
_RESAMPLES = 10_000


class AcrossSeeds(NamedTuple):
    """Statistics of one number per seed; intervals are None for a single seed."""

    seeds: int
    mean: float
    interval: tuple[float, float] | None
    """Of the mean: Student's t, 95 %."""
    iqm: float
    """Interquartile mean: without the lowest and the highest quarter, rounded down. Up to three
    seeds it is the mean."""
    iqm_interval: tuple[float, float] | None
    """Of the interquartile mean: percentile bootstrap over the seeds, 95 %, always from the same
    draws."""


def iqm(values: NDArray[np.float64], axis: int = -1) -> Any:
    """Interquartile mean along an axis."""
    return stats.trim_mean(values, _CUT, axis=axis)


def across_seeds(values: Sequence[float]) -> AcrossSeeds:
    """Sum up one number per seed.

    Raises:
        ValueError: There is none.
    """
    if not values:
        raise ValueError("there is no seed to sum up")
    numbers = np.asarray(values, np.float64)
    middle = float(iqm(numbers))
    if len(numbers) < 2:
        return AcrossSeeds(1, float(numbers[0]), None, middle, None)
    mean, *interval = student(values)
    draws = np.random.default_rng(0).integers(len(numbers), size=(_RESAMPLES, len(numbers)))
    means = iqm(numbers[draws])
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return AcrossSeeds(
        len(numbers), mean, (interval[0], interval[1]), middle, (float(low), float(high))
    )
