"""How good labels are: what was said of a window against what moved in it.

A motion is *clear* if it is at least 3 % of the frame width over the window and no part that moves
half as far goes to another side (more than 45 degrees away). A phrase *agrees* with it if its
direction on the screen lies within 45 degrees: eight equal ways of guessing would give 25 %.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mapo_lightning.semantics import vocabulary
from mapo_lightning.semantics.phrase import Phrase, Status
from mapo_lightning.types import Frames

CLEAR_PERCENT = 3.0
"""Smallest clear motion over one window, in percent of the frame width."""
_WITHIN = float(np.cos(np.radians(45.0))) - 1e-9

Shift = NDArray[np.float64]
"""(right, down), (2,), in percent of the frame width."""


class Judged(NamedTuple):
    """One window: what was said, and what moved."""

    status: Status
    phrase: Phrase | None
    by_flow: Shift | None
    """Dominant motion that followed points show; None where they show none, or several."""
    by_truth: Shift | None
    """Clear motion of the simulator's parts; None where it is not known or not clear."""


class Agreement(NamedTuple):
    """Phrases against one yardstick, over the windows in which that sees a clear motion."""

    clear: int
    """Windows with a clear motion."""
    told: int
    """Those of them whose phrase names a direction on the screen."""
    agree: int
    """Those of them whose direction is right."""
    null: int
    """Clear windows that were called null or answered unreadably."""
    chance: float
    """Share that would be right if the same phrases belonged to other windows, in [0, 1]."""
    magnitude: float
    """Rank correlation of the distance named with the true one, in [-1, 1]; NaN below 3 windows."""

    @property
    def share(self) -> float:
        """Right ones among those that name a direction, in [0, 1]; NaN where none does."""
        return self.agree / self.told if self.told else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share; as if windows were independent."""
        n, z = self.told, 1.96
        if not n:
            return (0.0, 1.0)
        middle, wide = self.share + z * z / (2 * n), 1.0 + z * z / n
        spread = z * np.sqrt(self.share * (1.0 - self.share) / n + z * z / (4 * n * n))
        return float((middle - spread) / wide), float((middle + spread) / wide)


def said_direction(phrase: Phrase | None) -> Shift | None:
    """Direction on the screen that a phrase names, (right, down), unit length; None if it does not.

    Turning and coming closer are no directions on the screen.
    """
    if phrase is None:
        return None
    low = re.sub(r"\b(?:counter|anti)[- ]?clock", "counterclock", phrase.direction.lower())
    words = re.findall(r"[a-z]+", low)
    known = [vocabulary.DIRECTIONS[w] for w in words if w in vocabulary.DIRECTIONS]
    right, up = (sum(k[i] for k in known) for i in (0, 1))
    length = float(np.hypot(right, up))
    return np.array([right, -up]) / length if length else None


def said_distance(phrase: Phrase | None) -> float | None:
    """Number in the displacement slot, whatever its unit; None where there is none."""
    found = re.search(r"\d{1,9}(?:\.\d{1,9})?", phrase.displacement) if phrase else None
    return float(found.group()) if found else None


def clear_shift(shift_P2: NDArray[np.float64]) -> Shift | None:
    """Displacement of the part that moves most, (2,); None where it is not clear.

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


def agreement(judged: Sequence[Judged], yardstick: Sequence[Shift | None]) -> Agreement:
    """Compare phrases with one yardstick.

    Args:
        judged: The windows.
        yardstick: What moved in each; None, or less than a clear motion, leaves a window out.
    """
    clear = [
        (window.phrase, shift)
        for window, shift in zip(judged, yardstick, strict=True)
        if shift is not None and np.linalg.norm(shift) >= CLEAR_PERCENT
    ]
    told = [(p, way, true) for p, true in clear if (way := said_direction(p)) is not None]
    ways, trues = [way for _, way, _ in told], [true for _, _, true in told]
    right = np.array([[same_way(way, true) for true in trues] for way in ways])
    count = len(told)
    others = right.sum() - np.trace(right) if count else 0
    # Degrees and growth belong to phrases without a direction on the screen: left out.
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
    """Spearman's; equal values share their mean rank."""
    if len(pairs_N2) < 3:
        return float("nan")
    ranks = []
    for column in pairs_N2.T:
        _, which, count = np.unique(column, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(count) - (count - 1) / 2.0)[which])
    if min(np.ptp(rank) for rank in ranks) == 0.0:
        return float("nan")
    one, two = (rank - rank.mean() for rank in ranks)
    return float(one @ two / np.sqrt((one @ one) * (two @ two)))


def jittered(clip: Frames) -> dict[str, Frames]:
    """Return the window as another camera might have given it; its motion is the same.

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
    """Return the first frame as often as there are frames, with sensor noise of 2 grey levels."""
    noise = np.random.default_rng(1).normal(0.0, 2.0, clip.shape)
    return np.clip(np.rint(clip[:1] + noise), 0, 255).astype(np.uint8)


def same_direction(one: Phrase | None, other: Phrase | None) -> bool:
    """Whether two answers say the same of the direction: both null, or within 45 degrees."""
    if one is None or other is None:
        return one is other
    ways = said_direction(one), said_direction(other)
    if ways[0] is None or ways[1] is None:
        return one.direction == other.direction
    return same_way(ways[0], ways[1])
