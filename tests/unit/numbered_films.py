"""Video files whose frames carry their number, of the kinds that cameras and programs write."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from mapo_lightning.types import Frames

_CORNERS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))  # upright, row by row
_BITS = 6
_THIRTIETH = Fraction(1, 30)


class Film(NamedTuple):
    """How a file is written."""

    codec: str = "libx264"
    suffix: str = ".mp4"
    options: tuple[tuple[str, str], ...] = ()
    """Of the encoder; {gop} stands for the next."""
    gop: int = 12
    frames: int = 48
    container: str | None = None
    """FFmpeg's name of the container; None: by the suffix."""
    matrix: tuple[int, int, int, int] | None = None
    """a, b, c, d of the display matrix: (x, y) is shown at (a x + c y, b x + d y)."""
    aspect: int = 1
    """Width of a pixel divided by its height."""
    start: int = 0
    """Time stamp of the first frame, in frames."""
    sound: str = ""
    """Codec of a sound track that is twice as long as the picture."""
    pixels: str = "yuv420p"
    settings: tuple[tuple[str, str], ...] = ()
    """Options of the container."""
    ticks: Callable[[int], int] = lambda number: number
    """Time stamp of each frame, in thirtieths of a second."""
    size: tuple[int, int] = (120, 160)
    """Rows and columns."""
    title: str = ""
    """Of the file and of the track."""
    disposition: str = ""
    """What the track is to players: "default", "attached_pic" (a cover)."""


def draw(number: int, height: int = 120, width: int = 160) -> Frames:
    """A frame (H, W, 3) with six bars, bit 0 at the left, and a colour in each corner."""
    frame = np.full((height, width, 3), 70, np.uint8)
    for bit in range(_BITS):
        if number >> bit & 1:
            frame[
                height // 3 : 2 * height // 3, width * bit // _BITS : width * (bit + 1) // _BITS
            ] = 200
    y, x = height // 4, width // 4
    places = (np.s_[:y, :x], np.s_[:y, -x:], np.s_[-y:, :x], np.s_[-y:, -x:])
    for place, colour in zip(places, _CORNERS, strict=True):
        frame[place] = colour
    return frame


def number_of(frame: Frames) -> int:
    """The number that an upright frame of any size shows."""
    row = frame[2 * len(frame) // 5 : 3 * len(frame) // 5].mean(axis=(0, 2))
    at = [int(len(row) * (bit + 0.5) / _BITS) for bit in range(_BITS)]
    return sum(int(row[x] > 135) << bit for bit, x in enumerate(at))


def corners_of(frame: Frames) -> str:
    """Colours of the corners, row by row: RGBW for an upright frame."""
    y, x = frame.shape[0] // 10, frame.shape[1] // 10
    found = ""
    for pixel in (frame[y, x], frame[y, -x], frame[-y, x], frame[-y, -x]):
        off = [np.abs(pixel.astype(int) - colour).sum() for colour in _CORNERS]
        found += "RGBW"[int(np.argmin(off))]
    return found


def write(path: Path, film: Film, *others: Film) -> Path:
    """Write a film; its name gets the film's suffix. Further ones become tracks of the file."""
    path = path.with_suffix(film.suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = dict(film.settings)
    with av.open(str(path), "w", format=film.container, options=settings) as container:
        if film.title:
            container.metadata["title"] = film.title
        streams = [_add_track(container, track) for track in (film, *others)]
        sound = None
        if film.sound:
            sound = container.add_stream(film.sound, rate=48000, layout="mono")
        for track, stream in zip((film, *others), streams, strict=True):
            for number in range(track.frames):
                picture = av.VideoFrame.from_ndarray(draw(number, *track.size), format="rgb24")
                picture.pts, picture.time_base = track.start + track.ticks(number), _THIRTIETH
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
        if sound is not None:
            _add_sound(container, sound, 2 * film.frames / 30)
    return path


def _add_track(container: Any, film: Film) -> Any:
    stream = container.add_stream(film.codec, rate=30)
    (stream.height, stream.width), stream.pix_fmt = film.size, film.pixels
    stream.codec_context.gop_size = film.gop
    stream.codec_context.thread_count = 1
    stream.sample_aspect_ratio = Fraction(film.aspect)
    stream.options = {key: value.format(gop=film.gop) for key, value in film.options}
    if film.matrix is not None:
        a, b, c, d = (value << 16 for value in film.matrix)
        stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
    if film.title:
        stream.metadata["title"] = film.title
    if film.disposition:
        stream.disposition = av.stream.Disposition[film.disposition]
    return stream


def _add_sound(container: Any, stream: Any, seconds: float) -> None:
    for part in range(int(seconds * 48000 / 960)):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.int16), "s16", "mono")
        frame.sample_rate, frame.pts = 48000, 960 * part
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def hide_first(path: Path, frames: int) -> Path:
    """Cut the first frames of an mp4 off as lossless editors do: by its edit list alone."""
    data = bytearray(path.read_bytes())
    at, header = data.index(b"elst") + 12, data.index(b"mdhd") + 16
    (ticks,) = struct.unpack_from(">I", data, header)
    duration, start = struct.unpack_from(">II", data, at)
    struct.pack_into(">II", data, at, duration - 1000 * frames // 30, start + ticks * frames // 30)
    path.write_bytes(bytes(data))
    return path


def cover_first(path: Path) -> Path:
    """Move the cover of an mp4 before its tracks, so that it becomes the first track."""
    data = path.read_bytes()
    start = data.index(b"moov") - 4
    (length,) = struct.unpack_from(">I", data, start)
    boxes, at = list[bytes](), start + 8
    while at < start + length:
        (size,) = struct.unpack_from(">I", data, at)
        boxes.append(data[at : at + size])
        at += size
    boxes.sort(key=lambda box: (b"mvhd", b"udta", b"trak").index(box[4:8]))
    path.write_bytes(data[: start + 8] + b"".join(boxes) + data[start + length :])
    return path


def hide_pictures(path: Path, numbers: Sequence[int]) -> Path:
    """Make pictures of a VP8 film such that others refer to them and no player shows them."""
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0)]
    data = bytearray(path.read_bytes())
    for number in numbers:  # the bit show_frame of RFC 6386, 9.1
        data[data.index(packets[number])] &= ~0x10 & 0xFF
    path.write_bytes(bytes(data))
    return path


def in_order(path: Path, matrix: Sequence[int] | None = None, track: int = 0) -> Frames:
    """All frames of a track as FFmpeg decodes them from the start, turned by a matrix."""
    with av.open(str(path), metadata_errors="replace") as container:
        stream = container.streams.video[track]
        frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)])
    if matrix is None:
        return frames
    a, b, c, d = matrix
    ways = frames if a or d else frames.transpose(0, 2, 1, 3)
    flip_x, flip_y = (a < 0, d < 0) if a or d else (c < 0, b < 0)
    ways = ways[:, :, ::-1] if flip_x else ways
    return ways[:, ::-1] if flip_y else ways
