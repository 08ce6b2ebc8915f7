"""Sentences that come with videos: read from a file, and found for a window of frames.

A file is CSV, JSON (a list of objects) or JSON lines, in UTF-8, with the columns ``video`` and
``text`` and, unless a sentence is about its whole video, ``start`` and ``end`` in seconds or
``first_frame`` and ``last_frame`` as frame numbers of the file, both inclusive.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import logging
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from mapo_lightning.data.listing import Entry
from mapo_lightning.data.reader import numbers_in_file
from mapo_lightning.data.video_info import Caption, VideoInfo, printable
from mapo_lightning.types import ConfigError

log = logging.getLogger(__name__)

BESIDE = ("captions.csv", "captions.json", "captions.jsonl")
"""Names of a file in the folder of the videos that is found by itself."""
_LONGEST = 1000  # characters of a sentence
_ROUNDING = 1e-6  # seconds by which a frame's time may differ from the same time in a file
_SECONDS, _FRAMES = ("start", "end"), ("first_frame", "last_frame")
_COLUMNS = "video, start, end, text (or first_frame and last_frame, or no times at all)"


class _Row(NamedTuple):
    """One sentence as the file has it."""

    video: str
    caption: Caption
    where: str
    """For messages: file and line."""


def add_captions(entries: Sequence[Entry], root: Path, file: str) -> list[Entry]:
    """Give videos the sentences about them.

    Args:
        entries: All videos of the data set.
        root: Their folder.
        file: The file of sentences; empty: what the data set brings along, or else one of `BESIDE`
            in the folder.

    Raises:
        ConfigError: There are no sentences, or the file is not what it must be; names the line.
    """
    path = Path(file) if file else _beside(root)
    if path is None:
        if any(entry.captions for entry in entries):
            return list(entries)
        raise ConfigError(
            f"vlm=templates needs sentences about the videos, and '{root}' has none: give "
            f"vlm.captions=FILE with the columns {_COLUMNS}, or put {BESIDE[0]} into that folder; "
            "data=ssv2 and data=metaworld_experts have sentences of their own"
        )
    rows = list(_read(path))
    if not rows:
        raise ConfigError(f"'{path}' holds no sentence: it must have the columns {_COLUMNS}")
    names = _names(entries, root)
    found: dict[int, list[_Row]] = {}
    for row in rows:
        found.setdefault(_number(row, names, root), []).append(row)
    captions = {number: _in_order(of_one) for number, of_one in found.items()}
    log.info("%d sentences about %d of %d videos: %s", len(rows), len(found), len(entries), path)
    return [
        entry._replace(captions=captions.get(number, ())) for number, entry in enumerate(entries)
    ]


def caption_of(info: VideoInfo, window: range) -> str:
    """The sentence in which most frames of a window lie; of two equals the later; '' if none do.

    Args:
        info: The video with its sentences.
        window: Frames of the video.
    """
    own = numbers_in_file(info, window)
    best, most = "", 0
    for caption in info.captions:  # by their start
        places = own if caption.in_frames else [_seconds(info, frame) for frame in window]
        start, end = caption.start - _ROUNDING, caption.end - _ROUNDING
        inside = sum(start <= place < end for place in places)
        if inside and inside >= most:
            best, most = caption.text, inside
    return best


def check_times(info: VideoInfo) -> None:
    """See that the times of a video's sentences can be found in it.

    Raises:
        ConfigError: A sentence begins after the video's end, or is timed by seconds where the video
            has none.
    """
    name = printable(info.path.name)
    for caption in info.captions:
        if caption.start <= 0.0 and math.isinf(caption.end):
            continue
        last: float = info.frames - 1 if info.numbers is None else info.numbers[-1]
        unit, hint = "frame", "if these are seconds, name the columns start and end"
        if not caption.in_frames:
            if not info.fps and not info.times:
                raise ConfigError(
                    f"{caption.where}: '{name}' has no frame rate, so seconds say nothing about "
                    "it: give first_frame and last_frame in place of start and end"
                )
            last, unit = _seconds(info, info.frames - 1), "second"
            hint = "if these are frame numbers, name the columns first_frame and last_frame"
        if caption.start > last:
            raise ConfigError(
                f"{caption.where}: '{caption.text[:60]}' begins at {unit} {caption.start:g}, but "
                f"'{name}' ends at {unit} {last:g}: correct the times; {hint}"
            )


def _seconds(info: VideoInfo, frame: int) -> float:
    """Time of a frame, from the first one."""
    return info.times[frame] / 1000.0 if info.times else frame / info.fps


def _beside(root: Path) -> Path | None:
    found = [root / name for name in BESIDE if (root / name).is_file()]
    if len(found) > 1:
        raise ConfigError(
            f"'{root}' holds {' and '.join(path.name for path in found)}: remove one, or choose "
            "with vlm.captions=FILE"
        )
    return found[0] if found else None


def _names(entries: Sequence[Entry], root: Path) -> dict[str, list[int]]:
    """Everything that a video may be called in a file: its path, its name, its name's stem."""
    names: dict[str, list[int]] = {}
    for number, entry in enumerate(entries):
        path = entry.path.relative_to(root) if entry.path.is_relative_to(root) else entry.path
        called = {path.as_posix(), path.with_suffix("").as_posix(), path.name, path.stem}
        if "%" in path.name:  # a run of images is called by what comes before their number
            called |= {path.stem.partition("%")[0].rstrip("_-. "), path.parent.name} - {""}
        for name in called:
            names.setdefault(printable(name), []).append(number)
    return names


def _number(row: _Row, names: dict[str, list[int]], root: Path) -> int:
    numbers = names.get(row.video.removeprefix("./"), [])
    if len(numbers) == 1:
        return numbers[0]
    if numbers:
        raise ConfigError(
            f"{row.where}: {len(numbers)} videos are called '{row.video}': give the path inside "
            f"'{root}'"
        )
    known = {name.lower(): name for name in names}
    near = difflib.get_close_matches(row.video.lower(), known, 1)
    hint = f"did you mean '{known[near[0]]}'?" if near else f"give the path inside '{root}'"
    raise ConfigError(f"{row.where}: there is no video '{row.video}' in '{root}'; {hint}")


def _in_order(rows: Sequence[_Row]) -> tuple[Caption, ...]:
    """Sentences of one video by their start; two may touch but not overlap."""
    ordered = sorted(rows, key=lambda row: (row.caption.start, row.caption.end))
    for one, two in pairwise(ordered):
        if one.caption.in_frames != two.caption.in_frames:
            raise ConfigError(
                f"{two.where}: '{two.video}' has times in seconds and in frames: use one of them"
            )
        if two.caption.start < one.caption.end:
            raise ConfigError(
                f"{two.where}: '{two.caption.text[:60]}' overlaps '{one.caption.text[:60]}' "
                f"({one.where}) in video '{two.video}': a moment can have one sentence only, so "
                "remove one of them or shorten its times"
            )
    return tuple(row.caption for row in ordered)


def _read(path: Path) -> Iterator[_Row]:
    try:
        text = path.read_bytes().decode("utf-8-sig")  # spreadsheets begin the file with a mark
    except OSError as error:
        raise ConfigError(f"vlm.captions='{path}' cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"'{path}' line {line} is not UTF-8: save the file as 'CSV UTF-8', or as JSON in UTF-8"
        ) from error
    readers = {".csv": _csv_rows, ".json": _json_rows, ".jsonl": _json_lines}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"'{path}' must be named .csv, .json or .jsonl, by what it holds")
    for number, row in reader(path, text):
        yield _checked(row, f"'{path}' {number}")


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    head = text.partition("\n")[0]
    for mark, name in ((";", "semicolons"), ("\t", "tabs")):
        if mark in head and "," not in head:
            raise ConfigError(
                f"'{path}' line 1 has {name} between the columns: save it with commas, and with "
                "points in decimal numbers"
            )
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = [name.strip().lower() for name in next(lines, [])]
        _check_columns(columns, f"'{path}' line 1")
        for cells in lines:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(columns):
                raise ConfigError(
                    f"'{path}' line {lines.line_num} has {len(cells)} columns, the first line has "
                    f"{len(columns)}: put sentences with commas between double quotes"
                )
            yield f"line {lines.line_num}", dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise ConfigError(f"'{path}' line {lines.line_num} is not CSV ({error})") from error


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = _parsed(text, f"'{path}'")
    if not isinstance(rows, list):
        raise ConfigError(
            f"'{path}' must hold a JSON list of objects with {_COLUMNS}, it holds "
            f"{type(rows).__name__}"
        )
    yield from ((f"entry {number}", row) for number, row in enumerate(rows, 1))


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", _parsed(line, f"'{path}' line {number}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON ({error})") from error


def _check_columns(columns: Sequence[str], where: str) -> None:
    times = [name for name in (*_SECONDS, *_FRAMES) if name in columns]
    whole = not times or tuple(times) in (_SECONDS, _FRAMES)
    if {"video", "text"} <= set(columns) and whole and len(set(columns)) == len(columns):
        return
    raise ConfigError(f"{where} must name the columns {_COLUMNS}; it has {', '.join(columns)}")


def _checked(row: Any, where: str) -> _Row:
    if not isinstance(row, dict):
        raise ConfigError(f"{where} must be an object with {_COLUMNS}, it is {json.dumps(row)}")
    row = {str(name).lower(): value for name, value in row.items() if value is not None}
    _check_columns(list(row), where)
    video, text = row["video"], row["text"]
    if not isinstance(video, str) or not video.strip() or not isinstance(text, str):
        raise ConfigError(f"{where}: video and text must be texts, got {video!r} and {text!r}")
    if len(text) > _LONGEST:
        raise ConfigError(
            f"{where}: the sentence has {len(text)} characters, at most {_LONGEST} are read: write "
            "one sentence for each thing that happens, with its own times"
        )
    in_frames = "first_frame" in row
    if not in_frames and "start" not in row:
        return _Row(video.strip(), Caption(text, where=where), where)
    start, end = (_time(row[name], name, where) for name in (_FRAMES if in_frames else _SECONDS))
    if in_frames:
        if start % 1 or end % 1:
            raise ConfigError(f"{where}: frame numbers must be whole, got {start:g} and {end:g}")
        end += 1.0
    if not end > start:
        raise ConfigError(f"{where}: it ends at {end:g}, but begins at {start:g}: exchange them")
    return _Row(video.strip(), Caption(text, start, end, in_frames, where), where)


def _time(value: Any, name: str, where: str) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError):
        raise ConfigError(
            f"{where}: {name} must be a number such as 12.5, got {value!r}; minutes count as "
            "seconds too, and decimals have a point"
        ) from None
    if not math.isfinite(number) or number < 0.0:
        raise ConfigError(f"{where}: {name} must not be negative, got {value!r}")
    return number
