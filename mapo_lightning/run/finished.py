"""The mark that a run leaves in its folder as its last act, when nothing is left to do."""

from __future__ import annotations

import json
from pathlib import Path

from mapo_lightning.files import atomic_write

MARK = "finished.json"


def write(folder: Path, stage: str) -> None:
    """Say that all of a stage is done: checkpoints, evaluations and MLflow's runs."""
    with atomic_write(folder / MARK, durable=True) as draft:
        draft.write_text(json.dumps({"stage": stage}) + "\n", encoding="utf-8")


def remove(folder: Path) -> None:
    """Take the mark back, where a run is begun again."""
    (folder / MARK).unlink(missing_ok=True)


def is_finished(folder: Path) -> bool:
    """Whether the run in a folder has come to its end."""
    return (folder / MARK).is_file()
