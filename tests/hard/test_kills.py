"""Kills at random moments: of a process that saves, and of a run that is resumed each time."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import time
from pathlib import Path

import psutil
import pytest
import torch
from program import SMALL, TRAIN, end, start, train

from mapo_lightning.files import DRAFT
from mapo_lightning.training.checkpoint import (
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)

MB = 2**20


def content(number: int, size: int) -> dict[str, object]:
    """A checkpoint of a few tensors, which all hold its number."""
    weights = {f"part{i}": torch.full((size // 16,), float(number)) for i in range(4)}
    return {"mapo": {"stage": "finetune"}, "state_dict": weights, "global_step": number}


def save_for_ever(path: Path, first: int, size: int) -> None:
    """Save one checkpoint after the other, and say which is complete."""
    number = first
    while True:
        write_checkpoint(content(number, size), path)
        path.with_name("done").write_text(str(number))
        number += 1


def kill_in_a_save(child: int, folder: Path, least: float) -> None:
    """Kill a process when the draft that it writes has at least so many bytes."""
    while True:
        for draft in folder.glob(f"*{DRAFT}"):
            os.kill(child, signal.SIGSTOP)  # it may be just about to be renamed
            os.waitpid(child, os.WUNTRACED)
            if draft.exists() and draft.stat().st_size >= least:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return
            os.kill(child, signal.SIGCONT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "kills"),
    [pytest.param(4 * MB, 8), pytest.param(200 * MB, 50, marks=pytest.mark.hard)],
    ids=["short", "whole"],
)
def test_a_save_that_is_killed_leaves_a_whole_checkpoint(
    size: int, kills: int, tmp_path: Path
) -> None:
    path = tmp_path / "finetune/last.ckpt"
    write_checkpoint(content(0, size), path)
    path.with_name("done").write_text("0")
    moments = random.Random(0)
    for _ in range(kills):
        before = int(path.with_name("done").read_text() or "0")
        child = os.fork()
        if child == 0:
            try:
                save_for_ever(path, before + 1, size)
            finally:
                os._exit(1)
        kill_in_a_save(child, path.parent, moments.random() * size)
        assert newest_checkpoint(tmp_path) == path
        whole = read_checkpoint(path)
        number = whole["global_step"]
        assert number >= before
        assert all((x == number).all() for x in whole["state_dict"].values())
        assert len(list(path.parent.glob(f"*{DRAFT}"))) == 1  # the next save takes it away
        path.with_name("done").write_text(str(number))
    print(f"\n{kills} kills while {path.stat().st_size / MB:.0f} MB were saved: all whole")


@pytest.mark.hard
def test_a_signal_to_one_of_two_ranks_stops_both_at_one_update(tmp_path: Path) -> None:
    words = [*SMALL, "stage=finetune", "callbacks.rollout_every=1000", "run_dir=run"]
    words += ["finetune.agent_steps=2110", "callbacks.checkpoint_every=5", "tracking.enabled=true"]
    words += ["trainer.devices=2", "trainer.strategy=ddp"]
    last = tmp_path / "run/finetune/last.ckpt"
    with (tmp_path / "said.txt").open("w") as said:
        process = start(tmp_path, TRAIN, *words, said=said)
        try:
            deadline = time.monotonic() + 600
            while not last.exists() and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            (other,) = [
                child
                for child in psutil.Process(process.pid).children()
                if child.environ().get("LOCAL_RANK") == "1"
            ]
            other.send_signal(signal.SIGUSR1)
            process.wait(300)
        finally:
            end(process)
    text = (tmp_path / "said.txt").read_text()
    assert process.returncode == 75, text
    assert text.count("stopped by SIGUSR1 after update") == 1
    made = read_checkpoint(last)["global_step"]
    assert f"stopped by SIGUSR1 after update {made} of fine-tuning" in text
    db = sqlite3.connect(tmp_path / "runs/mlflow.db")
    assert {row for (row,) in db.execute("select status from runs")} == {"KILLED"}


@pytest.mark.hard
def test_three_kills_and_resumes_are_one_mlflow_run(tmp_path: Path) -> None:
    """With SIGKILL, and another learning rate at the last resume."""
    words = [*SMALL, "stage=finetune", "callbacks.rollout_every=1000", "run_dir=run"]
    words += ["tracking.enabled=true", "finetune.agent_steps=410", "callbacks.checkpoint_every=5"]
    last, made = tmp_path / "run/finetune/last.ckpt", 0
    for attempt in range(3):
        with (tmp_path / "said.txt").open("w") as said:
            process = start(
                tmp_path, TRAIN, *(words if attempt == 0 else ["resume=run"]), said=said
            )
            deadline = time.monotonic() + 300
            while process.poll() is None and time.monotonic() < deadline:
                if last.exists() and read_checkpoint(last)["global_step"] > made:
                    break
                time.sleep(0.02)
            time.sleep(0.3)  # into the updates after it
            end(process)
        assert process.returncode == -signal.SIGKILL, (tmp_path / "said.txt").read_text()
        made = read_checkpoint(last)["global_step"]
    train(tmp_path, "resume=run", "finetune.optimizer.eps=1e-6")
    assert read_checkpoint(last)["global_step"] == 2 + (410 - 110) // 5
    db = sqlite3.connect(tmp_path / "runs/mlflow.db")
    runs = sorted(db.execute("select name, status from runs"))
    assert runs == [("run", "FINISHED"), ("run/finetune", "FINISHED")]
    steps = [row[0] for row in db.execute(
        "select step from metrics where key = 'train/actor' order by timestamp, step"
    )]  # fmt: skip
    assert steps == sorted(steps)
    # A point of every update; those on the prefill alone have an axis of their own.
    assert (len(steps), len(set(steps))) == (60, 60)
    alone = db.execute("select step from metrics where key = 'initial/train/actor'").fetchall()
    assert sorted(alone) == [(1,), (2,)]
    changed = dict(db.execute("select key, value from tags where key = 'resume.3.changed'"))
    (text,) = json.loads(changed["resume.3.changed"])
    assert text.startswith("finetune.optimizer.eps: ")
