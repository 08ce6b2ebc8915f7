"""``--preflight``: real updates of each phase, a report, and a refusal of what cannot fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mapo_lightning.run import estimate
from mapo_lightning.run.main import main

TINY = ["trainer=debug", "env=toy", "world_model.image.channels=[4]"]


@pytest.mark.slow
def test_a_run_is_measured_and_one_that_cannot_fit_is_refused(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*TINY, "--preflight"]) == 0
    said = capsys.readouterr().out
    found = {
        name: float(hours)
        for name, hours in re.findall(r"^  ([\w -]+): ([\d.]+) hours", said, re.M)
    }
    assert set(found) == {"pre-training", "fine-tuning", "in all"}
    assert re.search(r"^  memory: [\d.]+ GB of [\d.]+ GB$", said, re.M)
    assert re.search(r"^  disk: [\d.]+ GB \(checkpoints [\d.]+, replay [\d.]+, films", said, re.M)
    assert re.search(r"describer: [\d,]+ questions about the videos", said)
    assert not list(in_tmp.glob("runs/*/config.yaml"))  # no run was begun
    assert not list(in_tmp.glob("runs/mlflow.db"))
    # The videos and the scan are there now: the same again, of a run that no disk can hold.
    huge = ["replay.capacity=1000000000000", "finetune.agent_steps=1000000000000"]
    assert main([*TINY, *huge, "--preflight", "stage=finetune"]) == 2
    assert re.search(
        r"^error: this run does not fit the disk: it needs \d+\.\d GB, and [\d.]+ GB are free",
        capsys.readouterr().err,
        re.M,
    )
    monkeypatch.setattr(estimate, "_memory", lambda: 1 << 20)
    assert main([*TINY, "--preflight", "stage=finetune"]) == 2
    assert "this run does not fit the memory" in capsys.readouterr().err


def test_only_trainings_are_measured(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "data=toy", "stage=label", "label.dry=true", "--preflight"]) == 2
    assert "--preflight measures trainings" in capsys.readouterr().err
