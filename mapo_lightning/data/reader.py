"""Reads frames by index, from a video file or from numbered images."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mapo_lightning.data import image_sequence, video
from mapo_lightning.data.video_info import (
    USUAL,
    Limits,
    VideoFileError,
    VideoInfo,
    fingerprint,
    printable,
)
from mapo_lightning.types import Frames

_EARLY = 0.25  # how long before its time stamp a frame counts as shown, in frames


class FrameSource(NamedTuple):
    """Where the frames of one video come from: a file, or images with their numbers."""

    path: Path
    numbers: range | None = None

    def fingerprint(self) -> str:
        """Hash that names the content.

        Raises:
            VideoFileError: It is missing or cannot be opened.
        """
        if self.numbers is None:
            return fingerprint(self.path)
        return image_sequence.fingerprint_run(self.path, self.numbers)

    def state(self) -> list[object]:
        """Sizes and dates of the files: while they stay the same, so does the content.

        Empty if a file cannot be looked at.
        """
        try:
            if self.numbers is not None:
                return [image_sequence.state_of_run(self.path, self.numbers)]
            stat = self.path.stat()
        except OSError:
            return []
        return [stat.st_size, stat.st_mtime_ns]

    def examine(
        self,
        max_undecodable: float,
        limits: Limits = USUAL,
    ) -> VideoInfo:
        """Decode all of it once.

        Args:
            max_undecodable: Share of lost frames that a video file may have, in [0, 1].
            limits: What its header may promise.

        Raises:
            VideoFileError: It cannot be used.
        """
        if self.numbers is None:
            found = video.probe_video(self.path, limits)
            return video.check_video(found, max_undecodable, limits)
        info = image_sequence.probe_run(self.path, self.numbers, limits)
        image_sequence.check_run(info)
        return info


def locate(path: Path, numbers: Sequence[int] = ()) -> FrameSource:
    """Find the frames of a video.

    Args:
        path: A video file, a folder of images, or the name of a run of images.
        numbers: Numbers of the images of a run, ascending; of a folder they are looked up.

    Raises:
        VideoFileError: The folder holds no run of images, or images are missing in between.
    """
    if path.is_dir():
        path, numbers = image_sequence.find_run(path)
    if not image_sequence.is_run(path):
        return FrameSource(path)
    return FrameSource(path, image_sequence.even_numbers(path, numbers))


def thin_out(info: VideoInfo, rate: float | None, square: bool) -> VideoInfo:
    """Reduce a video to a lower frame rate, or to the square in its middle.

    Args:
        info: The video with all its frames.
        rate: Frames per second; None: all frames. Evenly spaced frames are thinned out by whole
            steps. Others are taken as they are shown at times ``1 / rate`` apart: one that is
            shown for longer is taken several times. A video of unknown rate keeps all its frames.
        square: See `VideoInfo`.

    Returns:
        The video, with another fingerprint if it shows anything else than before.

    Raises:
        VideoFileError: Its time stamps span more frames of that rate than any video has.
    """
    whole = range(info.frames) if info.numbers is None else info.numbers
    numbers, fps, seen = whole, info.fps, "every 1"
    if rate and info.times:
        numbers, fps = _at_rate(info, rate), rate
        seen = hashlib.blake2b(np.array(numbers, "<i8").tobytes(), digest_size=16).hexdigest()
    elif rate and info.fps:
        step = max(1, round(info.fps / rate))
        numbers, fps, seen = whole[::step], info.fps / step, f"every {step}"
    # Repeated frames may be as many as dropped ones: their count alone says nothing.
    if list(numbers) == list(whole) and not square:
        return info
    name = hashlib.blake2b(
        f"{info.fingerprint} {seen}, square {square}".encode(), digest_size=16
    ).hexdigest()
    return info._replace(
        fingerprint=name, frames=len(numbers), fps=fps, numbers=numbers, square=square, times=None
    )


def _at_rate(info: VideoInfo, rate: float) -> tuple[int, ...]:
    """Numbers of the frames that are shown at 0, 1 / rate, 2 / rate ... seconds.

    The first tick that shows the last frame is the last tick.
    """
    shown = np.array(info.times, np.float64) / 1000
    gaps = np.diff(shown)
    # Time stamps are rounded and jitter: a frame counts from a little before its own.
    early = _EARLY * np.minimum(gaps, min(float(np.median(gaps)), 1 / rate))
    begins = np.concatenate([shown[:1], shown[1:] - early])
    last = math.ceil(begins[-1] * rate - 1e-6)
    if last >= USUAL.frames:
        detail = f"its time stamps span {shown[-1]:.0f} s: {last} frames at {rate:g} per second"
        raise VideoFileError(info.path, "too_large", detail)
    ticks = np.arange(last + 1) / rate + 1e-9
    return tuple((np.searchsorted(begins, ticks, side="right") - 1).tolist())


def read(
    info: VideoInfo,
    indices: Sequence[int],
    size: int | tuple[int, int],
    beside: int | tuple[int, int] | None = None,
) -> Frames:
    """Read frames of a video, scaled down by averaging; see `video.read_video`.

    Args:
        info: The video.
        indices: Frames, from 0 to ``info.frames - 1``, in any order.
        size: (height, width) in pixels; or the short side, which keeps the aspect ratio.
        beside: Another size, for which frames of the video are read too at times: then these are
            to the bit what `read_sizes` gives.

    Returns:
        RGB frames (T, height, width, 3), uint8.

    Raises:
        VideoFileError: The file or an image is missing or broken, or an index is out of range.
    """
    more: list[video.Wanted] = [] if beside is None else [((), beside)]
    return read_sizes(info, [(indices, size), *more])[0]


def read_sizes(info: VideoInfo, wanted: Sequence[video.Wanted]) -> list[Frames]:
    """Read frames at several sizes: each frame is decoded once, and a file opened once.

    Args:
        info: The video.
        wanted: Frames and the size of each row of them; arguments as of `read`.
    """
    if info.numbers is not None:
        wanted = [(_numbers(info, indices), size) for indices, size in wanted]
    if image_sequence.is_run(info.path):
        return image_sequence.read_run(info, wanted)
    return video.read_sizes(info, wanted)


def name_window(info: VideoInfo, window: range, size: int) -> tuple[str, str]:
    """Name a window of frames twice: by its content, and for people.

    Args:
        info: The video.
        window: Frames of the video.
        size: Short side that they are read at, in pixels.

    Returns:
        Its identity; and the file's name with the frame numbers of the file itself, which differ
        from those of the video where frames were left out.
    """
    own = numbers_in_file(info, window)
    steps = {later - earlier for earlier, later in pairwise(own)} or {window.step}
    seen = f"frames {window[0]}..{window[-1]} step {window.step}"
    shown = f"frames {own[0]}..{own[-1]} step {min(steps)}"
    if len(steps) > 1 or min(steps) < 1:  # taken by time stamps: uneven, or repeated
        shown = f"frames {', '.join(map(str, own))}"
    return f"{info.fingerprint} {seen} size {size}", f"{printable(info.path.name)} {shown}"


def numbers_in_file(info: VideoInfo, window: range) -> Sequence[int]:
    """The numbers that frames of a video have in its file, or among its images."""
    if info.numbers is None:
        return window
    return info.numbers[window.start : window.stop : window.step]


def _numbers(info: VideoInfo, indices: Sequence[int]) -> list[int]:
    assert info.numbers is not None
    if not indices:
        return []
    if min(indices) < 0 or max(indices) >= info.frames:
        detail = f"frames {min(indices)}..{max(indices)} were requested, it has {info.frames}"
        raise VideoFileError(info.path, "too_short", detail)
    return [info.numbers[index] for index in indices]
