"""What earlier scans found out about videos, by their content, so that none is decoded twice."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any, cast, get_args

from mapo_lightning.data.reader import Footage
from mapo_lightning.data.video_info import Reason, VideoFileError, VideoInfo

log = logging.getLogger(__name__)

_VERSION = 2


class Remembered:
    """Facts about videos, kept in a JSON file; its methods may be called from several threads.

    Args:
        path: The file; where it is missing or unreadable, nothing is remembered.
        max_undecodable: Share of lost frames above which a video is rejected; facts that were
            found with another one are forgotten.
    """

    def __init__(self, path: Path, max_undecodable: float) -> None:
        self.path, self.max_undecodable = path, max_undecodable
        self._facts: dict[str, dict[str, Any]] = {}
        # Reading 128 KiB of each of 200,000 files takes minutes; their dates take a second.
        self._untouched: dict[str, list[Any]] = {}
        self._load()

    def examine(self, footage: Footage) -> VideoInfo:
        """Say what is known of a video; it is decoded in full if its content is new.

        Raises:
            VideoFileError: It cannot be used.
        """
        name = self._fingerprint(footage)
        if name not in self._facts:
            self._facts[name] = self._find_out(footage)
        facts = self._facts[name]
        if facts["reason"]:
            raise VideoFileError(footage.path, facts["reason"], facts["detail"])
        counts = facts["frames"], facts["width"], facts["height"], facts["fps"]
        return VideoInfo(footage.path, name, *counts, numbers=footage.numbers)

    def save(self) -> None:
        """Write the file, at once or not at all."""
        stored = {
            "version": [_VERSION, self.max_undecodable],
            "videos": dict(self._facts),  # copies: other threads may go on adding
            "untouched": dict(self._untouched),
        }
        write_whole(self.path, json.dumps(stored, indent=0, sort_keys=True))

    def _fingerprint(self, footage: Footage) -> str:
        if footage.numbers is not None:
            return footage.fingerprint()
        key = str(footage.path)
        try:
            stat = footage.path.stat()
        except OSError:
            return footage.fingerprint()  # says what is wrong
        size, time, name = self._untouched.get(key, (None, None, ""))
        if (size, time) != (stat.st_size, stat.st_mtime_ns):
            name = footage.fingerprint()
            self._untouched[key] = [stat.st_size, stat.st_mtime_ns, name]
        return str(name)

    def _find_out(self, footage: Footage) -> dict[str, Any]:
        try:
            info = footage.examine(self.max_undecodable)
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


def write_whole(path: Path, text: str) -> None:
    """Write a file at once or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(text)
    unfinished.replace(path)
