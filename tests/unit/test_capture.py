"""Captured updates on a recorder that keeps CUDA's rules: what is recorded is not carried out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from benchmarks.measures import CONF, batch_of
from callbacks.codebook import CodebookUpdate
from mapo_lightning.build import build_finetune, build_pretrain
from mapo_lightning.capture import WARM, Captured, Work, cuda_recorder
from mapo_lightning.compose import compose
from mapo_lightning.config import RunConfig
from mapo_lightning.optimization import TrainedModule
from mapo_lightning.types import Batch, ConfigError

UPDATES = WARM + 3


class Tape:
    """A recorder without a device: replaying means doing it again, on the same memory."""

    def __init__(self, broken: bool = False) -> None:
        self.broken, self.warmed, self.replayed = broken, 0, 0

    def warm(self, work: Work) -> None:
        self.warmed += 1
        work()

    def record(self, work: Work) -> Work:
        if self.broken:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        def replay() -> None:
            self.replayed += 1
            work()

        return replay


class Losses(L.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self.seen.append(float(trainer.logged_metrics["train/image"]))


def trained(stage: str, tape: Tape | None, folder: Path) -> tuple[TrainedModule, Losses, L.Trainer]:
    torch.manual_seed(0)
    words = ["env=toy", "finetune.hold_actor=4", "agent.target_every=2", "agent.horizon=4"]
    cfg = compose(words, RunConfig, CONF).config
    module: TrainedModule
    module = build_pretrain(cfg) if stage == "pretrain" else build_finetune(cfg, 2, None)[0]
    if tape is not None:
        module.capture(tape)
    action = None if stage == "pretrain" else 2
    batches = [batch_of(cfg, 2, 6, action) for _ in range(UPDATES)]
    losses = Losses()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=UPDATES, log_every_n_steps=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[CodebookUpdate(), losses],
    )  # fmt: skip
    torch.manual_seed(1)
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return module, losses, trainer


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_captured_updates_are_the_same_updates(stage: str, tmp_path: Path) -> None:
    tape = Tape()
    plain, plain_losses, _ = trained(stage, None, tmp_path)
    captured, losses, trainer = trained(stage, tape, tmp_path)
    assert (tape.warmed, tape.replayed, trainer.global_step) == (WARM, UPDATES - WARM, UPDATES)
    assert losses.seen == plain_losses.seen
    assert len(set(losses.seen)) == UPDATES  # every update saw a batch of its own
    for name, value in plain.state_dict().items():
        assert torch.equal(captured.state_dict()[name], value), name
    group = "world_model" if stage == "pretrain" else "lower"
    assert float(trainer.logged_metrics[f"grad_norm/{group}"]) > 0.0


def test_where_recording_fails_updates_run_as_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, *_ = trained("finetune", None, tmp_path)
    other, *_ = trained("finetune", Tape(broken=True), tmp_path)
    (warning,) = (r.getMessage() for r in caplog.records if "captured" in r.getMessage())
    assert warning.endswith("operation not permitted when stream is capturing")
    for name, value in plain.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_a_batch_of_another_shape_is_refused() -> None:
    def work(batch: Batch) -> dict[str, Tensor]:
        return {"sum": batch["x"].sum()}

    captured = Captured(work, Tape())
    for _ in range(WARM + 1):
        captured({"x": torch.ones(3)})
    assert float(captured({"x": torch.full((3,), 2.0)})["sum"]) == 6.0
    with pytest.raises(ValueError, match=r"'x' of shape \(3,\), this batch has \(2,\)"):
        captured({"x": torch.ones(2)})


@pytest.mark.parametrize(("accelerator", "processes"), [("cpu", 1), ("auto", 2)])
def test_capture_wants_one_gpu(accelerator: str, processes: int) -> None:
    with pytest.raises(ConfigError, match=r"trainer.capture=true records the work of one GPU"):
        cuda_recorder(accelerator, processes)
