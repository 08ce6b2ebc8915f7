"""Comparing methods over seeds and tasks, as the library rliable does.

Every method has one number per seed and task. Bootstraps are stratified: the seeds of each task are
drawn anew by themselves. Source: Agarwal et al., arXiv:2108.13264; the tests hold values that
rliable 1.2.0 has computed.

Shapes: K tasks, each with its own number of seeds N.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from mapo_lightning.training.across_seeds import iqm
from mapo_lightning.training.evaluation import CONFIDENCE

Values = NDArray[np.float64]
"""One number per seed, (N,)."""
Scores = Sequence[Values]
"""Those of each task."""

RESAMPLES = 10_000
"""Of every bootstrap; always from the same draws."""
_SHARES = ((1 + CONFIDENCE) / 2, 0.8)  # of the two-sided test and of its power
_NORMAL = float(sum(stats.norm.ppf(_SHARES)))  # standard errors that many seeds need
_MOST_SEEDS = 100_000


class Estimate(NamedTuple):
    """A number with its 95 % percentile bootstrap interval; None where a task has one seed only."""

    value: float
    interval: tuple[float, float] | None


def stratified_iqm(scores: Scores) -> Estimate:
    """Interquartile mean over all seeds of all tasks.

    Args:
        scores: On one scale: normalised.
    """
    return _bootstrap(scores, lambda *drawn, axis: iqm(np.concatenate(drawn, axis), axis))


def profile(scores: Scores, levels: Sequence[float]) -> list[Estimate]:
    """Performance profile: the share of runs above each level, tasks counted alike.

    Args:
        scores: Normalised.
        levels: At which it is read.
    """

    def share(level: float) -> Callable[..., Any]:
        # Of the pooled runs where tasks have equally many seeds, as in rliable.
        return lambda *drawn, axis: np.mean([(x > level).mean(axis) for x in drawn], axis=0)

    return [_bootstrap(scores, share(level)) for level in levels]


def improvement(first: Scores, second: Scores) -> Estimate:
    """Probability that a run of the first method beats one of the second, mean over the tasks.

    A tie counts half. It is Mann and Whitney's U over the number of pairs.

    Args:
        first: Of the tasks that both have, in the same order.
        second: The same.

    Raises:
        ValueError: The numbers of tasks differ, or there is none.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"methods are compared on the same tasks: {len(first)}, {len(second)}")

    def better(*drawn: Any, axis: int) -> Any:
        shares = []
        for x, y in zip(drawn[: len(first)], drawn[len(first) :], strict=True):
            apart = np.sign(x[..., :, None] - y[..., None, :])
            shares.append(0.5 + 0.5 * apart.mean((-2, -1)))
        return np.mean(shares, axis=0)

    return _bootstrap([*first, *second], better)


def _bootstrap(samples: Scores, statistic: Callable[..., Any]) -> Estimate:
    """A statistic with its percentile interval; samples are drawn by themselves."""
    value = float(statistic(*samples, axis=-1))
    if any(len(sample) < 2 for sample in samples):
        return Estimate(value, None)
    found = stats.bootstrap(
        tuple(samples),
        statistic,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        batch=1000,
        method="percentile",
        axis=-1,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value, (float(found.low), float(found.high)))


class Difference(NamedTuple):
    """Difference of the means of two methods on one task."""

    mean: float
    interval: tuple[float, float] | None
    """Welch's, 95 %; None where a method has one seed only."""
    needed: int | None
    """Seeds of each that would show a difference of this size; None where none would do."""

    @property
    def apart(self) -> bool:
        """Whether the interval excludes zero."""
        return self.interval is not None and not self.interval[0] <= 0.0 <= self.interval[1]

    def verdict(self) -> str:
        """In words."""
        if self.interval is None:
            return "one seed: cannot be told"
        if self.apart:
            return "yes"
        many = f"about {self.needed} seeds each would" if self.needed else "more seeds may not help"
        return f"not told apart; {many}"


def difference(first: Values, second: Values) -> Difference:
    """Compare the means of two methods on one task."""
    mean = float(first.mean() - second.mean())
    if min(len(first), len(second)) < 2:
        return Difference(mean, None, None)
    variance = float(first.var(ddof=1) + second.var(ddof=1))
    if variance == 0.0:
        return Difference(mean, (mean, mean), 2 if mean else None)
    found = stats.ttest_ind(first, second, equal_var=False).confidence_interval(CONFIDENCE)
    return Difference(mean, (float(found.low), float(found.high)), _needed(mean, variance))


def _needed(mean: float, variance: float) -> int | None:
    """Seeds of each method for power 0.8, if difference and spread are what they seem to be.

    Args:
        mean: The difference.
        variance: Sum of both methods'.
    """

    def enough(sigmas: float) -> float:
        return sigmas**2 * variance / mean**2

    if not mean or enough(_NORMAL) > _MOST_SEEDS:
        return None
    seeds = max(2, math.ceil(enough(_NORMAL)))
    while enough(float(sum(stats.t.ppf(_SHARES, 2 * seeds - 2)))) > seeds:
        seeds += 1
    return seeds
