"""Where the frames of clips come from: decoded anew, or kept in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mapo_lightning.data.reader import read
from mapo_lightning.data.video_info import VideoInfo
from mapo_lightning.types import Frames

_AT_ONCE = 256  # frames: they are decoded at a larger size first


def read_all(info: VideoInfo, size: tuple[int, int], beside: int | None) -> Frames:
    """All frames of a video, piece by piece; see `reader.read`."""
    frames = np.empty((info.frames, *size, 3), np.uint8)
    for start in range(0, info.frames, _AT_ONCE):
        piece = range(start, min(start + _AT_ONCE, info.frames))
        frames[piece.start : piece.stop] = read(info, piece, size, beside)
    return frames


class FrameCache(Protocol):
    """Reads frames of one size."""

    keeps: bool
    """Whether what was decoded once is not decoded again."""

    def read(self, info: VideoInfo, indices: Sequence[int]) -> Frames:
        """Frames (T, height, width, 3) uint8 of a video, as `reader.read` gives them.

        Raises:
            VideoFileError: The video cannot be read.
        """
        ...


class MemoryCache:
    """Keeps the frames of a small set of videos in memory: of all of them, or of none.

    A set that does not fit is not kept in part: random clips would seldom find a frame again, and
    each video would be decoded as a whole for one clip.

    Args:
        videos: The set.
        size: (height, width) of the frames, in pixels.
        megabytes: Room for the frames of all videos; 0 keeps none.
        beside: See `reader.read`.
    """

    def __init__(
        self,
        videos: Sequence[VideoInfo],
        size: tuple[int, int],
        megabytes: int,
        beside: int | None = None,
    ) -> None:
        self.size, self.beside = size, beside
        needed = sum(info.frames for info in videos) * size[0] * size[1] * 3
        self.keeps = needed <= megabytes * 1_000_000
        self._kept: dict[str, Frames] = {}

    def read(self, info: VideoInfo, indices: Sequence[int]) -> Frames:
        """As `FrameCache.read`, of a video of the set."""
        if not self.keeps:
            return read(info, indices, self.size, self.beside)
        frames = self._kept.get(info.fingerprint)
        if frames is None:
            frames = read_all(info, self.size, self.beside)
            self._kept[info.fingerprint] = frames
        return frames[list(indices)]
