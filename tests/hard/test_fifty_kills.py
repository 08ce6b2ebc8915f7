"""Fifty runs of each phase are killed at random moments and resumed: all end as one left alone."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from killing import FINETUNE, PRETRAIN, check_kills, lives

from mapo_lightning.training.checkpoint import read_checkpoint

pytestmark = pytest.mark.hard

KILLS = 50
PHASES = {
    "pretrain": [*PRETRAIN, "pretrain.updates=60", "data.workers=2"],
    # 5 updates on the prefill, and 55 with 5 agent steps each.
    "finetune": [*FINETUNE, "finetune.agent_steps=385", "env.num_envs=3", "evaluate.every=25"],
}
TWO = ["trainer.devices=2", "trainer.strategy=ddp"]
SIMULATOR = ["env=dmc", "env.name=cartpole_balance", "data=toy", "env.time_limit=60"]
KINDS = {
    "pretrain on two processes": [*PRETRAIN, *TWO, "pretrain.updates=20", "data.workers=2"],
    "finetune on two processes": [*FINETUNE, *TWO, "finetune.agent_steps=185"],
    "finetune in a simulator": [
        *(word for word in FINETUNE if word != "env=toy"), *SIMULATOR, "finetune.agent_steps=185",
    ],
}  # fmt: skip


@pytest.mark.parametrize("phase", PHASES)
def test_fifty_kills(phase: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began, words = time.perf_counter(), [*PHASES[phase], "callbacks.checkpoint_every=8"]
    moments = check_kills(tmp_path, words, phase, KILLS, np.random.default_rng(0))
    assert sum(moments.values()) == KILLS
    assert len(moments) > 5
    with capsys.disabled():
        print(f"\n{KILLS} kills of {phase} in {time.perf_counter() - began:.0f} s: {moments}")


@pytest.mark.parametrize("kind", KINDS)
def test_three_kills_of_other_kinds(kind: str, tmp_path: Path) -> None:
    words = [*KINDS[kind], "callbacks.checkpoint_every=4"]
    check_kills(tmp_path, words, kind.split()[0], 3, np.random.default_rng(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of CUDA")
@pytest.mark.parametrize("phase", PHASES)
def test_on_a_gpu_a_resumed_training_ends_near_one_left_alone(phase: str, tmp_path: Path) -> None:
    """In bfloat16: sums there have no fixed order, so weights may differ by a thousandth."""
    words = [*PHASES[phase], "callbacks.checkpoint_every=8", f"work_dir={tmp_path}/work"]
    words += ["run_dir=run", "trainer.accelerator=gpu", "trainer.precision=bf16-mixed"]
    words += ["trainer.deterministic=false"]
    whole: dict[str, object] = {"folder": f"{tmp_path}/whole", "words": words}
    (first,) = lives([whole])
    kill = int(0.6 * first["moments"]["count"])
    again = {"folder": f"{tmp_path}/again", "words": ["resume=run"]}
    killed, ended = lives([{**again, "words": words, "kill": kill}, again])
    assert (first["code"], killed["code"], ended["code"]) == (0, -9, 0)
    one, two = (
        read_checkpoint(tmp_path / name / "run" / phase / "last.ckpt")["state_dict"]
        for name in ("whole", "again")
    )
    away = sum(float((one[k].double() - two[k].double()).square().sum()) for k in one)
    size = sum(float(one[k].double().square().sum()) for k in one)
    assert (away / size) ** 0.5 <= 1e-3
