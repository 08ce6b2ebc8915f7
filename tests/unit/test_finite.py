"""Training stops where a loss or gradient is no finite number, and keeps the last good weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import pytest
import torch
from test_agent import CONF
from torch import Tensor

from mapo_lightning.config.compose import compose
from mapo_lightning.run.config import RunConfig
from mapo_lightning.run.trainer import build_trainer
from mapo_lightning.training.base_module import TrainedModule, named_adam
from mapo_lightning.training.checkpoint import read_checkpoint, write_checkpoint
from mapo_lightning.training.cuda_graph import WARM, Recorder
from mapo_lightning.training.finite import TOTAL, FiniteWatch, refuse_broken_weights
from mapo_lightning.training.settings import OptimizerConfig
from mapo_lightning.types import Batch, CheckpointError, DivergedError


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_the_term_and_the_update_are_named(broken: float) -> None:
    watch = FiniteWatch()
    watch.begun = 100
    for update in range(1, 9):
        bad = torch.tensor(broken if update >= 5 else 1.0)
        later = torch.tensor(broken if update >= 7 else 1.0)
        undefined = torch.tensor(math.nan if update == 2 else 1.0)
        terms = {"train/image": bad, "train/reward": later, "train/seldom": undefined}
        watch.add(terms | {TOTAL: bad, "grad_norm/lower": bad})
        if update == 4:
            watch.check()  # what is only logged may be undefined
    with pytest.raises(DivergedError, match=r"at update 105: train/image, train/seldom became"):
        watch.check()


def test_a_gradient_alone_is_named_by_its_group() -> None:
    watch = FiniteWatch()
    fine, bad = torch.tensor(1.0), torch.tensor(math.inf)
    watch.add({"train/image": fine, TOTAL: fine, "grad_norm/actor": bad})
    with pytest.raises(DivergedError, match=r"at update 1: grad_norm/actor became"):
        watch.check()


class Line(TrainedModule):
    """Weights that learn, until their input is no number."""

    def __init__(self) -> None:
        super().__init__(OptimizerConfig())
        self.layer = torch.nn.Linear(1, 1)
        self.metadata = {"stage": "pretrain"}

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        total = self.layer(batch["x"]).pow(2).mean()
        return total, {"square": total.detach(), "other": torch.ones(())}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return named_adam({"line": (self.parameters(), 0.1)}, self.optimizer_cfg, self)


class Inputs(torch.utils.data.IterableDataset[Batch]):
    """Ones, and NaN in one update."""

    def __init__(self, broken_at: int) -> None:
        self.broken_at = broken_at

    def __iter__(self) -> Iterator[Batch]:
        for update in range(1, 100):
            yield {"x": torch.full((2, 1), math.nan if update == self.broken_at else 1.0)}


class Again:
    """A recorder that runs the work itself."""

    def warm(self, work: object) -> None:
        work()  # type: ignore[operator]

    def record(self, work: object) -> object:
        return work


def fit(folder: Path, broken_at: int, recorder: Recorder | None = None, **more: int) -> L.Trainer:
    words = ["env=toy", "trainer.accelerator=cpu", f"trainer.log_every={more.get('every', 50)}"]
    words += [f"callbacks.checkpoint_every={more.get('save', 4)}", "tracking.enabled=false"]
    cfg = compose(words, RunConfig, CONF).config
    module = Line()
    if recorder is not None:
        module.capture(recorder)
    trainer = build_trainer(cfg, 20, folder, [], [])
    loader = torch.utils.data.DataLoader(Inputs(broken_at), batch_size=None)
    trainer.fit(module, loader)
    return trainer


@pytest.mark.parametrize("captured", [False, True])
def test_a_diverged_training_stops_and_its_last_finite_checkpoint_stays(
    captured: bool, tmp_path: Path
) -> None:
    recorder: Recorder | None = Again() if captured else None  # type: ignore[assignment]
    with pytest.raises(DivergedError, match=r"at update 6: train/square became infinite or NaN"):
        fit(tmp_path, 6, recorder)
    assert WARM < 6
    content = read_checkpoint(tmp_path / "last.ckpt")
    assert content["global_step"] == 4
    refuse_broken_weights(content["state_dict"], "it")


def test_it_stops_where_values_are_logged_before_a_checkpoint_is_due(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="at update 5"):
        fit(tmp_path, 5, every=2, save=15)
    assert not (tmp_path / "last.ckpt").exists()


def test_checkpoints_with_broken_weights_are_refused(tmp_path: Path) -> None:
    trainer = fit(tmp_path, -1)
    content = read_checkpoint(tmp_path / "last.ckpt")
    assert content["global_step"] == trainer.global_step == 20
    content["state_dict"]["layer.weight"][0, 0] = math.nan
    write_checkpoint(content, tmp_path / "nan.ckpt")
    cfg = compose(["env=toy", "trainer.accelerator=cpu"], RunConfig, CONF).config
    loader = torch.utils.data.DataLoader(Inputs(-1), batch_size=None)
    with pytest.raises(CheckpointError, match=r"infinite numbers or NaN in 'layer.weight'"):
        build_trainer(cfg, 30, tmp_path / "b", [], []).fit(
            Line(), loader, ckpt_path=tmp_path / "nan.ckpt", weights_only=True
        )


@pytest.mark.slow
@pytest.mark.parametrize("place", ["working folder", "run's folder", "phase's folder"])
def test_a_checkpoint_that_slurm_left_somewhere_is_never_loaded(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs/a/finetune"
    folder.mkdir(parents=True)
    there = {"working folder": tmp_path, "run's folder": folder.parent, "phase's folder": folder}
    (there[place] / "hpc_ckpt_1.ckpt").write_text("another run's weights")
    monkeypatch.chdir(tmp_path)
    given = {"JOB_ID": "7", "JOB_NAME": "mapo", "NTASKS": "1", "PROCID": "0"}
    given |= {"LOCALID": "0", "NODEID": "0", "NNODES": "1", "NODELIST": "localhost"}
    for name, value in given.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert fit(folder, -1).global_step == 20
    assert sorted(p.name for p in folder.glob("*.ckpt") if p.name[:3] != "hpc") == [
        "last.ckpt",
        "step=16.ckpt",
    ]
