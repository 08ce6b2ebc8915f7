"""Captured updates on a recorder that keeps CUDA's rules: what is recorded is not carried out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from networks import backbone
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measures import CONF, RESIDUAL, batch_of
from callbacks.codebook import CodebookUpdate
from mapo_lightning.config.compose import compose
from mapo_lightning.run.build import build_finetune, build_pretrain
from mapo_lightning.run.config import RunConfig
from mapo_lightning.training.base_module import TrainedModule
from mapo_lightning.training.cuda_graph import WARM, Captured, Work, cuda_recorder
from mapo_lightning.types import Batch, ConfigError

pytestmark = pytest.mark.slow

UPDATES = WARM + 3


UNDECLARED = ("running_mean", "running_var")  # batch norm writes to these and does not say so


class Tape:
    """A recorder without a device that keeps CUDA's rules.

    Recording carries nothing out, replaying runs no Python: it starts the recorded operations again
    on the same memory. An operation that hands a number to the host is refused.
    """

    def __init__(self, broken: bool = False) -> None:
        self.broken, self.warmed, self.replayed = broken, 0, 0

    def warm(self, work: Work) -> None:
        self.warmed += 1
        work()

    def record(self, work: Work) -> Work:
        if self.broken:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        operations, random = Operations(), torch.get_rng_state()
        with operations:
            work()
        torch.set_rng_state(random)
        with torch.no_grad():
            for written, before in operations.before.values():
                written.copy_(before)

        @torch.no_grad()
        def replay() -> None:
            self.replayed += 1
            for func, args, kwargs, outputs in operations.launched:
                for old, new in zip(outputs, tensors(func(*args, **kwargs)), strict=True):
                    if old is not new:
                        old.copy_(new)

        return replay


class Operations(TorchDispatchMode):
    """Writes down operations and their memory, and what that held before they wrote to it."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        given = dict(zip((x.name for x in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            declared = argument.alias_info is not None and argument.alias_info.is_write
            if declared or argument.name in UNDECLARED:
                for tensor in tensors(given.get(argument.name)):
                    self.before.setdefault(id(tensor), (tensor, tensor.clone()))
        result = func(*args, **kwargs)
        if not func.is_view:  # a view stays one of the same memory
            self.launched.append((func, args, kwargs, tensors(result)))
        return result


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def trained(
    stage: str,
    tape: Tape | None,
    folder: Path,
    updates: int = UPDATES,
    resume: Path | None = None,
    words: Sequence[str] = (),
) -> tuple[TrainedModule, list[dict[str, float]], L.Trainer]:
    """A trained module, what was logged at every second update, and its trainer."""
    torch.manual_seed(0)
    usual = ["env=toy", "finetune.hold_actor=4", "agent.target_every=2", "agent.horizon=4"]
    usual += RESIDUAL.split()  # batch norms move their statistics in what is recorded
    cfg = compose([*usual, *words], RunConfig, CONF).config
    module: TrainedModule
    module = build_pretrain(cfg) if stage == "pretrain" else build_finetune(cfg, 2, None)[0]
    if tape is not None:
        module.capture(tape)
    action = None if stage == "pretrain" else 2
    batches = [batch_of(cfg, 2, 6, action) for _ in range(UPDATES)]
    logger = CSVLogger(folder, version=0 if tape is None else 1)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=updates, log_every_n_steps=2, logger=logger,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[CodebookUpdate()],
    )  # fmt: skip
    logged: list[dict[str, float]] = []
    take = logger.log_metrics

    def log_metrics(metrics: dict[str, float], step: int | None = None) -> None:
        if not logged or metrics.keys() & logged[-1].keys():  # another update's
            logged.append({"at": float(step or 0)})
        logged[-1] |= metrics
        take(metrics, step)

    logger.log_metrics = log_metrics  # type: ignore[method-assign, assignment]
    torch.manual_seed(1)
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
    return module, logged, trainer


@pytest.mark.parametrize("kind", ["gru", "transformer"])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_captured_updates_are_the_same_updates(stage: str, kind: str, tmp_path: Path) -> None:
    tape, words = Tape(), backbone(kind, "mapo")
    plain, plain_logged, _ = trained(stage, None, tmp_path, words=words)
    captured, logged, trainer = trained(stage, tape, tmp_path, words=words)
    assert (tape.warmed, tape.replayed, trainer.global_step) == (WARM, UPDATES - WARM, UPDATES)
    assert logged == plain_logged
    # Every second update is logged, and saw a batch of its own.
    assert len({metrics["train/image"] for metrics in logged}) == len(logged) == UPDATES // 2
    for name, value in plain.state_dict().items():
        assert torch.equal(captured.state_dict()[name], value), name
    group = "world_model" if stage == "pretrain" else "lower"
    assert logged[-1][f"grad_norm/{group}"] > 0.0


@pytest.mark.parametrize("captured_first", [True, False])
def test_a_run_is_resumed_with_capture_switched(captured_first: bool, tmp_path: Path) -> None:
    tapes = [Tape() if first == captured_first else None for first in (True, False)]
    _, _, trainer = trained("finetune", tapes[0], tmp_path, updates=4)
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    _, _, trainer = trained("finetune", tapes[1], tmp_path, 6, tmp_path / "four.ckpt")
    assert trainer.global_step == 6
    (tape,) = (tape for tape in tapes if tape is not None)
    assert tape.warmed + tape.replayed == (4 if captured_first else 2)


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
    with pytest.raises(
        ConfigError, match=r"a batch of x, this one holds x, episode.*capture=false"
    ):
        captured({"x": torch.ones(3), "episode": torch.zeros(3)})


@pytest.mark.parametrize(("accelerator", "processes"), [("cpu", 1), ("auto", 2)])
def test_capture_wants_one_gpu(accelerator: str, processes: int) -> None:
    with pytest.raises(ConfigError, match=r"trainer.capture=true records the work of one GPU"):
        cuda_recorder(accelerator, processes)


def test_more_updates_of_the_agent_are_its_own_and_leave_the_world_model_alone(
    tmp_path: Path,
) -> None:
    one, _, _ = trained("finetune", None, tmp_path / "one", updates=1)
    words = ["finetune.agent_updates=3", "finetune.hold_actor=0"]
    three, _, trainer = trained("finetune", None, tmp_path / "three", updates=1, words=words)
    assert trainer.global_step == 1
    for name, value in one.state_dict().items():
        if name.startswith("world_model."):
            assert torch.equal(three.state_dict()[name], value), name
    (optimizer,) = trainer.optimizers
    made = {
        group["name"]: {int(optimizer.state[p]["step"]) for p in group["params"]}
        for group in optimizer.param_groups
    }
    assert made == {"lower": {1}, "model": {1}, "actor": {3}, "critic": {3}}
    _, _, trainer = trained("finetune", None, tmp_path / "two", updates=2, words=words)
    (optimizer,) = trainer.optimizers
    lower = next(group for group in optimizer.param_groups if group["name"] == "lower")
    # Nor does the second batch repeat what the first has done to the world model.
    assert {int(optimizer.state[p]["step"]) for p in lower["params"]} == {2}
    moved = [
        (three.state_dict()[f"agent.{name}"] - one.state_dict()[f"agent.{name}"]).abs().max()
        for name in ("actor.0.weight", "critic.0.weight")
    ]
    assert min(moved) > 1e-5
