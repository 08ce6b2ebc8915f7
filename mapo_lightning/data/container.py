"""What FFmpeg finds in a video file: its header, its packets, and its frames in order (PyAV)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from mapo_lightning.data.video_info import (
    USUAL,
    Access,
    Entry,
    Geometry,
    Limits,
    VideoFileError,
    inaccessible,
)
from mapo_lightning.types import Frames

VERSION = f"PyAV {av.__version__}"
"""What a proof of access was made with."""

THUMB = 32
"""Height and width of the frames that are compared, pixels."""

_FORMATS = "asf,avi,flv,m4v,matroska,mov,mpeg,mpegts,ogg,webm"
"""FFmpeg's names of what is opened: containers of pictures, and no playlist that names others."""

_SHORT = 0.1  # share of the duration that may be missing before a file counts as cut off
_CHECKED = 17  # frames compared behind each entry: more than any codec reorders


class Header(NamedTuple):
    """What is known about a file after reading it without decoding more than one frame."""

    geometry: Geometry
    fps: float
    """Frames per second, on average; 0.0 if unknown."""
    packets: int
    """Packets of the video track."""
    hidden: int
    """Packets that are decoded and not shown: cut off by an edit list, or VP8's references."""
    stamped: bool
    """Every packet has a time stamp of its own."""
    times: tuple[int, ...] | None
    """Time of every frame in milliseconds, if they are not evenly spaced."""
    tracks: int
    """Video tracks."""


class Film(NamedTuple):
    """All frames of a file, decoded in order from the start."""

    marks: list[tuple[int | None, bytes]]
    """Time stamp and hash of every frame."""
    thumbs: Frames
    """(T, 16, 16) uint8, grey, as shown."""
    keys: list[int]
    """Numbers of the key frames."""
    corrupt: int
    """How many of them FFmpeg calls corrupt."""


@contextmanager
def open_track(path: Path, limits: Limits = USUAL) -> Iterator[tuple[Any, Any]]:
    """Open a file and choose the video track that players show.

    Args:
        path: The file.
        limits: What its header may promise; larger frames are not decoded either, should the
            frames themselves say something else than the header.

    Yields:
        The container and the stream, which decodes in one thread.

    Raises:
        VideoFileError: The file cannot be opened, holds no video, or promises too much.
    """
    bounds = {"max_pixels": str(limits.pixels)}
    with ExitStack() as stack:
        try:
            name = os.path.abspath(path)  # "a:b/c.mp4" would be taken for a protocol
            source: Any = name
            if not is_utf8(path):  # PyAV cannot pass such a name on
                source = stack.enter_context(Path(name).open("rb"))
            options = bounds | {"format_whitelist": _FORMATS}
            # Titles of old files are often not UTF-8; nothing here reads them.
            container = stack.enter_context(
                av.open(source, metadata_errors="replace", options=options)
            )
        except (OSError, MemoryError) as error:
            raise inaccessible(path, error) from error
        except (av.FFmpegError, ValueError) as error:
            detail = "it is not a video, or it is cut off; check it with ffprobe"
            raise VideoFileError(path, "unreadable", detail) from error
        stream = container.streams.best("video")
        if stream is None or _is_cover(stream):
            raise VideoFileError(path, "no_video", "it holds no pictures, perhaps only sound")
        if stream.codec_context is None:
            raise VideoFileError(path, "codec", "no decoder knows it; convert it to H.264 in mp4")
        limits.check_size(path, stream.codec_context.width, stream.codec_context.height)
        _check_promise(path, container, stream, limits)
        stream.codec_context.options = bounds
        stream.codec_context.thread_count = 1  # the parallelism is that of the workers
        yield container, stream


def _check_promise(path: Path, container: Any, stream: Any, limits: Limits) -> None:
    """Compare the length that a header promises with the limits, and with the size of the file."""
    limits.check_length(path, stream.frames, (container.duration or 0) / av.time_base)
    if stream.frames > container.size > 0:
        detail = f"its header promises {stream.frames} frames, and it has {container.size} bytes"
        raise VideoFileError(path, "damaged", detail)


def is_utf8(path: Path) -> bool:
    """Whether the bytes of a file's name are UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def read_header(path: Path, limits: Limits = USUAL) -> Header:
    """Read the header and all packets of a file, and decode its first frame.

    Raises:
        VideoFileError: The file cannot be opened, holds no video, is cut off, or is larger than
            ``limits``.
    """
    with open_track(path, limits) as (container, stream):
        tracks = [s for s in container.streams.video if not _is_cover(s)]
        shown: list[int | None] = []
        decoded_at: list[int] = []
        packets, reached = 0, Fraction(0)
        for packet in _packets(container, path):
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is not None:
                reached = max(reached, (stamp + (packet.duration or 0)) * packet.time_base)
            if packet.stream_index != stream.index:
                continue
            packets += 1
            limits.check_length(path, packets)
            if not (packet.is_discard or _is_reference_only(packet, stream)):
                shown.append(packet.pts)
                decoded_at.append(packet.dts or 0)
        promised = Fraction(container.duration or 0, av.time_base)
        known = [stamp for stamp in shown if stamp is not None]
        stamped = len(set(known)) == len(shown)
        seconds = [float(t * stream.time_base) for t in sorted(known if stamped else decoded_at)]
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        # AVI and unstamped tracks count frames in the order of decoding.
        slack = 1.5 if not stamped or container.format.name == "avi" else 0.5
        aspect = float(stream.sample_aspect_ratio or 1)
    # The longest track decides: sound may outlast the picture.
    if promised - reached > _SHORT * promised:
        detail = f"it ends after {float(reached):.1f} of {float(promised):.1f} s: cut off?"
        raise VideoFileError(path, "damaged", detail)
    geometry = _geometry(path, aspect, limits)
    fps, times = spacing(seconds, rate, slack)
    hidden = packets - len(shown)
    return Header(geometry, fps, packets, hidden, stamped, times, len(tracks))


def _packets(container: Any, path: Path, stream: Any = None) -> Iterator[Any]:
    """Packets of one track or of all; those that carry nothing are left out."""
    try:
        yield from (p for p in container.demux(*([stream] if stream else [])) if p.size)
    except (OSError, MemoryError) as error:
        raise inaccessible(path, error) from error
    except av.FFmpegError:
        return  # broken from here on: what is missing is counted


def _is_cover(stream: Any) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _is_reference_only(packet: Any, stream: Any) -> bool:
    """VP8 stores pictures that only others refer to as packets of their own (RFC 6386, 9.1)."""
    return stream.codec_context.name == "vp8" and not memoryview(packet)[0] >> 4 & 1


def _geometry(path: Path, pixel_aspect: float, limits: Limits) -> Geometry:
    with open_track(path, limits) as (container, stream):
        frame = next(decode(container, stream, path), None)
    if frame is None:
        # FFmpeg forgets a size that it has refused: this may be either.
        detail = (
            "not one of its frames can be decoded, or each has more pixels than "
            f"data.limits.pixels={limits.pixels}"
        )
        raise VideoFileError(path, "damaged", detail)
    height, width = frame.height, frame.width
    matrix = frame.side_data.get("DISPLAYMATRIX")
    values = np.eye(3, dtype=np.int32) if matrix is None else np.frombuffer(matrix, np.int32)
    a, b, _, c, d, *_ = (int(value) for value in values.ravel())
    if not 0.1 <= pixel_aspect <= 10.0:  # nonsense in the header: players ignore it too
        pixel_aspect = 1.0
    # (x, y) is shown at (a x + c y, b x + d y).
    if abs(b) + abs(c) < abs(a) + abs(d):
        return Geometry(height, width, pixel_aspect, False, d < 0, a < 0)
    return Geometry(height, width, pixel_aspect, True, b < 0, c < 0)


def spacing(
    seconds: Sequence[float], stated: float, slack: float
) -> tuple[float, tuple[int, ...] | None]:
    """Find the frame rate of ascending time stamps.

    Args:
        seconds: Time of every frame.
        stated: Frames per second that the header states; 0.0 if it does not.
        slack: Frames by which evenly spaced ones may be off.

    Returns:
        Frames per second on average, and the times in milliseconds from the first frame if the
        frames are not evenly spaced.
    """
    if len(seconds) < 2 or seconds[-1] <= seconds[0]:
        return stated, None
    at = np.asarray(seconds) - seconds[0]
    mean = float((len(at) - 1) / at[-1])
    for rate in (stated, mean):
        if rate and np.abs(at - np.arange(len(at)) / rate).max() <= slack / rate + 0.001:
            return rate, None
    return mean, tuple(round(1000 * t) for t in at)


def decode(container: Any, stream: Any, path: Path) -> Iterator[Any]:
    """Yield the frames that are shown, from where the container stands; lost ones are left out."""
    for packet in _packets(container, path, stream):
        try:
            yield from packet.decode()
        except MemoryError as error:
            raise inaccessible(path, error) from error
        except av.FFmpegError:
            continue
    try:
        yield from stream.codec_context.decode(None)
    except av.FFmpegError:
        return


def thumb(frame: Any, geometry: Geometry) -> Frames:
    """A small copy of a frame as it is shown, (1, 32, 32, 3)."""
    small: Frames = frame.reformat(THUMB, THUMB, "rgb24").to_ndarray()
    return geometry.turn(small[None])


def halve(thumbs: Frames) -> Frames:
    """Average thumbs (T, 32, 32, 3) to grey ones, (T, 16, 16): all frames of a film are kept."""
    parts: NDArray[np.uint16] = thumbs.reshape(-1, 16, 2, 16, 2, 3).astype(np.uint16)
    averages: Frames = (parts.sum(axis=(2, 4, 5)) // 12).astype(np.uint8)
    return averages


def decode_in_order(path: Path, geometry: Geometry) -> Film:
    """Decode a file from the start to the end: what it shows, whatever its index says.

    Raises:
        VideoFileError: It cannot be opened or read.
    """
    film = Film([], np.empty(0, np.uint8), [], 0)
    thumbs, corrupt = [np.empty((0, 16, 16), np.uint8)], 0
    with open_track(path) as (container, stream):
        for number, frame in enumerate(decode(container, stream, path)):
            small = thumb(frame, geometry)
            film.marks.append(_mark(frame, small))
            thumbs.append(halve(small))
            corrupt += frame.is_corrupt
            if frame.key_frame:
                film.keys.append(number)
    return film._replace(thumbs=np.concatenate(thumbs), corrupt=corrupt)


def _mark(frame: Any, small: Frames) -> tuple[int | None, bytes]:
    return frame.pts, hashlib.blake2b(small.tobytes(), digest_size=12).digest()


def find_entries(path: Path, geometry: Geometry, film: Film) -> tuple[Entry, ...]:
    """Find the places from which PyAV decodes the same frames as in order.

    Seeks to every key frame and compares what follows with ``film``, frame by frame. Places that
    are too close to the one before are left out.

    Args:
        path: The file.
        geometry: Of its frames.
        film: Its frames in order.

    Raises:
        VideoFileError: It cannot be opened or read.
    """
    numbers: dict[tuple[int | None, bytes], int] = {}
    for number, mark in enumerate(film.marks):  # a mark that occurs twice names no frame
        numbers[mark] = -1 if mark in numbers else number
    entries: list[Entry] = []
    with open_track(path) as (container, stream):
        for key in film.keys:
            stamp = film.marks[key][0]
            last = entries[-1].first if entries else 0
            if stamp is None or key - last < _CHECKED:
                continue
            try:
                container.seek(stamp, stream=stream)
            except av.FFmpegError:
                continue
            frames = decode(container, stream, path)
            marks = [_mark(f, thumb(f, geometry)) for f in islice(frames, 2 * _CHECKED)]
            skip, first = _align(marks, film.marks, numbers)
            if first > last:
                entries.append(Entry(stamp, skip, first))
    return tuple(entries)


def _align(
    found: list[tuple[int | None, bytes]],
    truth: list[tuple[int | None, bytes]],
    numbers: dict[tuple[int | None, bytes], int],
) -> tuple[int, int]:
    """(frames to skip, number of the next), so that all that were found follow; or (0, -1)."""
    for skip, mark in enumerate(found):
        first = numbers.get(mark, -1)
        following = found[skip:]
        enough = len(following) >= min(_CHECKED, len(truth) - first)
        if first >= 0 and enough and truth[first : first + len(following)] == following:
            return skip, first
    return 0, -1


def read_by_entries(
    path: Path, access: Access, indices: Sequence[int], size: tuple[int, int]
) -> Frames:
    """Read frames with PyAV, each group from the last proved entry before it.

    Args:
        path: The file.
        access: From examining it.
        indices: Frame numbers, in any order.
        size: (rows, columns) of the frames as they are shown.

    Returns:
        RGB frames (T, rows, columns, 3) uint8.

    Raises:
        VideoFileError: The file cannot be read, or ends before the last index.
    """
    rows, columns = reversed(size) if access.geometry.transposed else size
    pictures: dict[int, Frames] = {}
    with open_track(path) as (container, stream):
        frames, at = decode(container, stream, path), 0
        for index in sorted(set(indices)):
            entry = max((e for e in access.entries if e.first <= index), default=None, key=_first)
            if entry is not None and entry.first > at:
                container.seek(entry.stamp, stream=stream)
                frames, at = decode(container, stream, path), entry.first - entry.skip
            frame = None
            while at <= index:
                frame, at = next(frames, None), at + 1
            if frame is None:
                detail = f"it ends before frame {index}; was it changed while in use?"
                raise VideoFileError(path, "damaged", detail)
            pictures[index] = frame.reformat(columns, rows, "rgb24").to_ndarray()
    return access.geometry.turn(np.stack([pictures[index] for index in indices]))


def _first(entry: Entry) -> int:
    return entry.first
