"""Agents are ranked by their dreams from the same states of the same task, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mapo_lightning.config.compose import compose
from mapo_lightning.run import judged_checkpoints
from mapo_lightning.run.config import RunConfig, conf_folder
from mapo_lightning.run.judged_checkpoints import Returns, judge_checkpoints
from mapo_lightning.types import ConfigError


def agents(*words: str) -> list[tuple[RunConfig, Path]]:
    """One agent of the toy for each setting."""
    cfgs = (compose(["env=toy", word], RunConfig, conf_folder()).config for word in words)
    return [(cfg, Path(f"{number}/last.ckpt")) for number, cfg in enumerate(cfgs)]


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("env.action_repeat=4", "toy/disc (4 frames a step"),
        ("env.time_limit=9", "episodes of 9 agent steps"),
        ("env.name=disc_anywhere", "toy/disc_anywhere"),
        ("env.kind=gym", "gym/disc"),
    ],
)
def test_agents_of_different_tasks_are_not_ranked(word: str, found: str) -> None:
    with pytest.raises(ConfigError, match="3 or more of one task") as error:
        judge_checkpoints(agents("seed=0", word, "seed=1"))
    assert found in str(error.value)
    assert "toy/disc (2 frames a step" in str(error.value)


def test_all_agents_play_from_the_same_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they were kept by evaluations with other seeds."""
    asked: list[tuple[int, int]] = []

    def returns_of(cfg: RunConfig, path: Path, seed: int, contexts: int) -> Returns:
        asked.append((seed, contexts))
        return Returns(*np.random.default_rng(len(asked)).normal(size=(2, contexts, 12)))

    monkeypatch.setattr(judged_checkpoints, "returns_of", returns_of)
    three = agents("evaluate.seed=1000", "evaluate.seed=5000", "evaluate.dreams=60")
    report = judge_checkpoints(three)
    assert len(set(asked)) == 1
    ((seed, contexts),) = set(asked)
    assert seed > 5000 + 10
    assert contexts == 60
    assert report.rows
    asked.clear()
    judge_checkpoints(agents(f"evaluate.seed={2**32 - 10}", "seed=1", "seed=2"))
    assert {seed for seed, _ in asked} == {0}  # no seeds are left behind the last
