"""How good labels are: compares what was said about a window with what moved in it.

A motion is *clear* if it is at least 3 % of the frame width over the window and no part that moves
at least half as far has another direction (more than 45 degrees away). A phrase *agrees* with it
if its direction on the screen lies within 45 degrees of it; guessing uniformly would give 25 %.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from mapo_lightning.semantics import vocabulary
from mapo_lightning.semantics.phrase import Phrase, Status
from mapo_lightning.types import Frames

CLEAR_PERCENT = 3.0
"""Smallest clear motion over one window, in percent of the frame width."""
_WITHIN = float(np.cos(np.radians(45.0))) - 1e-9

Shift = NDArray[np.float64]
"""(right, down), (2,), in percent of the frame width."""


class Judged(NamedTuple):
    """One window: what was said about it, and what moved in it."""

    status: Status
    phrase: Phrase | None
    by_points: Shift | None
    """Dominant motion of tracked points; None if they show none, or several."""
    by_simulator: Shift | None
    """Clear motion of the simulator's parts; None if it is unknown or not clear."""
    by_sentence: Shift | None = None
    """Direction that the data set's own class names, of no particular length; None: it names none,
    or nothing clearly moves in the window."""


class Agreement(NamedTuple):
    """Phrases against one reference motion, over the windows in which that motion is clear."""

    clear: int
    """Windows with a clear motion."""
    told: int
    """Clear windows whose phrase names a direction on the screen."""
    agree: int
    """Windows of ``told`` whose direction is right."""
    null: int
    """Clear windows whose label is null or unreadable."""
    chance: float
    """Share that would be right if the same phrases belonged to other windows, in [0, 1]."""
    magnitude: float
    """Rank correlation of the distance named with the true one, in [-1, 1]; NaN below 3 windows."""

    @property
    def share(self) -> float:
        """Share of right directions among those named, in [0, 1]; NaN if none is named."""
        return self.agree / self.told if self.told else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share, as if windows were independent."""
        if not self.told:
            return (0.0, 1.0)
        found = stats.binomtest(self.agree, self.told).proportion_ci(0.95, method="wilson")
        return float(found.low), float(found.high)


def said_direction(phrase: Phrase | None) -> Shift | None:
    """Direction on the screen that a phrase names, (right, down), unit length; None without one.

    Turning and coming closer are not directions on the screen.
    """
    if phrase is None:
        return None
    known = [vocabulary.DIRECTIONS[word] for word in vocabulary.direction_words(phrase.direction)]
    right, up = (sum(k[i] for k in known) for i in (0, 1))
    length = float(np.hypot(right, up))
    return np.array([right, -up]) / length if length else None


def sentence_shift(direction: str, by_points: Shift | None) -> Shift | None:
    """Reference motion of a window of a video whose class names a direction on the screen.

    The class is about the whole video, and a window may lie before the motion or after it. So only
    windows count in which tracked points clearly move, wherever to.

    Args:
        direction: Words of the class, such as ``right``; empty if it names none.
        by_points: Dominant motion of tracked points.
    """
    way = said_direction(Phrase("", "", "", direction, ""))
    if way is None or by_points is None or np.linalg.norm(by_points) < CLEAR_PERCENT:
        return None
    return 100.0 * way  # of the same length everywhere: a class says nothing about distances


def said_distance(phrase: Phrase | None) -> float | None:
    """Number in the displacement slot, whatever its unit; None if there is none."""
    found = re.search(r"\d{1,9}(?:\.\d{1,9})?", phrase.displacement) if phrase else None
    return float(found.group()) if found else None


def clear_shift(shift_P2: NDArray[np.float64]) -> Shift | None:
    """Displacement of the part that moves most, (2,); None if it is not clear.

    Args:
        shift_P2: (right, down) of every part, (P, 2), in percent of the frame width.
    """
    length_P = np.linalg.norm(shift_P2, axis=1)
    most = int(length_P.argmax())
    if length_P[most] < CLEAR_PERCENT:
        return None
    others = shift_P2[length_P >= 0.5 * length_P[most]]
    return shift_P2[most] if all(same_way(other, shift_P2[most]) for other in others) else None


def same_way(one: Shift, other: Shift) -> bool:
    """Whether two motions go within 45 degrees of each other."""
    return bool(one @ other >= _WITHIN * np.linalg.norm(one) * np.linalg.norm(other))


def agreement(judged: Sequence[Judged], reference: Sequence[Shift | None]) -> Agreement:
    """Compare phrases with one reference motion.

    Args:
        judged: The windows.
        reference: Motion in each; windows without one, or without a clear one, are left out.
    """
    clear = [
        (window.phrase, shift)
        for window, shift in zip(judged, reference, strict=True)
        if shift is not None and np.linalg.norm(shift) >= CLEAR_PERCENT
    ]
    told = [(p, way, true) for p, true in clear if (way := said_direction(p)) is not None]
    ways, trues = [way for _, way, _ in told], [true for _, _, true in told]
    right = np.array([[same_way(way, true) for true in trues] for way in ways])
    count = len(told)
    others = right.sum() - np.trace(right) if count else 0
    # Phrases in degrees or growth name no direction on the screen, so only lengths are left here.
    amounts = [(a, np.linalg.norm(t)) for p, _, t in told if (a := said_distance(p)) is not None]
    return Agreement(
        clear=len(clear),
        told=count,
        agree=int(np.trace(right)) if count else 0,
        null=sum(phrase is None for phrase, _ in clear),
        chance=float(others / (count * (count - 1))) if count > 1 else float("nan"),
        magnitude=_rank_correlation(np.array(amounts, np.float64).reshape(-1, 2)),
    )


def _rank_correlation(pairs_N2: NDArray[np.float64]) -> float:
    """Spearman's; NaN below 3 pairs, or if all values on one side are equal."""
    if len(pairs_N2) < 3 or np.ptp(pairs_N2, axis=0).min() == 0.0:
        return float("nan")
    return float(stats.spearmanr(pairs_N2[:, 0], pairs_N2[:, 1]).statistic)


def jittered(clip: Frames) -> dict[str, Frames]:
    """Return the window as another camera might have recorded it; its motion is the same.

    Args:
        clip: (T, H, W, 3) uint8.

    Returns:
        ``shift``: 2 pixels to the right and 1 down; ``bright``: 6 % brighter; ``noise``: sensor
        noise of 2 grey levels, the same every time.
    """
    height, width = clip.shape[1:3]
    padded = np.pad(clip, ((0, 0), (1, 0), (2, 0), (0, 0)), mode="edge")
    noise = np.random.default_rng(0).normal(0.0, 2.0, clip.shape)
    return {
        "shift": padded[:, :height, :width].copy(),
        "bright": np.clip(np.rint(clip * 1.06), 0, 255).astype(np.uint8),
        "noise": np.clip(np.rint(clip + noise), 0, 255).astype(np.uint8),
    }


def frozen(clip: Frames) -> Frames:
    """Return a window of the same length that repeats the first frame, with sensor noise."""
    noise = np.random.default_rng(1).normal(0.0, 2.0, clip.shape)
    return np.clip(np.rint(clip[:1] + noise), 0, 255).astype(np.uint8)


def same_direction(one: Phrase | None, other: Phrase | None) -> bool:
    """Whether two answers name the same direction: both null, or within 45 degrees."""
    if one is None or other is None:
        return one is other
    ways = said_direction(one), said_direction(other)
    if ways[0] is None or ways[1] is None:
        return one.direction == other.direction
    return same_way(ways[0], ways[1])
