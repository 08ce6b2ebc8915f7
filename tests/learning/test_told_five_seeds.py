"""The shipped pre-trainings dream, and the phrases lead their dreams: for five of five seeds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.learning


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the videos and labels that all seeds share."""
    return tmp_path_factory.mktemp("dream")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("env", ["demo", "toy"])
def test_told_beats_what_needs_no_model_and_the_untold(films: Path, env: str, seed: int) -> None:
    words = [
        "stage=pretrain",
        f"env={env}",
        f"seed={seed}",
        f"data.root={films / env}",
        f"work_dir={films / 'cache'}",
        f"run_dir={films / f'{env}{seed}'}",
        "tracking.enabled=false",
        "callbacks.gallery=0",
        "callbacks.quality=0",
    ]
    subprocess.run([sys.executable, str(ROOT / "train.py"), *words], cwd=ROOT, check=True)
    rows = json.loads((films / f"{env}{seed}" / "pretrain" / "told.json").read_text())
    found = {(row["dream"], row["frames_ahead"]): row for row in rows}
    for ahead in (1, 5, 10):  # the gate of docs/protocols/demo.md
        for yardstick in ("copy", "still_scene", "mean_picture"):
            assert found["told", ahead]["mean"] < found[yardstick, ahead]["mean"], yardstick
    assert found["untold - told", 5]["low"] > 0
    assert found["mistold - told", 5]["low"] > 0
