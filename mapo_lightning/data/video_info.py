"""What the header of a video says, and why a video may be unusable."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mapo_lightning.types import Frames, VideoError

Reason = Literal[
    "missing",  # no such file, or not a file
    "empty",  # zero bytes
    "unreadable",  # not a video, cut off, or no permission
    "no_video",  # only sound or subtitles
    "codec",  # a video in a format the decoder does not know
    "damaged",  # opens, but frames cannot be decoded, are lost, or differ in size
    "too_short",  # fewer frames than a clip needs
    "too_large",  # larger than any plausible training video
    "outside",  # a link that leads out of the video folder
]
"""Why a video cannot be used."""

_HASHED = 1 << 16  # bytes of head and of tail that identify a file


class VideoFileError(VideoError):
    """One video cannot be used.

    Args:
        path: The file, or the name of a run of images.
        reason: Category of the cause.
        detail: What was found and what to do.
    """

    def __init__(self, path: Path, reason: Reason, detail: str) -> None:
        super().__init__(f"cannot use video '{path}': {detail}")
        self.path, self.reason, self.detail = path, reason, detail

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle all parts, to travel between DataLoader processes."""
        return type(self), (self.path, self.reason, self.detail)


class VideoInfo(NamedTuple):
    """What is known about a readable video without decoding its frames."""

    path: Path
    """The file; or a run of images, with ``%06d`` in place of their numbers."""
    fingerprint: str
    """Hash of the content, wherever it lies, and of which frames of it are used."""
    frames: int
    """Number of frames."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    fps: float
    """Frames per second; 0.0 if unknown."""
    label: str = ""
    """Class that the data set assigns, as text; never shown to a model."""
    numbers: range | None = None
    """Frame t is number ``numbers[t]`` of the file or of the images; None: number t."""
    square: bool = False
    """Only the square in the middle of the picture is used."""


def fingerprint(path: Path) -> str:
    """Hash a file's size, first and last 64 KiB.

    Raises:
        VideoFileError: The file is missing, empty or cannot be opened.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            digest = hashlib.blake2b(str(size).encode(), digest_size=16)
            digest.update(file.read(_HASHED))
            file.seek(max(0, size - _HASHED))
            digest.update(file.read(_HASHED))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise VideoFileError(path, "missing", "there is no such file") from error
    except OSError as error:
        raise VideoFileError(path, "unreadable", f"{error.strerror}") from error
    if size == 0:
        raise VideoFileError(path, "empty", "it has no bytes; copy it again")
    return digest.hexdigest()


def target_size(have: tuple[int, int], wanted: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) for a picture of size ``have``; an int is the short side, at equal aspect."""
    if not isinstance(wanted, int):
        return wanted
    return round(have[0] * wanted / min(have)), round(have[1] * wanted / min(have))


def middle_square(frames: Frames) -> Frames:
    """Cut (T, H, W, 3) to the square in the middle, (T, S, S, 3) with S = min(H, W)."""
    height, width = frames.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return frames[:, top : top + side, left : left + side]
