"""Several processes that train together: the same mathematics, and no process that hangs."""

from __future__ import annotations

import time
from pathlib import Path

import ddp_batches
import psutil
import pytest
import torch
from program import SMALL, TRAIN, end, start, train

from mapo_lightning.training.checkpoint import read_checkpoint


@pytest.mark.slow
def test_two_processes_of_eight_clips_equal_one_of_sixteen(tmp_path: Path) -> None:
    train(tmp_path, script=ddp_batches.__file__)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    alone = ddp_batches.gradients_after(tmp_path / "alone", devices=1)
    assert first.keys() == second.keys() == alone.keys()
    assert sum(name.endswith(".codes") for name in alone)
    for name, wanted in alone.items():
        assert torch.equal(first[name], second[name]), name
        error = (first[name] - wanted).norm() / wanted.norm().clamp(min=1e-12)
        assert error <= 1e-5, (name, float(error))


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["main", "other"])
def test_a_killed_process_ends_the_job_which_goes_on_later(killed: str, tmp_path: Path) -> None:
    words = [*SMALL, "stage=pretrain", "vlm=none", "demo.clips_per_scene=4", "demo.frames=30"]
    words += ["trainer.devices=2", "trainer.strategy=ddp", "run_dir=run"]
    words += [
        "pretrain.updates=100000",
        "callbacks.checkpoint_every=2",
        f"data.root={tmp_path}/toy",
    ]
    last = tmp_path / "run/pretrain/last.ckpt"
    with (tmp_path / "said.txt").open("w") as said:
        program = start(tmp_path, TRAIN, *words, said=said)
        try:
            while not last.exists():
                assert program.poll() is None, (tmp_path / "said.txt").read_text()
                time.sleep(0.05)
            children = psutil.Process(program.pid).children()
            (other,) = (child for child in children if "stage=pretrain" in child.cmdline())
            (program if killed == "main" else other).kill()
            assert program.wait(timeout=60) != 0
            other.wait(timeout=60)
        finally:
            end(program)
    made = read_checkpoint(last)["global_step"]
    if killed == "other":
        train(tmp_path, "resume=run", f"pretrain.updates={made + 2}")
        assert read_checkpoint(last)["global_step"] == made + 2


@pytest.mark.slow
def test_a_token_method_trains_on_two_processes(tmp_path: Path) -> None:
    """Its tokenizer learns in some updates only, and its agent steps optimisers of its own."""
    words = [*SMALL, "method=ivideogpt_fixed", "demo.clips_per_scene=8", "demo.frames=30"]
    words += ["trainer.devices=2", "trainer.strategy=ddp", "finetune.agent_steps=200"]
    words += ["token_world.tokenizer_every=3", "run_dir=run", f"data.root={tmp_path}/toy"]
    said = train(tmp_path, *words)
    assert "ivideogpt_fixed return" in said
    content = read_checkpoint(tmp_path / "run/finetune/last.ckpt")
    assert len(content["collection"]) == 2
    first, second = content["random"]
    assert not torch.equal(first["torch"], second["torch"])  # each draws its own
    state = content["state_dict"]["agent._extra_state"]
    assert state["updates"] == content["global_step"] > 3
    assert len(state["dreams"]) >= 2
