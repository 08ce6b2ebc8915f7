"""A property of dreams, frame by frame, with intervals over independent contexts.

Shapes: C contexts (clips or start states), G groups of contexts that belong together, K columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

HORIZONS = (1, 5, 15, 45)
"""Frames ahead of the last one that was shown at which dreams are judged."""
_RESAMPLES = 2000

Values = NDArray[np.float64]
"""(C, K): a row per context, a column per number of frames ahead; NaN where not defined."""


class Estimate(NamedTuple):
    """A figure with its 95 % interval; NaN where no context defines it."""

    mean: float
    low: float
    high: float
    contexts: int
    """Independent groups that it rests on."""

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


class Measure(NamedTuple):
    """One property of one dream.

    The figure of a column is the mean of ``values``; with ``over`` it is 1 - sum(values) /
    sum(over), the share of ``over`` that is explained, as R² is.
    """

    ahead: tuple[int, ...]
    """Frames ahead, one per column."""
    values: Values
    over: Values | None = None

    def estimate(self, column: int, groups: NDArray[np.int64] | None = None) -> Estimate:
        """The figure of a column, with a percentile bootstrap over groups of contexts.

        Args:
            column: Index into ``ahead``.
            groups: Number of the group of each context, (C,): clips of one video are not
                independent. None: every context is.
        """
        values = self.values[:, column]
        over = np.ones_like(values) if self.over is None else self.over[:, column]
        known = ~(np.isnan(values) | np.isnan(over))
        own = np.arange(len(values)) if groups is None else groups
        top, below = (_sums(x[known], own[known]) for x in (values, over))
        if not len(top):
            return Estimate(float("nan"), float("nan"), float("nan"), 0)
        drawn = np.random.default_rng(0).integers(len(top), size=(_RESAMPLES, len(top)))
        low, high = np.nanpercentile(self._figure(top[drawn], below[drawn]), [2.5, 97.5])
        return Estimate(float(self._figure(top, below)), float(low), float(high), len(top))

    def less(self, other: Measure) -> Measure:
        """By how much this is larger than another, context by context.

        Raises:
            ValueError: One of them is a share, or their columns differ.
        """
        if self.over is not None or other.over is not None or self.ahead != other.ahead:
            raise ValueError("only means at the same frames ahead can be subtracted")
        return Measure(self.ahead, self.values - other.values)

    def _figure(self, top: Values, below: Values) -> Values:
        with np.errstate(divide="ignore", invalid="ignore"):
            share: Values = top.sum(axis=-1) / below.sum(axis=-1)
        return share if self.over is None else 1.0 - share


def reachable(steps: int, horizons: Sequence[int] = HORIZONS) -> tuple[int, ...]:
    """Those of the horizons that ``steps`` dreamt frames reach."""
    return tuple(horizon for horizon in horizons if horizon <= steps)


def _sums(values: NDArray[np.float64], groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sum of each group, (G,); a mean over contexts weighs every context alike."""
    _, place = np.unique(groups, return_inverse=True)
    found: NDArray[np.float64] = np.bincount(place, values).astype(np.float64)
    return found
