"""A person's verdicts on labels: accepted, rejected or corrected, in a file of the gallery.

One row of such a file::

    {"key": ..., "mark": "correct", "slots": [five texts], "was": [five texts],
     "by": ..., "at": ..., "video": ..., "frames": ..., "describer": ...}

``mark`` may be ``accept`` or ``reject``, without ``slots``. Training reads ``key``, ``mark`` and
``slots``; the rest says to people who changed what.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mapo_lightning.semantics.phrase import MAX_SLOT, MAX_TEXT, SLOTS, Phrase, clean_text
from mapo_lightning.types import ConfigError

FORMAT = "mapo-label-marks-1"
"""First field of such a file. Its words ``marks`` and ``mark`` are those of version 0.1.0."""
_MAX_BYTES = 64 << 20
_KEY = re.compile(r"[0-9a-f]{32}")
_NOTES = ("video", "frames", "describer", "by", "at")


class Reviews(NamedTuple):
    """Keys of labels that a person has accepted, rejected or corrected; each in one of them."""

    accepted: frozenset[str] = frozenset()
    rejected: frozenset[str] = frozenset()
    """These count as null in training."""
    corrected: Mapping[str, Phrase] = {}
    """What these say in training, in place of the describer's words."""
    notes: Mapping[str, Mapping[str, Any]] = {}
    """Key -> what the file says of it to people."""

    def row(self, key: str) -> dict[str, Any]:
        """What the file says of a label, as the gallery writes it; empty if nothing."""
        marks = {"accept": self.accepted, "reject": self.rejected, "correct": self.corrected}
        mark = next((mark for mark, keys in marks.items() if key in keys), None)
        if mark is None:
            return {}
        slots = {"slots": [*self.corrected[key]]} if mark == "correct" else {}
        return {"key": key, "mark": mark, **slots, **self.notes.get(key, {})}

    @property
    def keys(self) -> frozenset[str]:
        """Of all labels that were reviewed."""
        return self.accepted | self.rejected | self.corrected.keys()


def read_reviews(path: str) -> Reviews:
    """Read a file of reviews.

    Args:
        path: The file; an empty text means no reviews.

    Raises:
        ConfigError: The file is missing, too large, or holds no reviews.
    """
    if not path:
        return Reviews()
    try:
        if Path(path).stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES >> 20} MiB")
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {str(content['format'])[:40]!r}, not {FORMAT!r}")
        found: dict[str, dict[str, Phrase | None]] = {"accept": {}, "reject": {}, "correct": {}}
        notes: dict[str, dict[str, Any]] = {}
        for row in content["marks"]:
            if not _KEY.fullmatch(row["key"]):
                raise ValueError(f"{str(row['key'])[:40]!r} is not the key of a label")
            found[row["mark"]][row["key"]] = _words(row) if row["mark"] == "correct" else None
            notes[row["key"]] = _note(row)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"vlm.reviews='{path}' cannot be read as reviews ({type(error).__name__}: {error}): "
            "export them from the gallery, mapo-gallery"
        ) from error
    for one, other in (("accept", "reject"), ("accept", "correct"), ("correct", "reject")):
        if both := found[one].keys() & found[other].keys():
            raise ConfigError(
                f"vlm.reviews='{path}' {one}s and {other}s the label {min(both)}: keep one"
            )
    words = {key: phrase for key, phrase in found["correct"].items() if phrase is not None}
    return Reviews(frozenset(found["accept"]), frozenset(found["reject"]), words, notes)


def _note(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says to people, cleaned."""
    note: dict[str, Any] = {
        name: clean_text(row[name], MAX_TEXT) for name in _NOTES if isinstance(row.get(name), str)
    }
    if isinstance(was := row.get("was"), list):
        note["was"] = [clean_text(str(slot), MAX_SLOT) for slot in was[: len(SLOTS)]]
    return note


def _words(row: Mapping[str, Any]) -> Phrase:
    """The corrected slots of a row."""
    slots = row["slots"]
    if not isinstance(slots, list) or len(slots) != len(SLOTS):
        raise ValueError(f"the corrected label {row['key']} has not {len(SLOTS)} slots")
    if not all(isinstance(slot, str) for slot in slots):
        raise TypeError(f"a slot of the corrected label {row['key']} is no text")
    phrase = Phrase(*(clean_text(slot, MAX_SLOT) for slot in slots))
    if not any(phrase):
        raise ValueError(f"the corrected label {row['key']} is empty: reject it instead")
    return phrase
