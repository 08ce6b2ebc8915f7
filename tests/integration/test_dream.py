"""A short pre-training dreams, and the phrases lead its dream; five seeds in tests/learning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from program import train

pytestmark = pytest.mark.slow


def test_the_toy_is_dreamt_and_told_errs_least(tmp_path: Path) -> None:
    words = ["env=toy", "stage=pretrain", "seed=0", "pretrain.updates=400", "run_dir=run"]
    words += [f"data.root={tmp_path}/toy", "callbacks.gallery=0", "callbacks.quality=0"]
    said = train(tmp_path, *words, "callbacks.progress=false")
    assert "The phrases lead the dream" in said
    rows = json.loads((tmp_path / "run/pretrain/told.json").read_text())
    found = {(row["dream"], row["frames_ahead"]): row for row in rows}
    told = found["told", 5]["mean"]
    for other in ("untold", "mistold", "copy", "still_scene", "mean_picture"):
        assert told < found[other, 5]["mean"], other
    assert found["untold - told", 5]["low"] > 0
    again = train(
        tmp_path, "checkpoint=run/pretrain/last.ckpt", "run_dir=told",
        script=str(Path(__file__).parents[2] / "mapo_lightning/told.py"),
    )  # fmt: skip
    assert said.strip().splitlines()[-1] in again  # the same sentence, from the checkpoint
