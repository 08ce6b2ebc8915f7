"""Proves, file by file, that decord hands out the frames that it is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import decord
import numpy as np

from mapo_lightning.data.container import (
    THUMB,
    Header,
    decode,
    halve,
    is_utf8,
    open_track,
    thumb,
)
from mapo_lightning.data.video_info import VideoFileError
from mapo_lightning.types import Frames

VERSION = f"decord {decord.__version__}"
"""What a proof was made with."""

_CHUNK = 32  # frames decoded at once
_HEAD = 17  # frames compared behind each key frame: more than any codec reorders
_NEAR = 32  # a frame is compared with the others up to this far away
_NOISE = 0.05  # grey levels by which two decoders' roundings may favour a wrong frame
_SAME = 6.0  # grey levels, on average, up to which two decoders show the same picture
_ERRORS = (RuntimeError, IndexError, decord.DECORDError)


class Proof(NamedTuple):
    """What decoding a file with decord, in order and not in order, has shown."""

    why: str
    """Why it must not be used for this file; empty if it may."""
    repeats: int = 0
    """Frames that repeat the one before exactly."""
    thumbs: Frames | None = None
    """All frames in order, (T, 16, 16, 3) uint8."""
    broken: bool = False
    """It could not even decode the frames in order."""


def open_decord(path: Path, size: tuple[int, int] | None) -> Any:
    """Open a decoder that gives frames of ``size`` (height, width), or of the file's size.

    Raises:
        VideoFileError: decord does not open the file.
    """
    shape = {} if size is None else {"height": size[0], "width": size[1]}
    try:
        # One thread each: the parallelism is that of the DataLoader's workers. The path is
        # absolute, because "a:b/c.mp4" would be taken for a protocol.
        return decord.VideoReader(str(path.absolute()), num_threads=1, **shape)
    except _ERRORS as error:
        raise VideoFileError(
            path, "codec", "the decoder does not open it; convert it to H.264 in mp4"
        ) from error


def decode_frames(reader: Any, path: Path, indices: Sequence[int]) -> Frames:
    """Frames of an open decoder, (T, H, W, 3) uint8.

    Raises:
        VideoFileError: Decoding fails.
    """
    try:
        frames: Frames = reader.get_batch(list(indices)).asnumpy()
    except _ERRORS as error:
        raise VideoFileError(
            path, "damaged", f"decoding fails within frames {min(indices)}..{max(indices)}"
        ) from error
    return frames


def prove_decord(path: Path, header: Header) -> Proof:
    """Find out whether decord can be trusted with a file.

    It decodes the file in order; then it is sent to every key frame, once forwards and once
    backwards, and must give exactly the same frames there. What its index cannot express (hidden
    frames, no time stamps) is refused at once.

    Args:
        path: The file.
        header: Of the file.

    Returns:
        The proof. A file with repeats must also be compared with another decoder's frames, since
        decord fills gaps with repeats (`differs`).

    Raises:
        VideoFileError: The file cannot be opened at all.
    """
    if header.tracks > 1:
        return Proof(f"it has {header.tracks} video tracks")
    if header.hidden:
        return Proof("some of its frames are not to be shown")
    if not header.stamped:
        return Proof("its frames have no time stamps of their own")
    if not is_utf8(path):
        return Proof("its name is not UTF-8")
    try:
        reader = open_decord(path, (THUMB, THUMB))
        if len(reader) != header.packets:
            return Proof("decord counts other frames")
        try:
            marks, thumbs = _in_order(reader, path)
        except VideoFileError as error:
            return Proof(error.detail, broken=True)
        if not _same_start(path, header, reader):
            return Proof("decord shows another first frame")
        for indices in _visits([int(key) for key in reader.get_key_indices()], len(marks)):
            found = _marks(decode_frames(reader, path, indices))
            if found != [marks[index] for index in indices]:
                return Proof(f"decord gives other frames than {indices[0]}..{indices[-1]}")
    except VideoFileError as error:
        return Proof(error.detail)
    repeats = sum(mark == before for mark, before in zip(marks[1:], marks, strict=False))
    return Proof("", repeats, thumbs)


def _in_order(reader: Any, path: Path) -> tuple[list[bytes], Frames]:
    marks: list[bytes] = []
    thumbs: list[Frames] = []
    for first in range(0, len(reader), _CHUNK):
        indices = range(first, min(first + _CHUNK, len(reader)))
        frames = decode_frames(reader, path, indices)
        marks += _marks(frames)
        thumbs.append(halve(frames))
    return marks, np.concatenate(thumbs)


def _marks(frames: Frames) -> list[bytes]:
    return [hashlib.blake2b(frame.tobytes(), digest_size=12).digest() for frame in frames]


def _same_start(path: Path, header: Header, reader: Any) -> bool:
    """Whether decord's first frame is the one that is shown first, turned the right way."""
    with open_track(path) as (container, stream):
        frame = next(decode(container, stream, path))
        truth = thumb(frame, header.geometry).astype(np.int16)
    candidates = decode_frames(reader, path, range(min(_NEAR, len(reader)))).astype(np.int16)
    off = np.abs(candidates - truth).mean(axis=(1, 2, 3))
    return bool(off[0] <= min(_SAME, off.min() + _NOISE))


def _visits(keys: Sequence[int], frames: int) -> Iterator[range]:
    """Frames to ask for, so that every key frame is sought from before and from behind it."""
    ends = [*keys[1:], frames]
    groups = [range(first, end) for first, end in zip(keys, ends, strict=True)]
    if not keys or keys[0]:
        yield range(frames)  # an index without its first key frame: looked at as a whole
    # Every other group, since going on to the next one is no seek.
    for group in [*groups[::2], *groups[1::2]]:
        yield group[:_HEAD]
    # The last frame alone: those before it are skipped, not shown.
    whole = {len(groups) - 1, max(range(len(groups)), key=lambda n: len(groups[n]))}
    for number in reversed(range(len(groups))):
        group = groups[number] if number in whole else groups[number][:_HEAD]
        yield group[-1:]


def differs(thumbs: Frames, truth: Frames) -> str:
    """Say where decord's frames in order are not those of another decoder; empty if nowhere.

    Args:
        thumbs: decord's, (T, 16, 16, 3) uint8.
        truth: The other's.
    """
    if len(thumbs) != len(truth):
        return f"decord shows {len(thumbs)} frames, there are {len(truth)}"
    own = np.zeros(len(thumbs))
    best = np.full(len(thumbs), np.inf)
    for shift in range(-_NEAR, _NEAR + 1):
        rows = np.arange(max(0, -shift), min(len(thumbs), len(thumbs) - shift))
        if not len(rows):
            continue
        pairs = thumbs[rows].astype(np.int16) - truth[rows + shift]
        off = np.abs(pairs).mean(axis=(1, 2, 3))
        best[rows] = np.minimum(best[rows], off)
        if shift == 0:
            own = off
    wrong = np.flatnonzero(own > np.minimum(_SAME, best + _NOISE))
    return f"decord shows another frame {wrong[0]}" if len(wrong) else ""
