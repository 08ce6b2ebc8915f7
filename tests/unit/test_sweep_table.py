"""The table of a sweep: statistics compared with values computed by hand, and its texts."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from mapo_lightning.run import finished
from mapo_lightning.run.sweep import table
from mapo_lightning.run.sweep.plan import Sweep, read_sweep
from mapo_lightning.training.across_seeds import across_seeds


def test_the_mean_has_students_interval() -> None:
    found = across_seeds([10.0, 12.0, 17.0])
    assert found.seeds == 3
    assert found.mean == pytest.approx(13.0)
    # variance (9 + 1 + 16) / 2 = 13; t(0.975, 2) = 4.302653; half = 4.302653 * sqrt(13 / 3)
    assert found.interval == pytest.approx((13 - 8.956617, 13 + 8.956617), abs=1e-4)


def test_the_interquartile_mean_leaves_a_quarter_out_at_each_end() -> None:
    assert across_seeds([1.0, 2.0, 3.0, 100.0]).iqm == pytest.approx(2.5)
    assert across_seeds([0.0, 5.0, 6.0, 7.0, 1000.0]).iqm == pytest.approx(6.0)
    assert across_seeds([1.0, 2.0, 9.0]).iqm == pytest.approx(4.0)


def test_the_bootstrap_is_the_percentile_one() -> None:
    # Two seeds: a resample is (0, 0), one of each, or (8, 8), with weights 1/4, 1/2, 1/4.
    assert across_seeds([0.0, 8.0]).iqm_interval == (0.0, 8.0)
    values = list(np.random.default_rng(1).normal(50, 5, 20))
    low, high = across_seeds(values).iqm_interval or (0, 0)
    assert low < across_seeds(values).iqm < high
    assert across_seeds(values) == across_seeds(values)
    assert 2 < high - low < 10


def test_one_seed_has_no_interval_and_none_is_an_error() -> None:
    assert across_seeds([3.0]) == (1, 3.0, None, 3.0, None)
    with pytest.raises(ValueError, match="no seed"):
        across_seeds([])


@pytest.fixture
def sweep() -> Sweep:
    found = read_sweep(["env=toy", "method=mapo,apv", "seed=0..1"])
    assert found is not None
    return found


def play(run: Path, score: float, success: bool) -> None:
    run.mkdir()
    policies = {
        "random": {"return": 1.0, "success": 0.0},
        "still": {"return": score / 10},
        "agent": {"return": score, "success": float(success)},
    }
    (run / "evaluation.json").write_text(json.dumps({"policies": policies}))
    finished.write(run, "all")


def test_a_row_is_a_setting_over_its_seeds(sweep: Sweep, tmp_path: Path) -> None:
    play(tmp_path / "method=mapo+seed=0", 10.0, True)
    play(tmp_path / "method=mapo+seed=1", 20.0, False)
    play(tmp_path / "method=apv+seed=1", 7.0, True)
    (tmp_path / "method=apv+seed=1/finished.json").unlink()  # played, and then killed
    mapo, apv = table.rows_of(sweep, tmp_path)
    assert (mapo.setting, mapo.finished, mapo.points) == ({"method": "mapo"}, ("0", "1"), 2)
    assert mapo.figures["return"].mean == 15.0
    assert mapo.success == 0.5
    assert mapo.floors == {"random": 1.0, "still": 1.5}
    assert (apv.finished, apv.points, apv.figures) == ((), 2, {})
    lines = list(csv.DictReader(io.StringIO(table.as_csv([mapo, apv]))))
    assert lines[0]["return"] == "15.0"
    # half = t(0.975, 1) * sqrt(50 / 2) = 12.7062 * 5
    assert float(lines[0]["return_low"]) == pytest.approx(15 - 63.531, abs=1e-3)
    assert lines[0]["return_still"] == "1.5"
    assert (lines[1]["finished"], lines[1]["return"]) == ("0", "")
    text = table.as_markdown([mapo, apv])
    shown = "| `mapo` | 2 of 2 | 15.0 [-48.5, 78.5] | 15.0 [10.0, 20.0] | 50% | 1.0 | 1.5 |"
    assert shown in text.splitlines()
    assert "| `apv` | 0 of 2 | - | - | - | - | - |" in text.splitlines()
    told = table.metrics([mapo, apv])
    assert told["method mapo/return"] == 15.0
    assert told["method mapo/return_seeds"] == 2.0


def test_runs_without_a_return_say_what_is_finished(sweep: Sweep, tmp_path: Path) -> None:
    assert "No run is finished." in table.as_markdown(table.rows_of(sweep, tmp_path))
    for point in sweep.points[:3]:
        (tmp_path / point.name).mkdir()
        finished.write(tmp_path / point.name, "label")
    text = table.as_markdown(table.rows_of(sweep, tmp_path))
    assert "| `apv` | 1 of 2 |" in text.splitlines()
    assert "leave no figure" in text


def test_pre_trained_models_are_compared_by_their_dreams(sweep: Sweep, tmp_path: Path) -> None:
    run = tmp_path / sweep.points[0].name
    (run / "pretrain").mkdir(parents=True)
    rows = [
        {"dream": name, "frames_ahead": ahead, "mean": 10.0 * ahead, "low": 0.0, "high": 1.0}
        for name in ("told", "untold - told", "still") for ahead in (1, 5)
    ]  # fmt: skip
    (run / "pretrain/told.json").write_text(json.dumps(rows))
    finished.write(run, "pretrain")
    found = table.rows_of(sweep, tmp_path)[0].figures
    assert {name: value.mean for name, value in found.items()} == {
        "error of dreams, told": 50.0,
        "error of dreams, untold - told": 50.0,
    }
    assert "thousandths" in table.as_markdown(table.rows_of(sweep, tmp_path))


def test_the_files_hold_the_table(sweep: Sweep, tmp_path: Path) -> None:
    play(tmp_path / "method=mapo+seed=0", 10.0, True)
    rows = table.rows_of(sweep, tmp_path)
    assert [path.read_text() for path in table.save(rows, tmp_path)] == [
        table.as_csv(rows),
        table.as_markdown(rows),
    ]
