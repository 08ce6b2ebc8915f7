"""Curves without MLflow: a file that only grows, and TensorBoard."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from mapo_lightning.tracking import curves
from mapo_lightning.tracking.curves import COLUMNS, CurvesFile, local_loggers
from mapo_lightning.tracking.logger import check_store
from mapo_lightning.tracking.settings import TrackingConfig
from mapo_lightning.types import ConfigError


def rows(path: Path) -> list[tuple[str, int, float]]:
    with path.open(encoding="utf-8", newline="") as file:
        head, *found = csv.reader(file)
    assert tuple(head) == COLUMNS
    return [(name, int(step), float(value)) for name, step, value, _ in found]


def test_every_value_is_a_row_and_exact(tmp_path: Path) -> None:
    file = CurvesFile(tmp_path / "pretrain/curves.csv")
    file.log_metrics({"train/image": 0.1 + 0.2, 'odd "name", here': float("nan")}, 3)
    file.log_metrics({"train/image": 1e-300}, 4)
    found = rows(file.path)
    assert found[0] == ("train/image", 3, 0.1 + 0.2)
    assert found[1][0] == 'odd "name", here'
    assert found[2] == ("train/image", 4, 1e-300)
    assert file.rows == 3


def test_what_was_written_is_never_written_again(tmp_path: Path) -> None:
    file = CurvesFile(tmp_path / "curves.csv")
    file.log_metrics({"a": 1.0}, 1)
    before = file.path.read_bytes()
    file.log_metrics({"new": 2.0}, 2)  # another column would have rewritten a table
    assert file.path.read_bytes().startswith(before)
    file.finalize("success")
    file.log_metrics({"late": 3.0}, 3)
    assert [name for name, *_ in rows(file.path)] == ["a", "new", "late"]


@pytest.mark.parametrize("cut", [0, 5])
def test_a_resumed_run_goes_on_behind_its_checkpoint(cut: int, tmp_path: Path) -> None:
    """The killed one has written more, and perhaps half a row."""
    killed = CurvesFile(tmp_path / "curves.csv")
    for step in range(6):
        killed.log_metrics({"loss": float(step)}, step)
        if step == 3:
            checkpoint = killed.rows
    text = killed.path.read_bytes()
    killed.path.write_bytes(text[: len(text) - cut])
    again = CurvesFile(killed.path)
    again.resume(checkpoint)
    for step in range(4, 8):
        again.log_metrics({"loss": float(step)}, step)
    assert rows(again.path) == [("loss", step, float(step)) for step in range(8)]
    assert again.rows == 8


def test_a_start_from_the_beginning_forgets_an_earlier_one(tmp_path: Path) -> None:
    """A job that was killed before its first checkpoint starts again in the same folder."""
    CurvesFile(tmp_path / "curves.csv").log_metrics({"loss": 1.0}, 1)
    again = CurvesFile(tmp_path / "curves.csv")
    again.log_metrics({"loss": 2.0}, 1)
    assert rows(again.path) == [("loss", 1, 2.0)]


def test_a_disk_that_takes_nothing_stops_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    CurvesFile(tmp_path / "file/curves.csv").log_metrics({"loss": 1.0}, 1)
    assert "values could not be written" in caplog.text


def test_settings_say_where_curves_go(tmp_path: Path) -> None:
    (file,) = local_loggers(TrackingConfig(enabled=False), tmp_path, "finetune")
    assert isinstance(file, CurvesFile)
    assert file.path == tmp_path / "finetune/curves.csv"
    assert local_loggers(TrackingConfig(csv=False), tmp_path, "finetune") == []


def test_a_missing_tensorboard_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without(name: str, *args: Any) -> Any:
        return None if name == "tensorboard" else importlib.util.find_spec(name)

    monkeypatch.setattr(curves.importlib.util, "find_spec", without)
    asked = TrackingConfig(enabled=False, tensorboard=True)
    with pytest.raises(ConfigError, match=r"pip install 'mapo-lightning\[tensorboard\]'"):
        check_store(asked)
    check_store(TrackingConfig(enabled=False))


@pytest.mark.slow
def test_tensorboard_gets_the_same_values(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = TrackingConfig(enabled=False, csv=False, tensorboard=True)
    folder = tmp_path / "tensorboard/pretrain"

    def write(resumed_at: int | None, steps: range) -> None:
        (board,) = local_loggers(cfg, tmp_path, "pretrain", resumed_at)
        for step in steps:
            board.log_metrics({"train/image": step / 4}, step)
        board.finalize("success")

    write(None, range(6))
    write(3, range(4, 8))  # killed after 5, resumed from a checkpoint at 3
    seen = EventAccumulator(str(folder)).Reload().Scalars("train/image")
    assert [(one.step, one.value) for one in seen] == [(step, step / 4) for step in range(8)]
