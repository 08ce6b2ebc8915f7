"""A run that is killed and resumed equals one that was not, bit for bit, on a CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from killing import FINETUNE, PRETRAIN, check_kills


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_pretraining(workers: int, tmp_path: Path) -> None:
    words = [*PRETRAIN, "pretrain.updates=14", "callbacks.checkpoint_every=3"]
    check_kills(
        tmp_path, [*words, f"data.workers={workers}"], "pretrain", 3, np.random.default_rng(7)
    )


PLAN = ["agent.plan={kind: cem, where: both, population: 8, elites: 2, proposals: 2, horizon: 3}"]


@pytest.mark.slow
@pytest.mark.parametrize("plan", [[], PLAN], ids=["actor", "planner"])
def test_finetuning_in_the_middle_of_episodes(plan: list[str], tmp_path: Path) -> None:
    words = [*FINETUNE, *plan, "finetune.agent_steps=170", "callbacks.checkpoint_every=4"]
    words += ["env.num_envs=3", "evaluate.every=8"]
    check_kills(tmp_path, words, "finetune", 3, np.random.default_rng(8))
