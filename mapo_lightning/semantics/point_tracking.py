"""Motion in a window by tracked points: a reference to judge describers by.

Corners are tracked from frame to frame (pyramidal Lucas-Kanade) and back again. The flow describer
uses another method (dense inverse search), so that the two can disagree.
"""

from __future__ import annotations

import itertools
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mapo_lightning.semantics.motion import fit
from mapo_lightning.types import Frames

_WIDTH = 256  # pixels; frames are scaled to this width
_POINTS = 400
_CORNER = 0.002  # weakest corner, as a fraction of the strongest
_RETURNS = 0.5  # pixels by which a point tracked there and back may miss its start
_MOVES = 1.0  # percent of the frame width from which a point counts as moving
_FEWEST = 5  # points that make a motion
_CELLS = 6  # a camera's motion is seen in most cells of a grid this wide and high


def dominant_motion(clip: Frames) -> NDArray[np.float64] | None:
    """Mean motion of what moves against the rest of the picture, or else of the whole picture.

    Args:
        clip: Window of RGB frames, (T, H, W, 3) uint8, oldest first.

    Returns:
        (right, down) from the first frame to the last, (2,), in percent of the frame width; zeros
        if nothing moves; None if too few points can be tracked, or parts move in different
        directions (the length of their sum is below 0.7 of the sum of their lengths).
    """
    points, shifts = _follow(clip)
    if len(points) < _FEWEST:
        return None
    shifts = 100.0 * shifts / _WIDTH
    camera, agree = fit(points, shifts)
    whole = camera.at(points)
    paced = agree.any() and np.median(np.linalg.norm(whole[agree], axis=1)) > _MOVES
    pans = paced and _fills_the_picture(points, agree)
    rest = shifts - whole if pans else shifts
    moving = np.linalg.norm(rest, axis=1) > _MOVES
    if moving.sum() >= _FEWEST:
        return _mean(rest[moving])
    return _mean(shifts[agree]) if pans else np.zeros(2)


def _fills_the_picture(points_N2: NDArray[np.float64], agree_N: NDArray[np.bool_]) -> bool:
    """Whether a motion is the camera's: a single object does not cover most of the frame."""
    cell_N = (points_N2 / points_N2.max() * _CELLS).clip(0, _CELLS - 1).astype(int) @ [1, _CELLS]
    seen = np.bincount(cell_N, minlength=_CELLS**2)
    shares = np.bincount(cell_N, agree_N, minlength=_CELLS**2)[seen > 0] / seen[seen > 0]
    return bool((shares >= 0.5).sum() >= max(0.5 * len(shares), 0.3 * _CELLS**2))


def _mean(shifts_N2: NDArray[np.float64]) -> NDArray[np.float64] | None:
    lengths = np.linalg.norm(shifts_N2, axis=1)
    mean = np.asarray(shifts_N2.mean(axis=0), np.float64)
    return mean if np.linalg.norm(mean) >= 0.7 * lengths.mean() else None


def _follow(clip: Frames) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Corners of the first frame, (N, 2), and how far they move up to the last, (N, 2), pixels."""
    height, width = clip.shape[1:3]
    size = (_WIDTH, max(16, round(_WIDTH * height / width)))
    small = [cv2.resize(np.ascontiguousarray(frame), size) for frame in clip]
    greys = [np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), np.uint8) for frame in small]
    found: Any = cv2.goodFeaturesToTrack(greys[0], _POINTS, _CORNER, 4)
    if found is None:  # a picture without a corner
        return np.zeros((0, 2)), np.zeros((0, 2))
    start = found.reshape(-1, 1, 2)
    there, lost = _steps(greys, start)
    back, lost_again = _steps(greys[::-1], there)
    missed = np.linalg.norm((back - start).reshape(-1, 2), axis=1)
    kept = (missed < _RETURNS) & ~lost & ~lost_again
    places = start.reshape(-1, 2)[kept].astype(np.float64)
    return places, (there - start).reshape(-1, 2)[kept].astype(np.float64)


def _steps(greys: list[NDArray[np.uint8]], points: Any) -> tuple[Any, NDArray[np.bool_]]:
    """Track points (N, 1, 2) through frames: where they end, and which were lost, (N,)."""
    lost = np.zeros(len(points), bool)
    for before, after in itertools.pairwise(greys):
        points, found, _ = cv2.calcOpticalFlowPyrLK(
            before, after, points, np.empty_like(points), winSize=(15, 15), maxLevel=3
        )
        lost |= found.ravel() == 0
    return points, lost
