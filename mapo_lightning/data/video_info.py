"""What the header of a video says, and why a video may be unusable."""

from __future__ import annotations

import hashlib
import math
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from mapo_lightning.types import Frames, VideoError

Reason = Literal[
    "missing",  # no such file, or not a file
    "empty",  # zero bytes
    "unreadable",  # not a video, or cut off
    "inaccessible",  # no permission, an I/O error, no memory: no fault of the content
    "no_video",  # only sound or subtitles
    "codec",  # a video in a format the decoder does not know
    "damaged",  # opens, but frames cannot be decoded, are lost, or differ in size
    "too_short",  # fewer frames than a clip needs
    "too_large",  # more than one of data.limits
    "outside",  # a link that leads out of the video folder
]
"""Why a video cannot be used."""

OF_THE_CONTENT = frozenset(
    {"empty", "unreadable", "no_video", "codec", "damaged", "too_short", "too_large"}
)
"""Reasons that stay true as long as the content stays the same."""

_BLOCK = 1 << 20  # bytes hashed at once


class VideoFileError(VideoError):
    """One video cannot be used.

    Args:
        path: The file, or the name of a run of images.
        reason: Category of the cause.
        detail: What was found and what to do.
    """

    def __init__(self, path: Path, reason: Reason, detail: str) -> None:
        super().__init__(f"cannot use video '{printable(path)}': {detail}")
        self.path, self.reason, self.detail = path, reason, detail

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle all parts, to travel between DataLoader processes."""
        return type(self), (self.path, self.reason, self.detail)


def inaccessible(path: Path, error: BaseException) -> VideoFileError:
    """The error for a file that could not be read just now, whatever it holds."""
    detail = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return VideoFileError(path, "inaccessible", f"reading it fails: {detail}")


class Limits(NamedTuple):
    """What the header of a video may promise; compared before anything of that size is allocated.

    `LimitsConfig` in ``settings.py`` says what each is.
    """

    pixels: int = 8192 * 4320
    frames: int = 1_000_000
    hours: float = 24.0

    def check_size(self, path: Path, width: int, height: int) -> None:
        """Refuse larger frames.

        Raises:
            VideoFileError: One frame has more pixels.
        """
        if width * height > self.pixels:
            detail = (
                f"its frames have {width}x{height} pixels, and data.limits.pixels is {self.pixels}"
            )
            raise VideoFileError(path, "too_large", detail)

    def check_length(self, path: Path, frames: int, seconds: float = 0.0) -> None:
        """Refuse longer videos.

        Raises:
            VideoFileError: There are more frames, or they last longer.
        """
        if frames > self.frames:
            detail = f"it has {frames} frames, and data.limits.frames is {self.frames}"
            raise VideoFileError(path, "too_large", detail)
        if seconds > 3600 * self.hours:
            detail = f"it lasts {seconds / 3600:.1f} hours, and data.limits.hours is {self.hours:g}"
            raise VideoFileError(path, "too_large", detail)


USUAL = Limits()
"""The limits of videos that no setting speaks of."""


class Geometry(NamedTuple):
    """How the stored pixels of a video lie on the screen."""

    height: int
    """Stored rows."""
    width: int
    """Stored columns."""
    pixel_aspect: float = 1.0
    """Width of a stored pixel divided by its height."""
    transposed: bool = False
    """Rows become columns first."""
    upside_down: bool = False
    """Then the order of the rows is reversed."""
    mirrored: bool = False
    """Then the order of the columns is reversed."""

    def turned(self) -> tuple[int, int]:
        """(rows, columns) after turning and mirroring."""
        return (self.width, self.height) if self.transposed else (self.height, self.width)

    def shown(self) -> tuple[int, int]:
        """(height, width) on the screen, in square pixels."""
        wide = max(1, round(self.width * self.pixel_aspect))
        return (wide, self.height) if self.transposed else (self.height, wide)

    def turn(self, frames: Frames) -> Frames:
        """Turn and mirror stored frames (T, H, W, 3) the way that a player shows them."""
        if self.transposed:
            frames = frames.swapaxes(1, 2)
        rows, columns = (-1 if flip else 1 for flip in (self.upside_down, self.mirrored))
        return np.ascontiguousarray(frames[:, ::rows, ::columns])


class Entry(NamedTuple):
    """A place in a file from which decoding was seen to give the right frames."""

    stamp: int
    """Time stamp to seek to, in the track's own unit."""
    skip: int
    """Frames to drop after seeking."""
    first: int
    """Number of the frame that follows them."""


class Access(NamedTuple):
    """How frames of a file are reached; proved by decoding the file in order."""

    decoder: Literal["decord", "pyav"]
    geometry: Geometry
    entries: tuple[Entry, ...] = ()
    """Places beside the start where PyAV may begin, by frame; decord knows its own."""
    why: str = ""
    """Why the file is not read by decord."""
    seconds: float = 0.0
    """Measured time of reading a clip from the middle of a file that decord does not read."""
    seconds_decord: float = 0.0
    """The same for decord, whatever frames it gave; 0.0 if it does not open the file."""


class Caption(NamedTuple):
    """A sentence that comes with a video, and when it holds."""

    text: str
    start: float = 0.0
    """Seconds from the first frame, or the number of the frame in its file."""
    end: float = math.inf
    """The first moment, or the number of the first frame, that it does not hold for."""
    in_frames: bool = False
    where: str = ""
    """For messages: the file and the line that it is from."""


class VideoInfo(NamedTuple):
    """What is known about a readable video."""

    path: Path
    """The file; or a run of images, with ``%06d`` in place of their numbers."""
    fingerprint: str
    """Hash of the content, wherever it lies, and of which frames of it are used."""
    frames: int
    """Number of frames that are shown; frame i is the i-th of them."""
    width: int
    """Square pixels, as shown: turned and stretched as the header says."""
    height: int
    """The same."""
    fps: float
    """Frames per second, on average; 0.0 if unknown."""
    label: str = ""
    """Class that the data set assigns, as text; never shown to a model."""
    numbers: range | tuple[int, ...] | None = None
    """Frame t is number ``numbers[t]`` of the file or of the images, ascending; one that is shown
    for long may be there several times. None: number t."""
    square: bool = False
    """Only the square in the middle of the picture is used."""
    access: Access | None = None
    """How the file is read; None: not examined yet, or images."""
    times: tuple[int, ...] | None = None
    """Time of every frame of the file, in milliseconds from the first; None: evenly spaced."""
    captions: tuple[Caption, ...] = ()
    """Sentences about it, by their start; only where describers read them."""


def printable(path: Path | str) -> str:
    """The name of a file as text that every log and report can hold, whatever its bytes are."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def fingerprint(path: Path) -> str:
    """Hash the whole content of a file; it is read again only if its size or date has changed.

    Raises:
        VideoFileError: The file is missing, empty or cannot be read.
    """
    try:
        stat = path.stat()
        if path.is_dir():
            raise VideoFileError(path, "missing", "it is a folder, not a file")
        if stat.st_size == 0:
            raise VideoFileError(path, "empty", "it has no bytes; copy it again")
        return _hash(path, stat.st_size, stat.st_mtime_ns)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise VideoFileError(path, "missing", "there is no such file") from error
    except OSError as error:
        raise inaccessible(path, error) from error


@lru_cache(maxsize=4096)
def _hash(path: Path, size: int, date: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def target_size(have: tuple[int, int], wanted: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) for a picture of size ``have``; an int is the short side, at equal aspect."""
    if not isinstance(wanted, int):
        return wanted
    return round(have[0] * wanted / min(have)), round(have[1] * wanted / min(have))


def middle(frames: Frames, height: int, width: int) -> Frames:
    """Cut (T, H, W, 3) to ``height`` x ``width`` pixels in the middle."""
    top, left = (frames.shape[1] - height) // 2, (frames.shape[2] - width) // 2
    return frames[:, top : top + height, left : left + width]


def middle_square(frames: Frames) -> Frames:
    """Cut (T, H, W, 3) to the square in the middle, (T, S, S, 3) with S = min(H, W)."""
    side = min(frames.shape[1:3])
    return middle(frames, side, side)
