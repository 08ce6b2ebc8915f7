"""Video files: reads their headers and frames, and writes files that browsers can play."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import decord
import numpy as np

from mapo_lightning.data.video_info import (
    Reason,
    VideoFileError,
    VideoInfo,
    fingerprint,
    middle_square,
    target_size,
)
from mapo_lightning.files import atomic_write
from mapo_lightning.types import Frames, VideoError

__all__ = [
    "Reason",
    "VideoFileError",
    "VideoInfo",
    "check_video",
    "fingerprint",
    "probe_video",
    "read_frames",
    "resize",
    "write_mp4",
]

# OpenCV's threads do not survive a fork: a DataLoader worker would wait for them forever.
cv2.setNumThreads(1)

_MAX_PIXELS = 8192 * 4320
_MAX_FRAMES = 5_000_000
_CHUNK = 32  # frames decoded at once when a whole file is checked
_OVERSAMPLED = 4  # decode at most this many times larger than requested, then average
_DECORD_ERRORS = (RuntimeError, IndexError, decord.DECORDError)


def probe_video(path: Path) -> VideoInfo:
    """Read a video's header; decodes nothing.

    Raises:
        VideoFileError: The file is missing, no video, cut off, or absurdly large.
    """
    name = fingerprint(path)
    width, height, fps, promised = _header(path)
    if width * height > _MAX_PIXELS:
        raise VideoFileError(path, "too_large", f"its frames have {width}x{height} pixels")
    found = len(_open(path, None))
    if found > _MAX_FRAMES:
        raise VideoFileError(path, "too_large", f"it has {found} frames")
    # Some containers open "successfully" when cut off, and are merely shorter.
    if promised - found > max(2, 0.1 * promised):
        raise VideoFileError(path, "damaged", f"{found} of {promised} frames are there: cut off?")
    return VideoInfo(path, name, found, width, height, fps)


def _header(path: Path) -> tuple[int, int, float, int]:
    """(width, height, frames per second, promised frames or 0); before any decoder allocates."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoFileError(path, "no_video", "it holds no pictures, perhaps only sound")
            stream = container.streams.video[0]
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            promised = stream.frames
            if not promised and container.duration and rate:
                promised = int(container.duration / av.time_base * rate)
            return int(stream.width), int(stream.height), rate, promised
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoFileError(
            path, "unreadable", "it is not a video, or it is cut off; check it with ffprobe"
        ) from error


def _open(path: Path, size: tuple[int, int] | None) -> Any:
    """Open a decoder that gives frames of ``size`` (height, width), or of the file's size."""
    shape = {} if size is None else {"height": size[0], "width": size[1]}
    try:
        # One thread each: the parallelism is that of the DataLoader's workers.
        return decord.VideoReader(str(path), num_threads=1, **shape)
    except _DECORD_ERRORS as error:
        raise VideoFileError(
            path, "codec", "the decoder does not open it; convert it to H.264 in mp4"
        ) from error


def check_video(info: VideoInfo, max_undecodable: float) -> None:
    """Decode a whole video once and count what is lost.

    Args:
        info: The video.
        max_undecodable: Largest share of frames that may be exact repeats made by the decoder
            in place of broken ones, in [0, 1].

    Raises:
        VideoFileError: A frame cannot be decoded, or too many are such repeats.
    """
    reader, before, repeats = _open(info.path, (32, 32)), None, 0
    for first in range(0, info.frames, _CHUNK):
        indices = range(first, min(first + _CHUNK, info.frames))
        for frame in _decode(reader, info.path, indices):
            repeats += before is not None and np.array_equal(frame, before)
            before = frame
    # A scene that truly stands still repeats too: let a second decoder count the intact frames.
    if repeats > max_undecodable * info.frames:
        intact = _count_intact(info.path)
        if info.frames - intact > max_undecodable * info.frames:
            raise VideoFileError(
                info.path, "damaged", f"{info.frames - intact} of {info.frames} frames are lost"
            )


def _decode(reader: Any, path: Path, indices: Sequence[int]) -> Frames:
    try:
        frames: Frames = reader.get_batch(list(indices)).asnumpy()
    except _DECORD_ERRORS as error:
        raise VideoFileError(
            path, "damaged", f"decoding fails within frames {min(indices)}..{max(indices)}"
        ) from error
    return frames


def _count_intact(path: Path) -> int:
    intact = 0
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            try:
                intact += sum(not frame.is_corrupt for frame in packet.decode())
            except av.FFmpegError:
                continue  # a lost packet is what is being counted
    return intact


def read_frames(
    path: Path, indices: Sequence[int], size: int | tuple[int, int], square: bool = False
) -> Frames:
    """Decode frames, scaled down by averaging so that fine detail does not flicker.

    Args:
        path: The video.
        indices: Frame numbers, from 0, in any order.
        size: (height, width) in pixels, the aspect ratio is not kept; or the short side, the
            aspect ratio is kept.
        square: Cut the square in the middle out first.

    Returns:
        RGB frames (T, height, width, 3), uint8.

    Raises:
        VideoFileError: The file is missing or broken, or has fewer frames.
    """
    if not path.is_file():
        raise VideoFileError(path, "missing", "there is no such file")
    height, width = _source_size(path)
    kept = (min(height, width),) * 2 if square else (height, width)
    size = target_size(kept, size)
    # The decoder shrinks huge pictures, but leaves them large enough to average over.
    rows, columns = (min(1.0, _OVERSAMPLED * size[i] / kept[i]) for i in (0, 1))
    decoded = round(height * rows), round(width * columns)
    reader = _open(path, None if decoded == (height, width) else decoded)
    if max(indices) >= len(reader) or min(indices) < 0:
        raise VideoFileError(
            path,
            "too_short",
            f"frames {min(indices)}..{max(indices)} were requested, it has {len(reader)}; was it "
            "changed while in use? Start again to scan the folder anew",
        )
    frames = _decode(reader, path, indices)
    return resize(middle_square(frames) if square else frames, size)


@functools.lru_cache(maxsize=65536)
def _source_size(path: Path) -> tuple[int, int]:
    """(height, width) that the header states, pixels."""
    width, height, _, _ = _header(path)
    return height, width


def resize(frames: Frames, size: tuple[int, int]) -> Frames:
    """Scale frames (T, H, W, 3) to (T, height, width, 3), averaging when they shrink."""
    height, width = size
    if frames.shape[1:3] == (height, width):
        return frames
    shrinks = height <= frames.shape[1] and width <= frames.shape[2]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    scaled = [cv2.resize(frame, (width, height), interpolation=how) for frame in frames]
    return np.stack(scaled).astype(np.uint8, copy=False)


def write_mp4(path: Path | None, frames: Frames, fps: float) -> bytes:
    """Write a video that every browser plays: H.264, yuv420p, index at the front.

    Args:
        path: File to write, as a whole; None to get the bytes only.
        frames: RGB, (T, H, W, 3) uint8; an odd last row or column is repeated once.
        fps: Frames per second.

    Returns:
        The file's bytes.

    Raises:
        VideoError: The frames are not (T, H, W, 3) uint8 with T >= 1.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise VideoError(f"a video needs (T, H, W, 3) uint8, got {frames.dtype} {frames.shape}")
    if path is None:
        with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
            _encode(Path(file.name), frames, fps)
            return Path(file.name).read_bytes()
    with atomic_write(path) as draft:
        _encode(draft, frames, fps)
        return draft.read_bytes()


def _encode(path: Path, frames: Frames, fps: float) -> None:
    odd_h, odd_w = frames.shape[1] % 2, frames.shape[2] % 2
    even = np.pad(frames, ((0, 0), (0, odd_h), (0, odd_w), (0, 0)), mode="edge")
    rate = Fraction(fps).limit_denominator(1000)
    # The index goes before the frames, so that a browser can start at once. For that FFmpeg
    # rewrites the file, which a buffer in memory does not allow.
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = even.shape[1], even.shape[2], "yuv420p"
        stream.options = {"crf": "18", "preset": "veryfast"}
        stream.codec_context.thread_count = 1
        for frame in even:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
