"""A short pre-training dreams, and the phrases lead its dream; five seeds in tests/learning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from program import DREAMS, SMALL, TOLD, train

pytestmark = pytest.mark.slow


def test_the_toy_is_dreamt_and_told_errs_least(tmp_path: Path) -> None:
    words = ["env=toy", "stage=pretrain", "seed=0", "pretrain.updates=400", "run_dir=run"]
    words += [f"data.root={tmp_path}/toy", "callbacks.gallery=0", "callbacks.quality=0"]
    said = train(tmp_path, *words, "callbacks.progress=false")
    assert "The phrases lead the dream" in said
    rows = json.loads((tmp_path / "run/pretrain/told.json").read_text())
    found = {(row["dream"], row["frames_ahead"]): row for row in rows}
    told, told_at_once = found["told", 5]["mean"], found["told", 1]["mean"]
    for other in ("untold", "mistold", "copy", "still_scene", "mean_picture"):
        assert told < found[other, 5]["mean"], other
    assert found["untold - told", 5]["low"] > 0
    # The same from the checkpoint: the sentence, the figures, and a table over two models.
    twice = ["checkpoint=run/pretrain/last.ckpt"] * 2
    again = train(tmp_path, *twice, "run_dir=told", script=TOLD)
    assert again.count(said.strip().splitlines()[-1]) == 2
    for number in ("1", "2"):
        assert json.loads((tmp_path / "told" / number / "told.json").read_text()) == rows
    together = (tmp_path / "told/told.md").read_text()
    assert together.startswith("Means over 2 models")
    (row,) = (line for line in together.splitlines() if line.startswith("| told |"))
    assert float(row.split()[3]) == pytest.approx(told_at_once, abs=6e-3)  # both are rounded
    # The same dreams, judged: they obey the phrases, and so does the table over both.
    judged = train(tmp_path, *twice, "run_dir=judged", script=DREAMS)
    assert judged.count((tmp_path / "judged/1/codebook.md").read_text()) == 2
    assert (tmp_path / "judged/2/codebook.png").stat().st_size > 10_000
    rows = json.loads((tmp_path / "judged/1/dreams.json").read_text())
    keys = ("aspect", "dream", "measure", "frames_ahead")
    figures = {tuple(row[key] for key in keys): row for row in rows}
    for way in ("random", "swapped", "negated", "null"):
        assert figures["control", way, "control_moving", 4]["low"] > 0, way
    psnr = {who: figures["looks", who, "psnr_moving", 5]["mean"] for who in ("dream", "copy")}
    assert psnr["dream"] > psnr["copy"]
    means = json.loads((tmp_path / "judged/dreams.json").read_text())
    assert [row["mean"] for row in means] == [row["mean"] for row in rows]  # twice the same model


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["callbacks.told=4"], "mapo-told needs checkpoint=PATH of a pre-trained model"),
        (["checkpoint=none.ckpt"], "no checkpoint at 'none.ckpt'"),
    ],
)
def test_what_cannot_be_measured_is_said(tmp_path: Path, words: list[str], sentence: str) -> None:
    assert sentence in train(tmp_path, *words, code=2, script=TOLD)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["evaluate.dreams=4"], "mapo-dreams needs checkpoint=PATH"),
        (["checkpoint=none.ckpt"], "no checkpoint at 'none.ckpt'"),
    ],
)
def test_what_cannot_be_judged_is_said(tmp_path: Path, words: list[str], sentence: str) -> None:
    assert sentence in train(tmp_path, *words, code=2, script=DREAMS)


def test_a_dream_that_no_phrase_drives_is_refused(tmp_path: Path) -> None:
    words = [*SMALL, "stage=pretrain", "method=apv", "demo.clips_per_scene=4", "demo.frames=30"]
    train(tmp_path, *words, "run_dir=run")
    said = train(tmp_path, "checkpoint=run/pretrain/last.ckpt", code=2, script=TOLD)
    assert "was pre-trained with method=apv, whose dreams no phrase drives" in said
