"""Runs train.py, and scripts around it, as a user does: in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]
TRAIN = str(ROOT / "train.py")
TOLD = str(ROOT / "mapo_lightning" / "told.py")
PATIENCE = 900  # seconds after which a program counts as hanging, on a busy machine too
SMALL = ["trainer=debug", "env=toy", "world_model.image.channels=[4]"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# The folder of a run that another test started in this process.
ENVIRONMENT.pop("MAPO_RUN_DIR", None)


def start(folder: Path, *command: str, said: int | IO[str] | None = None) -> subprocess.Popen[str]:
    """Start Python with ``command`` in ``folder``; ``said`` takes what it says.

    It is the head of a process group, which `end` ends.
    """
    return subprocess.Popen(
        [sys.executable, *command], cwd=folder, env=ENVIRONMENT, stdout=said, stderr=said,
        text=True, start_new_session=True,
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> None:
    """End a program and all processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def train(folder: Path, *words: str, code: int = 0, script: str = TRAIN) -> str:
    """Run train.py or another script in ``folder``; returns what it said."""
    with tempfile.TemporaryFile("w+") as file:
        process = start(folder, script, *words, said=file)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=PATIENCE)
        returned = process.poll()
        end(process)
        file.seek(0)
        said = file.read()
    assert returned is not None, f"it did not end in {PATIENCE} s: {said}"
    assert returned == code, said
    return said
