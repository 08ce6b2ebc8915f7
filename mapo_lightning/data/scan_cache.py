"""Results of earlier scans, by content, so that no video is decoded twice."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, cast, get_args

from mapo_lightning.data.reader import FrameSource
from mapo_lightning.data.video_info import Reason, VideoFileError, VideoInfo
from mapo_lightning.files import atomic_write

log = logging.getLogger(__name__)

_VERSION = 2


class ScanCache:
    """Facts about videos, kept in a JSON file; its methods may be called from several threads.

    Args:
        path: The file; if it is missing or unreadable, the cache starts empty.
        max_undecodable: Share of lost frames above which a video is rejected; results of a scan
            with another value are not used.
    """

    def __init__(self, path: Path, max_undecodable: float) -> None:
        self.path, self.max_undecodable = path, max_undecodable
        self._facts: dict[str, dict[str, Any]] = {}
        # Reading 128 KiB of each of 200,000 files takes minutes; their dates take a second.
        self._untouched: dict[str, list[Any]] = {}
        self._load()

    def examine(self, source: FrameSource) -> VideoInfo:
        """Return what is known about a video; it is decoded in full if its content is new.

        Raises:
            VideoFileError: It cannot be used.
        """
        name = self._fingerprint(source)
        if name not in self._facts:
            self._facts[name] = self._examined(source)
        facts = self._facts[name]
        if facts["reason"]:
            raise VideoFileError(source.path, facts["reason"], facts["detail"])
        counts = facts["frames"], facts["width"], facts["height"], facts["fps"]
        return VideoInfo(source.path, name, *counts, numbers=source.numbers)

    def save(self) -> None:
        """Write the file, as a whole."""
        stored = {
            "version": [_VERSION, self.max_undecodable],
            "videos": dict(self._facts),  # copies: other threads may go on adding
            "untouched": dict(self._untouched),
        }
        with atomic_write(self.path) as draft:
            draft.write_text(json.dumps(stored, indent=0, sort_keys=True))

    def _fingerprint(self, source: FrameSource) -> str:
        if source.numbers is not None:
            return source.fingerprint()
        key = str(source.path)
        try:
            stat = source.path.stat()
        except OSError:
            return source.fingerprint()  # raises the error that says what is wrong
        size, time, name = self._untouched.get(key, (None, None, ""))
        if (size, time) != (stat.st_size, stat.st_mtime_ns):
            name = source.fingerprint()
            self._untouched[key] = [stat.st_size, stat.st_mtime_ns, name]
        return str(name)

    def _examined(self, source: FrameSource) -> dict[str, Any]:
        try:
            info = source.examine(self.max_undecodable)
        except VideoFileError as error:
            return {"reason": error.reason, "detail": error.detail}
        numbers = {key: getattr(info, key) for key in ("frames", "width", "height", "fps")}
        return numbers | {"reason": None}

    def _load(self) -> None:
        try:
            stored = json.loads(self.path.read_text())
            if stored["version"] != [_VERSION, self.max_undecodable]:
                return
            videos = cast(dict[str, dict[str, Any]], stored["videos"])
            self._facts = {name: facts for name, facts in videos.items() if _is_sane(facts)}
            files = cast(dict[str, list[Any]], stored["untouched"])
            self._untouched = {path: known for path, known in files.items() if len(known) == 3}
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("the scan cache '%s' is unreadable (%s): scanning anew", self.path, error)
            self._facts, self._untouched = {}, {}


def _is_sane(facts: dict[str, Any]) -> bool:
    if facts["reason"] is not None:
        return facts["reason"] in get_args(Reason) and isinstance(facts["detail"], str)
    numbers = [facts[name] for name in ("frames", "width", "height", "fps")]
    return all(isinstance(n, int | float) and n >= 0 for n in numbers)
