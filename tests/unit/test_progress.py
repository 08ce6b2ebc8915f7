"""Bars: what they count, and how little they write into a file."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from callbacks.progress import PhaseProgress
from mapo_lightning.training.log_due import Place
from mapo_lightning.waiting import counting


class Module(SimpleNamespace):
    """Ten updates of eight frames each, of which the first four add none."""

    def place(self, updates: int) -> Place:
        early = self.env_frames is not None and updates <= self.cfg.initial_updates
        return Place("initial/" if early else "", updates)


def play(bar: PhaseProgress, module: Any, start: int = 0) -> list[tuple[str, int, int, str]]:
    """(description, count, total, unit) after every update."""
    trainer: Any = SimpleNamespace(
        is_global_zero=True, max_steps=10, global_step=start, log_every_n_steps=1,
        callback_metrics={"train/image": 0.5},
    )  # fmt: skip
    bar.on_train_start(trainer, module)
    seen = []
    for _ in range(start, 10):
        trainer.global_step += 1
        bar.on_train_batch_end(trainer, module)  # in front of the callback that plays
        seen.append((bar.bar.desc, bar.bar.n, bar.bar.total, bar.bar.unit))
        if module.env_frames is not None and trainer.global_step > module.cfg.initial_updates:
            module.env_frames += 8
    bar.on_train_end(trainer, module)
    seen.append((bar.bar.desc, bar.bar.n, bar.bar.total, bar.bar.unit))
    bar.teardown(trainer, module, "fit")
    assert bar.bar is None
    return seen


def finetuning() -> Module:
    return Module(env_frames=100, cfg=SimpleNamespace(initial_updates=4))


def test_fine_tuning_counts_frames_to_their_end() -> None:
    seen = play(PhaseProgress("fine-tuning", {"image": "train/image"}, 8), finetuning())
    assert seen[0] == ("fine-tuning, before acting", 1, 4, "update")
    assert seen[3] == ("fine-tuning", 100, 148, "frame")  # the next update acts
    assert seen[5] == ("fine-tuning", 108, 148, "frame")
    assert seen[-1] == ("fine-tuning", 148, 148, "frame")


def test_a_resumed_fine_tuning_begins_where_it_was() -> None:
    module = finetuning()
    module.env_frames = 124
    seen = play(PhaseProgress("fine-tuning", {}, 8), module, start=7)
    assert seen[0] == ("fine-tuning", 124, 148, "frame")
    assert seen[-1] == ("fine-tuning", 148, 148, "frame")


def test_pre_training_counts_updates() -> None:
    seen = play(PhaseProgress("pre-training", {}), Module(env_frames=None))
    assert seen[0] == ("pre-training", 1, 10, "update")
    assert seen[-1] == ("pre-training", 10, 10, "update")


@pytest.mark.parametrize(("stays", "expected"), [(True, True), (False, False)])
def test_short_work_leaves_no_lines_in_a_file(
    stays: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    with counting("test episodes", "episode", stays=stays) as report:
        for done in range(200):
            report(done + 1, 200)
    assert ("test episodes" in file.getvalue()) == expected
    assert file.getvalue().count("\r") <= 3
