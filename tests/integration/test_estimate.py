"""``--preflight``: real updates of each phase, a report, and a refusal of what cannot fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mapo_lightning.config.compose import compose
from mapo_lightning.run import estimate
from mapo_lightning.run.config import RunConfig, conf_folder
from mapo_lightning.run.episode_player import EpisodePlayer
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keep_best", "first", "in_training"),
    [(False, 0, 3), (True, 0, 3), (True, 6, 2), (False, 10, 2), (False, 50, 1)],
)
def test_a_run_plays_and_films_as_often_as_estimated(
    keep_best: bool,
    first: int,
    in_training: int,
    in_tmp: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twelve updates, evaluated every five."""
    played: list[int] = []
    play = EpisodePlayer.__call__

    def counting(*args: Any) -> Any:
        episodes, films = play(*args)
        played.append(len(films))
        return episodes, films

    monkeypatch.setattr(EpisodePlayer, "__call__", counting)
    words = [*TINY, "stage=finetune", "run_dir=run", f"evaluate.keep_best={keep_best}"]
    words += ["evaluate.every=5", f"evaluate.first={first}"]
    words += ["evaluate.episodes=2", "evaluate.videos=3"]
    words += ["finetune.initial_updates=2", "finetune.train_every=10"]
    cfg = compose(words, RunConfig, conf_folder()).config
    steps = cfg.finetune.prefill + 10 * cfg.finetune.train_every
    assert main([*words, f"finetune.agent_steps={steps}"]) == 0
    cfg = compose([*words, f"finetune.agent_steps={steps}"], RunConfig, conf_folder()).config
    times, films = estimate.evaluations(cfg.evaluate, cfg.finetune.updates(1))
    assert len(played) == times == in_training + 3 + 4 * keep_best
    assert sum(played) + sum(played[-4:]) * keep_best == films


def test_only_trainings_are_measured(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "data=toy", "stage=label", "label.dry=true", "--preflight"]) == 2
    assert "--preflight measures trainings" in capsys.readouterr().err
