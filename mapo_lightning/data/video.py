"""Video files: reads their headers and frames, and writes files that browsers can play."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TypeAlias

import av
import cv2
import numpy as np

from mapo_lightning.data import container, random_access
from mapo_lightning.data.container import (
    Header,
    decode_in_order,
    find_entries,
    read_by_entries,
    read_header,
)
from mapo_lightning.data.random_access import (
    decode_frames,
    differs,
    open_decord,
    prove_decord,
)
from mapo_lightning.data.video_info import (
    USUAL,
    Access,
    Limits,
    Reason,
    VideoFileError,
    VideoInfo,
    fingerprint,
    middle,
    target_size,
)
from mapo_lightning.files import atomic_write
from mapo_lightning.types import Frames, VideoError

__all__ = [
    "DECODERS",
    "FILM_HEIGHT",
    "SCALER",
    "Reason",
    "VideoFileError",
    "VideoInfo",
    "Wanted",
    "check_video",
    "fingerprint",
    "probe_video",
    "read_frames",
    "read_sizes",
    "read_video",
    "resize",
    "rows_of",
    "write_mp4",
]

FILM_HEIGHT = 256
"""Rows of a recorded film: what an agent sees is too small to look at."""

DECODERS = f"{container.VERSION}, {random_access.VERSION}"
"""The decoders that examine files; another version may treat a file otherwise."""

SCALER = f"cv2 {cv2.__version__}"
"""What frames are averaged with."""

# OpenCV's threads do not survive a fork: a DataLoader worker would wait for them forever.
cv2.setNumThreads(1)

Wanted: TypeAlias = tuple[Sequence[int], int | tuple[int, int]]
"""Numbers of frames, and the size that they are read at; see `read_video`."""

_OVERSAMPLED = 4  # decode at most this many times larger than requested, then average
_CLIP = 25  # frames of the clip whose reading is timed


def probe_video(path: Path, limits: Limits = USUAL) -> VideoInfo:
    """Read a video's header, packets and first frame.

    Args:
        path: The file.
        limits: What its header may promise.

    Raises:
        VideoFileError: The file is missing, no video, cut off, or larger than ``limits``.
    """
    name, header = fingerprint(path), _header(path, limits)
    height, width = header.geometry.shown()
    limits.check_size(path, header.geometry.width, header.geometry.height)
    frames = header.packets - header.hidden
    return VideoInfo(path, name, frames, width, height, header.fps, times=header.times)


def _header(path: Path, limits: Limits = USUAL) -> Header:
    """`read_header`, remembered as long as the file is not changed."""
    try:
        stat = path.stat()
    except OSError as error:
        raise VideoFileError(path, "missing", "there is no such file") from error
    return _header_once(path, stat.st_size, stat.st_mtime_ns, limits)


@functools.lru_cache(maxsize=64)
def _header_once(path: Path, size: int, date: int, limits: Limits) -> Header:
    return read_header(path, limits)


def check_video(
    info: VideoInfo,
    max_undecodable: float,
    limits: Limits = USUAL,
) -> VideoInfo:
    """Decode a whole video, count what is lost, and find out how to reach each of its frames.

    decord reads the video if it passes `prove_decord`. Otherwise PyAV does, from the start or
    from a key frame behind which it was seen to decode the right frames.

    Args:
        info: The video, from `probe_video`.
        max_undecodable: Largest share of frames that may be lost, or exact repeats made by the
            decoder in place of broken ones, in [0, 1].
        limits: As given to `probe_video`.

    Returns:
        The video with ``access``, and with the frames that it really shows.

    Raises:
        VideoFileError: Too many frames are lost.
    """
    path, header = info.path, _header(info.path, limits)
    proof = prove_decord(path, header)
    trusted = info._replace(access=Access("decord", header.geometry))
    if not proof.why and not proof.repeats:
        return trusted
    # A scene that truly stands still repeats too: let a second decoder look at the frames.
    film = decode_in_order(path, header.geometry)
    promised, shown = header.packets - header.hidden, len(film.marks)
    lost = promised - (shown - film.corrupt)
    if proof.broken and lost:
        raise VideoFileError(path, "damaged", proof.why)
    if not shown or lost > max_undecodable * promised:
        raise VideoFileError(path, "damaged", f"{lost} of {promised} frames are lost")
    why = proof.why if proof.thumbs is None else differs(proof.thumbs, film.thumbs)
    if not why:
        return trusted
    access = Access("pyav", header.geometry, find_entries(path, header.geometry, film), why)
    # Without one packet per frame, the stamps of the packets are not those of the frames.
    times = header.times if shown == promised else None
    return _timed(info._replace(frames=shown, times=times, access=access), access)


def _timed(info: VideoInfo, access: Access) -> VideoInfo:
    """Measure what reading a clip costs on the slower way, and what it would with decord."""
    first = info.frames // 2
    indices = range(first, min(first + _CLIP, info.frames))
    began = time.perf_counter()
    read_video(info, indices, (64, 64))
    ours, began = time.perf_counter() - began, time.perf_counter()
    try:
        reader = open_decord(info.path, (256, 256))
        decode_frames(reader, info.path, [n for n in indices if n < len(reader)])
        decords = time.perf_counter() - began
    except (VideoFileError, UnicodeEncodeError):
        decords = 0.0
    return info._replace(access=access._replace(seconds=ours, seconds_decord=decords))


def read_frames(
    path: Path, indices: Sequence[int], size: int | tuple[int, int], square: bool = False
) -> Frames:
    """Read frames of a file that no scan has examined; it is examined once per process.

    Args:
        path: The video.
        indices: Frame numbers, from 0, in any order.
        size: See `read_video`.
        square: Cut the square in the middle out first.

    Returns:
        RGB frames (T, height, width, 3), uint8.

    Raises:
        VideoFileError: The file is missing or broken, or has fewer frames.
    """
    return read_video(_examined(path)._replace(square=square), indices, size)


def _examined(path: Path) -> VideoInfo:
    try:
        stat = path.stat()
    except OSError as error:
        raise VideoFileError(path, "missing", "there is no such file") from error
    return _examined_once(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _examined_once(path: Path, size: int, date: int) -> VideoInfo:
    return check_video(probe_video(path), 1.0)


def read_video(info: VideoInfo, indices: Sequence[int], size: int | tuple[int, int]) -> Frames:
    """Decode frames, scaled down by averaging so that fine detail does not flicker.

    Args:
        info: The video, examined by `check_video`; otherwise it is examined first.
        indices: Numbers of the frames in the file, from 0, in any order; ``info.numbers`` is not
            looked at.
        size: (height, width) in pixels, the aspect ratio is not kept; or the short side, the
            aspect ratio is kept.

    Returns:
        RGB frames (T, height, width, 3), uint8, as a player shows them.

    Raises:
        VideoFileError: The file is missing or broken, or has fewer frames.
    """
    return read_sizes(info, [(indices, size)])[0]


def read_sizes(info: VideoInfo, wanted: Sequence[Wanted]) -> list[Frames]:
    """Decode frames for several sizes in one go, each of them once; see `read_video`.

    The size that they are decoded at depends on all of the sizes: frames of one size are the same
    whichever numbers of the others are asked for, if only none.
    """
    path, access = info.path, info.access or _examined(info.path).access
    assert access is not None
    if not path.is_file():
        raise VideoFileError(path, "missing", "there is no such file")
    indices = sorted({index for numbers, _ in wanted for index in numbers})
    if indices[0] < 0:
        raise _beyond(path, indices, info.frames)
    shown, turned = access.geometry.shown(), access.geometry.turned()
    kept = (min(shown),) * 2 if info.square else shown
    sizes = [target_size(kept, size) for _, size in wanted]
    # The part that is kept, in rows and columns of the file.
    part = [turned[i] * kept[i] / shown[i] for i in (0, 1)]
    # The decoder shrinks huge pictures, but leaves them large enough to average over.
    largest = [max(size[i] for size in sizes) for i in (0, 1)]
    scale = [min(1.0, _OVERSAMPLED * largest[i] / part[i]) for i in (0, 1)]
    decoded = round(turned[0] * scale[0]), round(turned[1] * scale[1])
    # A copy under a name that decord cannot open shares the proof: content is examined once.
    if access.decoder == "pyav" or not container.is_utf8(path):
        if indices[-1] >= info.frames and info.numbers is None:
            raise _beyond(path, indices, info.frames)
        frames = read_by_entries(path, access, indices, decoded)
    else:
        reader = open_decord(path, None if decoded == turned else decoded)
        if indices[-1] >= len(reader):
            raise _beyond(path, indices, len(reader))
        frames = decode_frames(reader, path, indices)
    if info.square:
        frames = middle(frames, round(part[0] * scale[0]), round(part[1] * scale[1]))
    return [
        resize(rows_of(frames, indices, numbers), size)
        for (numbers, _), size in zip(wanted, sizes, strict=True)
    ]


def rows_of(frames: Frames, indices: Sequence[int], numbers: Sequence[int]) -> Frames:
    """Those with certain numbers among frames (T, H, W, 3) that have ascending ``indices``."""
    if list(numbers) == list(indices):
        return frames
    return frames[np.searchsorted(indices, np.array(numbers, np.int64))]


def _beyond(path: Path, indices: Sequence[int], frames: int) -> VideoFileError:
    detail = (
        f"frames {min(indices)}..{max(indices)} were requested, it has {frames}; was it "
        "changed while in use? Start again to scan the folder anew"
    )
    return VideoFileError(path, "too_short", detail)


def resize(frames: Frames, size: tuple[int, int]) -> Frames:
    """Scale frames (T, H, W, 3) to (T, height, width, 3), averaging when they shrink."""
    height, width = size
    if frames.shape[1:3] == (height, width):
        return frames
    if not len(frames):
        return np.empty((0, height, width, 3), np.uint8)
    shrinks = height <= frames.shape[1] and width <= frames.shape[2]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    scaled = [cv2.resize(frame, (width, height), interpolation=how) for frame in frames]
    return np.stack(scaled).astype(np.uint8, copy=False)


def write_mp4(path: Path | None, frames: Frames, fps: float, height: int = 0) -> bytes:
    """Write a video that every browser plays: H.264, yuv420p, index at the front.

    Args:
        path: File to write, as a whole; None to get the bytes only.
        frames: RGB, (T, H, W, 3) uint8; an odd last row or column is repeated once.
        fps: Frames per second.
        height: Rows that the film has at least: lower frames are enlarged to it. A pixel becomes a
            square of pixels where ``height`` is a multiple of H; otherwise frames are resampled
            (Lanczos).

    Returns:
        The file's bytes.

    Raises:
        VideoError: The frames are not (T, H, W, 3) uint8 with T >= 1.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise VideoError(f"a video needs (T, H, W, 3) uint8, got {frames.dtype} {frames.shape}")
    if path is None:
        with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
            _encode(Path(file.name), frames, fps, height)
            return Path(file.name).read_bytes()
    with atomic_write(path) as draft:
        _encode(draft, frames, fps, height)
        return draft.read_bytes()


def _encode(path: Path, frames: Frames, fps: float, height: int) -> None:
    first = _shown(frames[0], height)
    rate = Fraction(fps).limit_denominator(1000)
    # The index goes before the frames, so that a browser can start at once. For that FFmpeg
    # rewrites the file, which a buffer in memory does not allow.
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as file:
        stream = file.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = first.shape[0], first.shape[1], "yuv420p"
        stream.options = {"crf": "18", "preset": "veryfast"}
        stream.codec_context.thread_count = 1
        for frame in frames:  # one by one: a whole film, enlarged, would take hundreds of megabytes
            picture = av.VideoFrame.from_ndarray(_shown(frame, height), format="rgb24")
            file.mux(stream.encode(picture))
        file.mux(stream.encode())


def _shown(frame: Frames, height: int) -> Frames:
    """A frame (H, W, 3), enlarged to ``height`` rows if it has fewer, and to even sides."""
    rows, columns = frame.shape[:2]
    if rows < height:
        exact = height % rows == 0
        size = (max(1, round(columns * height / rows)), height)
        frame = np.asarray(
            cv2.resize(
                frame, size, interpolation=cv2.INTER_NEAREST if exact else cv2.INTER_LANCZOS4
            ),
            np.uint8,
        )
    odd_h, odd_w = frame.shape[0] % 2, frame.shape[1] % 2
    return np.ascontiguousarray(np.pad(frame, ((0, odd_h), (0, odd_w), (0, 0)), mode="edge"))
