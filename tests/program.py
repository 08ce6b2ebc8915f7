"""Runs train.py, and scripts around it, as a user does: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRAIN = str(ROOT / "train.py")
SMALL = ["trainer=debug", "env=toy", "world_model.image.channels=[4,8,16]"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# The folder of a run that another test started in this process.
ENVIRONMENT.pop("MAPO_RUN_DIR", None)


def train(folder: Path, *words: str, code: int = 0, script: str = TRAIN) -> str:
    """Run train.py or another script in ``folder``; returns what it said."""
    result = subprocess.run(
        [sys.executable, script, *words],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    said = result.stdout + result.stderr
    assert result.returncode == code, said
    return said
