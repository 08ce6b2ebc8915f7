"""A run that is killed and resumed equals one that was not, bit for bit, on a CPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from killing import FINETUNE, PRETRAIN, TINY, check_kills, differences
from program import train

from mapo_lightning.training.checkpoint import read_checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_pretraining(workers: int, tmp_path: Path) -> None:
    words = [*PRETRAIN, "pretrain.updates=14", "callbacks.checkpoint_every=3"]
    check_kills(
        tmp_path, [*words, f"data.workers={workers}"], "pretrain", 3, np.random.default_rng(7)
    )


PLAN = ["agent.plan={kind: cem, where: both, population: 8, elites: 2, proposals: 2, horizon: 3}"]


SHORT = [
    "method=ivideogpt_semantic", "token_world.tokenizer.channels=[8,32,32]",
    "token_world.transformer={layers: 1, width: 32, heads: 2, mlp: 32}", "agent.mbpo.hidden=32",
]  # fmt: skip


@pytest.mark.slow
def test_both_phases_of_a_token_world(tmp_path: Path) -> None:
    words = [*PRETRAIN, *SHORT, "callbacks.checkpoint_every=3"]
    words += [f"pretrain.{phase}.updates=7" for phase in ("tokenizer", "transformer")]
    check_kills(tmp_path, words, "pretrain", 3, np.random.default_rng(9))


@pytest.mark.slow
def test_an_agent_that_steps_optimisers_of_its_own(tmp_path: Path) -> None:
    """With its dreams, which are part of the checkpoint."""
    words = [*FINETUNE, *SHORT, "finetune.agent_steps=150", "callbacks.checkpoint_every=4"]
    check_kills(tmp_path, words, "finetune", 3, np.random.default_rng(10))


@pytest.mark.slow
@pytest.mark.parametrize("plan", [[], PLAN], ids=["actor", "planner"])
def test_finetuning_in_the_middle_of_episodes(plan: list[str], tmp_path: Path) -> None:
    words = [*FINETUNE, *plan, "finetune.agent_steps=170", "callbacks.checkpoint_every=4"]
    words += ["env.num_envs=3", "evaluate.every=8"]
    check_kills(tmp_path, words, "finetune", 3, np.random.default_rng(8))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mapo", "ivideogpt_semantic"])
def test_phases_one_by_one_equal_the_whole_run(method: str, tmp_path: Path) -> None:
    """As stages of their own, and where a run goes on from the end of the phase before."""
    words = [*TINY, *SHORT, f"method={method}"] if method != "mapo" else [*TINY, "method=mapo"]
    words += [f"work_dir={tmp_path}/work", f"data.root={tmp_path}/toy"]
    train(tmp_path, *words, "run_dir=whole")
    train(tmp_path, *words, "stage=pretrain", "run_dir=first")
    start = "init_from=first/pretrain/last.ckpt"
    train(tmp_path, *words, "stage=finetune", start, "run_dir=second")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for name in ("finetune", "replay"):
        shutil.rmtree(tmp_path / "again" / name)
    train(tmp_path, "resume=again/pretrain/last.ckpt")
    weights = [
        read_checkpoint(tmp_path / name / "finetune/last.ckpt")["state_dict"]
        for name in ("whole", "second", "again")
    ]
    assert weights[0].keys() == weights[1].keys() == weights[2].keys()
    for other in weights[1:]:
        assert list(differences(weights[0], other)) == []
