"""A run that is killed and resumed equals one that was not, bit for bit, on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killing import (
    FINETUNE,
    PRETRAIN,
    clocks,
    curves,
    differences,
    experience,
    lives,
    runs,
    state_of,
)

STORE = ["tracking.enabled=true", "tracking.system_metrics=false"]


def check_kills(place: Path, words: list[str], phase: str, kills: int, rng: Any) -> dict[str, int]:
    """Kill as many runs at random moments, resume them, and compare them with one left alone."""
    words = [*words, f"work_dir={place}/work", "run_dir=run"]
    whole = {"folder": f"{place}/whole", "words": [*words, *STORE]}
    (first,) = lives(place, [whole])
    assert first["code"] == 0, (place / "whole/said.txt").read_text()
    moments = first["moments"]
    assert moments["resumable"]
    jobs, drawn = [], []
    for number in range(kills):
        kill = int(rng.integers(moments["resumable"] + 1, moments["count"] + 1))
        drawn.append(moments["names"][kill])
        job = whole | {
            "folder": f"{place}/{number}",
            "kill": kill,
            "deliver": bool(rng.integers(2)),
        }
        jobs += [job, {"folder": f"{place}/{number}", "words": ["resume=run"]}]
    codes = [found["code"] for found in lives(place, jobs)]
    expected = state_of(place / "whole/run" / phase / "last.ckpt")
    for number in range(kills):
        folder = place / f"{number}"
        said = f"killed at '{drawn[number]}': " + (folder / "said.txt").read_text()
        assert codes[2 * number : 2 * number + 2] == [-9, 0], said
        content = state_of(folder / "run" / phase / "last.ckpt")
        assert list(differences(expected, content)) == [], said
        check_curves(place / "whole", folder, phase, said)
        if phase == "finetune":
            assert experience(folder / "run/replay/rank0") == experience(
                place / "whole/run/replay/rank0"
            ), said
    return {name: drawn.count(name) for name in sorted(set(drawn))}


def check_curves(whole: Path, folder: Path, phase: str, said: str) -> None:
    """One MLflow run of the training, with the same points as the one of a run left alone."""
    found = []
    for place in (whole, folder):
        last = torch.load(place / "run" / phase / "last.ckpt", weights_only=True)
        store, run = place / "runs/mlflow.db", last["mapo"]["mlflow_run"]
        assert runs(store) == [(phase, "FINISHED"), ("run", "FINISHED")], said
        found.append((curves(store, run), clocks(store, run)))
    assert found[0][0] == found[1][0], said
    assert found[0][1] == found[1][1], said
    assert len(found[0][0]) > 100


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_pretraining(workers: int, tmp_path: Path) -> None:
    words = [*PRETRAIN, "pretrain.updates=14", "callbacks.checkpoint_every=3"]
    check_kills(
        tmp_path, [*words, f"data.workers={workers}"], "pretrain", 3, np.random.default_rng(7)
    )


@pytest.mark.slow
def test_finetuning_in_the_middle_of_episodes(tmp_path: Path) -> None:
    words = [*FINETUNE, "finetune.agent_steps=170", "callbacks.checkpoint_every=4"]
    words += ["env.num_envs=3", "evaluate.every=8"]
    check_kills(tmp_path, words, "finetune", 3, np.random.default_rng(8))
