"""The default describer, which needs no network: names the motion that optical flow finds.

It finds moving pixels, not hands or doors, so the body is a region of a colour at a place, or the
whole scene when the camera moves. Directions are those of the pixels on the screen; distances are
in percent of the frame width. It needs no weights and draws no random numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mapo_lightning.semantics.describer import Reply
from mapo_lightning.semantics.motion import Similarity, colour_name, fit, put_into_words
from mapo_lightning.semantics.phrase import Phrase, format_phrase
from mapo_lightning.types import DescriberError, Frames

# One thread: the answer must not depend on the number of cores, and OpenCV's threads do not
# survive the fork of a DataLoader worker, which would wait for them forever.
cv2.setNumThreads(1)

Field = NDArray[np.float32]
Mask = NDArray[np.bool_]

_SIDE = 128  # short side of the picture the flow is computed on, pixels
_CELLS = 8  # the camera must be seen to move in most cells of a grid this wide and high
_TEXTURE = 1.5  # grey levels per pixel from which a pixel can be tracked at all
_TRACKED = 12  # textured pixels from which a region's motion is taken from them alone
_CANDIDATES = 3  # regions looked at, largest first


class FlowDescriber:
    """Names the dominant motion of a few frames in the five slots of the method.

    Args:
        min_percent: Smallest motion over the window that counts, in percent of the frame width.
        min_area: Smallest moving region that counts, as a fraction of the frame.
    """

    in_worker = True

    def __init__(self, min_percent: float = 0.7, min_area: float = 0.002) -> None:
        self.min_percent, self.min_area = min_percent, min_area
        self.name = f"flow-v1 side={_SIDE} min_percent={min_percent:g} min_area={min_area:g}"

    def describe(self, clips: Sequence[Frames]) -> list[Reply]:
        """Describe each window; see `Describer.describe`.

        Raises:
            DescriberError: A clip is not (T, H, W, 3) uint8.
        """
        return [Reply(self._describe_one(clip)) for clip in clips]

    def _describe_one(self, clip: Frames) -> str:
        if clip.ndim != 4 or clip.shape[-1] != 3 or clip.dtype != np.uint8 or not len(clip):
            raise DescriberError(
                f"a clip must be (T, H, W, 3) uint8, got {clip.dtype} {clip.shape}"
            )
        phrase = self._phrase(clip)
        return "null" if phrase is None else format_phrase(phrase)

    def _phrase(self, clip: Frames) -> Phrase | None:
        greys = _planes(clip)
        height, width = greys[0].shape
        least = self.min_percent / 100.0 * width  # pixels
        if len(greys) < 2 or all(np.array_equal(greys[0], grey) for grey in greys[1:]):
            return None
        field = _accumulate(greys)
        scene = _Scene(greys, field)
        camera = scene.camera(least)
        region = scene.region(camera, least, self.min_area * height * width)
        if region is not None:
            mask, motion = region
            size = float(np.sqrt(mask.sum()))
            body = _name_region(clip[0], mask)
            return put_into_words(motion, body, "scene background", least, size, width)
        if camera is None:
            return None
        return put_into_words(
            camera, "whole scene (camera)", "scene background", least, width, width
        )


class _Scene:
    """One window on the working size: first and last picture, and the motion between them."""

    def __init__(self, greys: Sequence[NDArray[np.uint8]], field: Field) -> None:
        self.first, self.last = (grey.astype(np.float32) for grey in (greys[0], greys[-1]))
        self.field = field
        self.grid = _grid(*self.first.shape)
        # Difference that remains after following the flow.
        self.missed = np.abs(_look_up(self.last, self.grid + field) - self.first)
        cells = cv2.resize(self.missed, (_CELLS, _CELLS), interpolation=cv2.INTER_AREA)
        self.noise = float(np.percentile(cells, 25))  # grey levels
        slope = np.hypot(cv2.Sobel(self.first, -1, 1, 0), cv2.Sobel(self.first, -1, 0, 1)) / 8.0
        self.textured: Mask = slope > max(_TEXTURE, 1.5 * self.noise)

    def camera(self, least: float) -> Similarity | None:
        """Motion shared by most of the picture, including its border; None if it stands still."""
        there = self.textured[2::4, 2::4]
        points = self.grid[2::4, 2::4][there].astype(np.float64)
        flow = self.field[2::4, 2::4][there].astype(np.float64)
        if len(points) < 16:
            return None
        motion, agree = fit(points, flow)
        moves = np.linalg.norm(motion.at(points), axis=1)
        if np.median(moves[agree]) < least if agree.any() else True:
            return None
        # An object alone before a plain wall fills few cells; a camera moves all that is textured.
        size = np.array([self.first.shape[1], self.first.shape[0]])
        cell = (points / size * _CELLS).astype(int) @ np.array([1, _CELLS])
        seen, moving = np.bincount(cell), np.bincount(cell[agree], minlength=cell.max() + 1)
        wide = np.count_nonzero(moving > 0) >= 0.4 * _CELLS**2
        return motion if wide and np.mean(moving[seen > 0] >= 0.5 * seen[seen > 0]) > 0.5 else None

    def region(
        self, camera: Similarity | None, least: float, min_area: float
    ) -> tuple[Mask, Similarity] | None:
        """Largest region that moves differently from the camera, and its motion."""
        rest = self.field.astype(np.float64)
        floor = least
        if camera is not None:
            sway = camera.at(self.grid.reshape(-1, 2).astype(np.float64)).reshape(rest.shape)
            rest = rest - sway
            # What a moving camera hides, uncovers or blurs looks like motion too: require more.
            pace = float(np.median(np.linalg.norm(sway, axis=2)))
            floor = max(1.5 * least, 1.2 * pace, 1.5)
            min_area = 5.0 * min_area
        speed = np.linalg.norm(rest, axis=2)
        moving = ((speed > 0.6 * floor) & self._explained()).astype(np.uint8)
        moving = cv2.morphologyEx(moving, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))
        moving = cv2.morphologyEx(moving, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
        count, parts = cv2.connectedComponents(moving)
        weight = np.bincount(parts.ravel(), weights=speed.ravel(), minlength=count)
        weight[0] = 0.0
        for part in np.argsort(weight)[: -_CANDIDATES - 1 : -1]:
            mask: Mask = parts == part
            if part == 0 or mask.sum() < min_area:
                continue
            # Flow is only a guess where nothing can be tracked: use edges and texture.
            sure = mask & self.textured
            if np.count_nonzero(sure) < _TRACKED:
                sure = mask
            points = self.grid[sure].astype(np.float64)
            motion, _ = fit(points, rest[sure])
            if np.percentile(np.linalg.norm(motion.at(points), axis=1), 75) > floor:
                return mask, motion
        return None

    def _explained(self) -> Mask:
        """Where following the flow makes the last picture resemble the first."""
        still = cv2.blur(np.abs(self.last - self.first), (9, 9))
        followed = cv2.blur(self.missed, (9, 9))
        explained: Mask = (still > 2.0 * self.noise + 1.0) & (followed < 0.8 * still)
        return explained


def _accumulate(greys: Sequence[NDArray[np.uint8]]) -> Field:
    """Displacement (h, w, 2) of every pixel of the first frame up to the last, pixels."""
    # Not kept: it is not safe for threads, cannot be pickled, and costs nothing to make.
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    flow.setFinestScale(1)
    grid = _grid(*greys[0].shape)
    total = np.zeros_like(grid)
    for before, after in itertools.pairwise(greys):
        step = flow.calc(before, after, np.zeros_like(total))
        total = total + _look_up(step, grid + total)
    return total


@lru_cache(maxsize=4)
def _grid(height: int, width: int) -> Field:
    """Place (x, y) of every pixel, (height, width, 2)."""
    grid = np.dstack(np.meshgrid(np.arange(width), np.arange(height))).astype(np.float32)
    grid.flags.writeable = False  # all pictures of this size share it
    return grid


def _look_up(picture: Any, at_HW2: Field) -> Field:
    """Values of a picture (H, W[, C]) at fractional places (x, y), as float32."""
    x, y = cv2.split(at_HW2)
    found = cv2.remap(picture, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(found, np.float32)


def _planes(clip: Frames) -> list[NDArray[np.uint8]]:
    """Brightness pictures of the working size, slightly blurred against sensor noise.

    A red object before a green wall of the same brightness is invisible in grey: in such a case the
    colour channel that changes most is used instead.
    """
    height, width = clip.shape[1:3]
    scale = _SIDE / min(height, width)
    size = (round(width * scale), round(height * scale))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    small = [cv2.resize(np.ascontiguousarray(f), size, interpolation=how) for f in clip]
    planes = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in small]
    change = cv2.absdiff(small[0], small[-1]).mean(axis=(0, 1))
    # Sensor noise is 1.5 times stronger in one channel than in grey: require clearly more.
    if change.max() > 2.0 * cv2.absdiff(planes[0], planes[-1]).mean() + 0.1:
        planes = [cv2.extractChannel(frame, int(change.argmax())) for frame in small]
    return [np.asarray(cv2.GaussianBlur(plane, (0, 0), 1.0), np.uint8) for plane in planes]


def _name_region(frame: NDArray[np.uint8], mask: Mask) -> str:
    """Colour, size and place of a region, such as ``small red region at the upper left``."""
    height, width = mask.shape
    small = cv2.resize(np.ascontiguousarray(frame), (width, height), interpolation=cv2.INTER_AREA)
    # Flow spills over an edge: the colour is that of the region's core.
    depth = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 3)
    middle = np.median(small[depth >= 0.5 * depth.max()], axis=0).astype(np.uint8)
    hue, saturation, value = cv2.cvtColor(middle[None, None], cv2.COLOR_RGB2HSV)[0, 0]
    y, x = np.argwhere(mask).mean(axis=0) / (height, width)
    row = "upper" if y < 1 / 3 else "lower" if y > 2 / 3 else ""
    column = "left" if x < 1 / 3 else "right" if x > 2 / 3 else ""
    place = " ".join(filter(None, (row, column))) or "centre"
    place = {"upper": "top", "lower": "bottom"}.get(place, place)
    share = mask.mean()
    size = "small" if share < 0.03 else "large" if share > 0.15 else "medium"
    return f"{size} {colour_name(int(hue), int(saturation), int(value))} region at the {place}"
