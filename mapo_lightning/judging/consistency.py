"""Counterfactual consistency: do two dreams of one state part as the two futures really do?

Two action sequences are run from one restored state, and dreamt from it. At every step, the
difference of the two dreamt pictures is compared with the difference of the two true ones.

Shapes: C contexts, K action sequences, H steps ahead, h w image.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from mapo_lightning.training.told import MOVING
from mapo_lightning.types import Frames, MapoError

Values = NDArray[np.float64]


def counterfactual_consistency(truth: Frames, dream: Frames) -> Mapping[str, Values]:
    """How the difference that actions make in a dream compares with the true one.

    A pixel counts where the two true pictures differ by more than a tenth of the range in one of
    their colours. Over all pairs of the K sequences, means are taken of

    - ``direction``: cosine of the dreamt and the true difference on these pixels, in [-1, 1].
      1: the dream parts where and as the truth does; 0: it does not part, or elsewhere; -1: the
      other way round.
    - ``size``: norm of the dreamt difference over that of the true one, on these pixels; 1 is
      right, 0 means that actions change nothing.
    - ``spill``: share of the dreamt difference (its square) on all other pixels, in [0, 1]; NaN
      where the dreams do not differ at all.

    What it cannot see: errors that both dreams share, such as a wrong scene or a wrong common
    motion; futures whose pictures agree (NaN), for instance those that differ in speed only;
    whether a difference is of the right thing if colours agree; and small differences of large
    areas. Noise that the dreams do not share counts as difference: it lowers ``direction`` and
    raises ``size`` and ``spill``. Where a model can move an object in all directions alike,
    ``direction`` rewards pictures that are right on average, blurred ones included.

    Args:
        truth: Pictures of the futures, (C, K, H + 1, h, w, 3) uint8, K at least 2.
        dream: Pictures of their dreams, of the same shape.

    Returns:
        Name -> (C, H); NaN where no two of the true pictures differ.

    Raises:
        MapoError: The shapes differ, or there is only one sequence.
    """
    if truth.shape != dream.shape or truth.ndim != 6 or truth.shape[1] < 2:
        raise MapoError(
            "truth and dream must both have the shape (contexts, sequences, steps + 1, height, "
            f"width, 3) with two sequences or more, got {truth.shape} and {dream.shape}"
        )
    pairs = [
        _of_pair(truth[:, a, 1:], truth[:, b, 1:], dream[:, a, 1:], dream[:, b, 1:])
        for a, b in combinations(range(truth.shape[1]), 2)
    ]
    return {name: _mean([pair[name] for pair in pairs]) for name in pairs[0]}


def _of_pair(true_a: Frames, true_b: Frames, dream_a: Frames, dream_b: Frames) -> dict[str, Values]:
    """The three numbers of one pair of sequences, (C, H) each."""
    true, dreamt = _difference(true_a, true_b), _difference(dream_a, dream_b)
    differs = (np.abs(true) > MOVING).any(axis=-1, keepdims=True)
    inside, all_over = dreamt * differs, _squared(dreamt)
    true_norm, norm = np.sqrt(_squared(true * differs)), np.sqrt(_squared(inside))
    some: NDArray[np.bool_] = differs.sum(axis=(-3, -2, -1)) > 0
    product = (true * inside).sum(axis=(-3, -2, -1), dtype=np.float64)
    # A dream that does not part has no direction; it has found none of the true one.
    cosine = np.divide(product, true_norm * norm, out=np.zeros_like(product), where=norm > 0)
    ratio = np.divide(norm, true_norm, out=np.zeros_like(norm), where=some)
    nowhere = np.full_like(norm, np.nan)
    spill = np.divide(all_over - norm**2, all_over, out=nowhere, where=all_over > 0)
    found = {"direction": cosine, "size": ratio, "spill": np.maximum(spill, 0.0)}
    return {name: np.where(some, value, np.nan) for name, value in found.items()}


def _difference(one: Frames, two: Frames) -> NDArray[np.float32]:
    """Colours of one less those of the other, in [-1, 1]."""
    return (one.astype(np.float32) - two) / np.float32(255.0)


def _squared(pictures: NDArray[np.float32]) -> Values:
    """Sum of squares of each picture, (C, H)."""
    found: Values = np.square(pictures).sum(axis=(-3, -2, -1), dtype=np.float64)
    return found


def _mean(values: list[Values]) -> Values:
    """Mean over pairs, of those that have a number."""
    stacked = np.stack(values)
    count = np.isfinite(stacked).sum(axis=0)
    total = np.nansum(stacked, axis=0)
    mean: Values = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return mean
