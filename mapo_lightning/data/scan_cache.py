"""Results of earlier scans, by content, so that no video is decoded twice."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from mapo_lightning.data.examiner import Facts
from mapo_lightning.data.reader import FrameSource
from mapo_lightning.data.video import DECODERS
from mapo_lightning.data.video_info import (
    OF_THE_CONTENT,
    Access,
    Entry,
    Geometry,
    VideoFileError,
    VideoInfo,
    printable,
)
from mapo_lightning.files import atomic_write

log = logging.getLogger(__name__)

_VERSION: list[Any] = [
    5,
    DECODERS,
]  # a proof of access holds for its decoders


class ScanCache:
    """Facts about videos, kept in a JSON file; its methods may be called from several threads.

    Args:
        path: The file; if it is missing or unreadable, the cache starts empty.
        asked: What a scan accepts, as plain JSON; results of a scan that asked anything else are
            not used.
        examine: Decodes a video in full.
    """

    def __init__(
        self, path: Path, asked: list[Any], examine: Callable[[FrameSource], Facts]
    ) -> None:
        self.path, self._version, self._examine = path, [*_VERSION, *asked], examine
        self._facts: dict[str, Facts] = {}
        # Reading 200,000 files takes hours; their dates take a second.
        self._untouched: dict[str, list[Any]] = {}
        self._load()

    def examine(self, source: FrameSource) -> VideoInfo:
        """Return what is known about a video; it is decoded in full if its content is new.

        Raises:
            VideoFileError: It cannot be used.
        """
        name = self._fingerprint(source)
        facts = self._facts.get(name) or self._examine(source)
        if facts["reason"] is None or facts["reason"] in OF_THE_CONTENT:
            self._facts[name] = facts
        if facts["reason"]:
            raise VideoFileError(source.path, facts["reason"], facts["detail"])
        return _info(source, name, facts)

    def save(self) -> None:
        """Write the file, as a whole."""
        stored = {
            "version": self._version,
            "videos": dict(self._facts),  # copies: other threads may go on adding
            "untouched": dict(self._untouched),
        }
        with atomic_write(self.path) as draft:
            draft.write_text(json.dumps(stored, indent=0, sort_keys=True))

    def _fingerprint(self, source: FrameSource) -> str:
        key, state = printable(source.path), source.state()
        known = self._untouched.get(key, [])
        if state and known[:-1] == state:
            return str(known[-1])
        name = source.fingerprint()  # raises the error that says what is wrong
        self._untouched[key] = [*state, name]
        return name

    def _load(self) -> None:
        try:
            stored = json.loads(self.path.read_text())
            if stored["version"] != self._version:
                return
            videos = cast(dict[str, Facts], stored["videos"])
            self._facts = {name: facts for name, facts in videos.items() if _is_sane(facts)}
            files = cast(dict[str, list[Any]], stored["untouched"])
            self._untouched = {
                path: known for path, known in files.items() if isinstance(known[-1], str)
            }
        except FileNotFoundError:
            return
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            log.warning("the scan cache '%s' is unreadable (%s): scanning anew", self.path, error)
            self._facts, self._untouched = {}, {}


def _info(source: FrameSource, name: str, facts: Facts) -> VideoInfo:
    """Facts as they were found, or as JSON gives them back: lists in place of tuples."""
    access, times = facts["access"], facts["times"]
    if access is not None:
        decoder, geometry, entries, *rest = access
        places = tuple(Entry(*entry) for entry in entries)
        access = Access(decoder, Geometry(*geometry), places, *rest)
    return VideoInfo(
        source.path,
        name,
        facts["frames"],
        facts["width"],
        facts["height"],
        facts["fps"],
        numbers=source.numbers,
        access=access,
        times=None if times is None else tuple(times),
    )


def _is_sane(facts: Facts) -> bool:
    if facts["reason"] is not None:
        return facts["reason"] in OF_THE_CONTENT and isinstance(facts["detail"], str)
    try:
        info = _info(FrameSource(Path()), "", facts)
    except (KeyError, TypeError, ValueError):
        return False
    numbers = [info.frames, info.width, info.height, info.fps, *(info.times or ())]
    if info.access is not None:
        known = info.access.decoder in ("decord", "pyav")
        geometry = info.access.geometry
        numbers += [*geometry, *(place.first for place in info.access.entries)]
        return known and all(isinstance(n, int | float) and n >= 0 for n in numbers)
    return all(isinstance(n, int | float) and n >= 0 for n in numbers)
