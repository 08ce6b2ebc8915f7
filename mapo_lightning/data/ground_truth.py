"""True motion of rendered videos, read from ``truth.jsonl`` beside them, to judge labels.

Training never reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mapo_lightning.types import VideoError

FILE = "truth.jsonl"
"""Written by ``envs/demo.py``: one line a video, ``{"video", "size", "paths"}``; for Meta-World
also ``task``, ``success`` and ``solved_at``, a frame."""

_UNSEEN = frozenset({"mocap"})
"""Bodies that the simulator is controlled by and that are never drawn."""
_MAX_BYTES = 256 << 20


class Moved(NamedTuple):
    """How far the parts of a scene moved within a window, on the screen."""

    parts: tuple[str, ...]
    shifts: NDArray[np.float64]
    """Displacement (right, down) from the first frame to the last, (P, 2), in percent of the frame
    width."""


class GroundTruth:
    """Paths of the moving parts of every rendered video of some folders.

    Args:
        folders: Folders of the videos; those without the file are left out.

    Raises:
        VideoError: A file exists but is not of this kind.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self._paths: dict[Path, tuple[float, dict[str, NDArray[np.float64]]]] = {}
        for folder in sorted(set(folders)):
            file = folder / FILE
            if file.is_file():
                self._read(file)

    def __len__(self) -> int:
        """Number of videos whose true motion is known."""
        return len(self._paths)

    def moved(self, video: Path, first: int, last: int) -> Moved | None:
        """How far every part moves from one frame to another; None if it is unknown."""
        if video not in self._paths:
            return None
        size, paths = self._paths[video]
        known = {name: path for name, path in paths.items() if 0 <= first <= last < len(path)}
        if not known:
            return None
        shifts = [100.0 * (path[last] - path[first]) / size for path in known.values()]
        return Moved(tuple(known), np.array(shifts))

    def _read(self, file: Path) -> None:
        try:
            if file.stat().st_size > _MAX_BYTES:
                raise ValueError(f"it has more than {_MAX_BYTES >> 20} MiB")
            for line in file.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                paths = {
                    str(name): np.array(path, np.float64).reshape(-1, 2)
                    for name, path in row["paths"].items()
                    if name not in _UNSEEN
                }
                size = float(row["size"])
                if not size > 0.0 or not all(np.isfinite(path).all() for path in paths.values()):
                    raise ValueError("a number is out of range")
                self._paths[file.parent / str(row["video"])] = size, paths
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise VideoError(
                f"'{file}' does not hold the true motion of rendered videos ({error}): move it "
                "away, or render the videos again"
            ) from error
