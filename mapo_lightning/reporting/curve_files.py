"""Reads the values that a run keeps in its folder, beside MLflow or without it.

Each phase writes ``curves.csv``: a row for every value, with the columns name, step, value and
time, in seconds since 1970.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import NamedTuple

from mapo_lightning.tracking.histories import Curve

FILE = "curves.csv"
RETURN = "eval/return"
"""Name of the mean return of an evaluation."""


class Kept(NamedTuple):
    """What the file of a phase tells."""

    curve: Curve
    """Environment frames and mean return of every evaluation."""
    seconds: float | None
    """From the first value to the last; None where there are none."""


def kept_in(phase: Path) -> Kept:
    """Read the file of a phase; one that is missing tells nothing.

    Of a step that was written twice, as after a kill, the later value counts. A row that was cut
    off is left out.

    Args:
        phase: Folder of the phase.
    """
    path = phase / FILE
    found: dict[int, float] = {}
    times: list[float] = []
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            for row in csv.DictReader(file):
                try:
                    step, value = int(row["step"]), float(row["value"])
                    times.append(float(row["time"]))
                except (KeyError, TypeError, ValueError):
                    continue
                if row["name"] == RETURN and math.isfinite(value):
                    found[step] = value
    seconds = max(times) - min(times) if times else None
    return Kept(tuple(sorted(found.items())), seconds)
