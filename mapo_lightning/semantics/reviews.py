"""What a person thinks of labels: accepted or rejected, as a file that the gallery writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

from mapo_lightning.types import ConfigError

FORMAT = "mapo-label-marks-1"
"""First field of such a file."""
_MAX_BYTES = 64 << 20
_KEY = re.compile(r"[0-9a-f]{32}")


class Marks(NamedTuple):
    """Keys of labels that somebody has looked at."""

    accepted: frozenset[str] = frozenset()
    rejected: frozenset[str] = frozenset()
    """Count as null in training."""


def read_marks(path: str) -> Marks:
    """Read a file of marks.

    Args:
        path: The file; an empty text means that there are no marks.

    Raises:
        ConfigError: The file is missing, too large, or not one of marks.
    """
    if not path:
        return Marks()
    try:
        if Path(path).stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES >> 20} MiB")
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {str(content['format'])[:40]!r}, not {FORMAT!r}")
        found: dict[str, set[str]] = {"accept": set(), "reject": set()}
        for row in content["marks"]:
            if not _KEY.fullmatch(row["key"]):
                raise ValueError(f"{str(row['key'])[:40]!r} is not the key of a label")
            found[row["mark"]].add(row["key"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"vlm.reviews='{path}' cannot be read as reviews ({type(error).__name__}: {error}): "
            "export them from the gallery, mapo-gallery"
        ) from error
    both = found["accept"] & found["reject"]
    if both:
        raise ConfigError(
            f"vlm.reviews='{path}' accepts and rejects the label {min(both)}: keep one"
        )
    return Marks(frozenset(found["accept"]), frozenset(found["reject"]))
