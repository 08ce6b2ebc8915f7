"""Decision fidelity: would the dream have chosen well among futures that were really played?

From one state, K action sequences are run and dreamt. Only the order of their returns matters to a
decision, so that is what is compared.

Shapes: C contexts, K action sequences, H steps ahead, R checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mapo_lightning.types import MapoError

Values = NDArray[np.float64]

_RESAMPLES = 2000


def decision_fidelity(truth: Values, dream: Values) -> Mapping[str, Values]:
    """How well dreamt returns tell which sequence is best, for every number of steps.

    - ``regret``: true return lost by taking the sequence that the dream prefers, over the range of
      the true returns, in [0, 1]; 0: it is the best. Among several that it prefers alike, the mean.
    - ``accuracy``: share of pairs with different true returns that the dream puts in the right
      order, in [0, 1]; a tie counts half, so 0.5 is what guessing gets.
    - ``spearman``: rank correlation, in [-1, 1]; 0 where the dream ranks all alike.

    What they cannot see: whether returns have the right size, and whether the dream is right about
    sequences that nobody played.

    Args:
        truth: True returns up to each step, (C, K, H), K at least 2.
        dream: Dreamt returns, (C, K, H); any order-preserving scale.

    Returns:
        Name -> (C, H); NaN where all true returns are equal: there is nothing to decide.

    Raises:
        MapoError: The shapes differ, there is only one sequence, or a return is not finite.
    """
    if truth.shape != dream.shape or truth.ndim != 3 or truth.shape[1] < 2:
        raise MapoError(
            "true and dreamt returns must both have the shape (contexts, sequences, steps) with "
            f"two sequences or more, got {truth.shape} and {dream.shape}"
        )
    if not (np.isfinite(truth).all() and np.isfinite(dream).all()):
        raise MapoError("a true or dreamt return is not a finite number: look at the reward head")
    low, high = truth.min(axis=1), truth.max(axis=1)
    some = high > low
    preferred = dream == dream.max(axis=1, keepdims=True)
    reached = (truth * preferred).sum(axis=1) / preferred.sum(axis=1)
    regret = np.divide(high - reached, high - low, out=np.zeros_like(high), where=some)
    above, believed = _signs(truth), _signs(dream)
    agreement = (above * believed).sum(axis=(1, 2))
    pairs = np.abs(above).sum(axis=(1, 2))
    accuracy = 0.5 + 0.5 * np.divide(agreement, pairs, out=np.zeros_like(high), where=some)
    found = {"regret": regret, "accuracy": accuracy, "spearman": rank_correlation(truth, dream)}
    return {name: np.where(some, value, np.nan) for name, value in found.items()}


def over_checkpoints(truth: Values, dream: Values) -> Mapping[str, Values]:
    """Whether the agent's dreamt return tells which checkpoint of a run is better.

    Args:
        truth: Returns of each checkpoint's agent up to each step, really played from the same C
            states, (R, C, H), R at least 3.
        dream: What it dreamt of the same, (R, C, H).

    Returns:
        ``of_means``: rank correlation over checkpoints of the means over states, (1, H);
        ``per_state``: of each state alone, (C, H), lower because single returns are noisy. NaN
        where all checkpoints are equally good.

    Raises:
        MapoError: The shapes differ, or there are fewer than three checkpoints.
    """
    if truth.shape != dream.shape or truth.ndim != 3 or len(truth) < 3:
        raise MapoError(
            "true and dreamt returns must both have the shape (checkpoints, states, steps) with "
            f"three checkpoints or more, got {truth.shape} and {dream.shape}"
        )
    means = (x.mean(axis=1)[None] for x in (truth, dream))
    return {
        "of_means": rank_correlation(*means),
        "per_state": rank_correlation(truth.swapaxes(0, 1), dream.swapaxes(0, 1)),
    }


def over_checkpoints_interval(truth: Values, dream: Values) -> tuple[float, float]:
    """95 % percentile bootstrap interval, over states, of ``of_means`` at one step.

    Args:
        truth: True returns, (R, C).
        dream: Dreamt returns, (R, C).
    """
    states = truth.shape[1]
    drawn = np.random.default_rng(0).integers(states, size=(_RESAMPLES, states))
    means = (x[:, drawn].mean(axis=2).T[..., None] for x in (truth, dream))
    low, high = np.nanpercentile(rank_correlation(*means), [2.5, 97.5])
    return float(low), float(high)


def rank_correlation(truth: Values, dream: Values) -> Values:
    """Spearman's correlation over the second axis, (C, K, H) -> (C, H); ties share their rank.

    0 where the dream ranks all alike, NaN where the truth does.
    """
    true, believed = _ranks(truth), _ranks(dream)
    product = (true * believed).sum(axis=1)
    norms = np.sqrt(np.square(true).sum(axis=1) * np.square(believed).sum(axis=1))
    found = np.divide(product, norms, out=np.zeros_like(product), where=norms > 0)
    return np.where(np.square(true).sum(axis=1) > 0, found, np.nan)


def summary(found: Mapping[str, Values]) -> dict[str, float]:
    """Means over contexts at the last step, with 95 % percentile bootstrap intervals over them.

    Args:
        found: Name -> (C, H).

    Returns:
        ``NAME``, ``NAME_low`` and ``NAME_high``, and ``decided``, the number of contexts in which
        there was anything to decide. Names without any number are left out.
    """
    figures: dict[str, float] = {}
    for name, values in found.items():
        last = values[:, -1][np.isfinite(values[:, -1])]
        figures["decided"] = float(len(last))
        if not len(last):
            continue
        drawn = np.random.default_rng(0).integers(len(last), size=(_RESAMPLES, len(last)))
        low, high = np.percentile(last[drawn].mean(axis=1), [2.5, 97.5])
        found_here = {"": last.mean(), "_low": low, "_high": high}
        figures |= {f"{name}{end}": float(value) for end, value in found_here.items()}
    return figures


def _signs(returns: Values) -> Values:
    """For every two sequences, which is better: 1, 0 or -1, (C, K, K, H)."""
    return np.sign(returns[:, :, None] - returns[:, None])


def _ranks(returns: Values) -> Values:
    """Ranks over the second axis, less their mean; equal returns share one."""
    found: Values = _signs(returns).sum(axis=2) / 2.0
    return found
