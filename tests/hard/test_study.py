"""A study of two methods and three seeds is killed twice, stopped once, and comes to its end."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from program import PATIENCE, SMALL, TRAIN, end, start, train
from sweeps import checkpoints, finished, kill_when, recorded, repeated_points

from mapo_lightning.training.across_seeds import across_seeds

pytestmark = pytest.mark.hard

METHODS, SEEDS = ("mapo", "apv"), (0, 1, 2)
WORDS = [
    *SMALL, "method=mapo,apv", "seed=0..2", "run_dir=runs/study", "launch.jobs=2",
    "tracking.enabled=true", "finetune.agent_steps=300", "callbacks.checkpoint_every=5",
    "callbacks.rollout_every=1000",
]  # fmt: skip


def test_every_run_of_a_study_comes_to_its_end_once(tmp_path: Path) -> None:
    folder, store = tmp_path / "runs/study", tmp_path / "runs/mlflow.db"
    kill_when(tmp_path, WORDS, lambda: bool(checkpoints(folder)), runs_too=True)
    # The second time, its runs find out by themselves; one is finished by then.
    kill_when(tmp_path, WORDS, lambda: bool(finished(folder)), runs_too=False)
    before = finished(folder)
    with (tmp_path / "said.txt").open("w") as said:
        process = start(tmp_path, TRAIN, *WORDS, said=said)
        deadline = time.monotonic() + PATIENCE
        while len(finished(folder)) < 3:
            assert time.monotonic() < deadline
            assert process.poll() is None, (tmp_path / "said.txt").read_text()
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=PATIENCE) == 143
        end(process)
    said_text = (tmp_path / "said.txt").read_text()
    assert f"stopped by SIGTERM in the middle of the sweep; resume={folder} goes on" in said_text
    before |= finished(folder)
    told = train(tmp_path, "resume=runs/study")
    names = {f"method={method}+seed={seed}" for method in METHODS for seed in SEEDS}
    after = finished(folder)
    assert set(after) == names
    assert all(after[name] == when for name, when in before.items())
    check_store(store, names)
    check_table(folder)
    assert re.search(r"^\| `apv` \| 3 of 3 \|", told, re.MULTILINE)


def check_store(store: Path, names: set[str]) -> None:
    """One parent, under it one run per point, under each of these one per phase; no point twice."""
    kinds = ("pretrain", "finetune")
    phases = [(f"{name}/{phase}", "FINISHED", name) for phase in kinds for name in names]
    runs = [(name, "FINISHED", "study") for name in names]
    assert recorded(store) == sorted([("study", "FINISHED", ""), *runs, *phases])
    assert repeated_points(store, "train/actor", 219) == 0


def check_table(folder: Path) -> None:
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [row["method"] for row in rows] == list(METHODS)
    for row in rows:
        played = [
            json.loads((folder / f"method={row['method']}+seed={seed}/evaluation.json").read_text())
            for seed in SEEDS
        ]
        found = across_seeds([one["policies"]["agent"]["return"] for one in played])
        assert float(row["return"]) == pytest.approx(found.mean)
        assert found.interval is not None
        assert float(row["return_low"]) == pytest.approx(found.interval[0])
