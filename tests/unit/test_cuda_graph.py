"""Captured updates on a recorder that keeps CUDA's rules: what is recorded is not carried out."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from mapo_lightning.training.cuda_graph import WARM, Captured, CudaRecorder, Work, cuda_recorder
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
        metrics = {name.removeprefix("initial/"): value for name, value in metrics.items()}
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


def test_an_update_that_cannot_be_recorded_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recorded as a CUDA graph: operation not permitted"):
        trained("finetune", Tape(broken=True), tmp_path)


class Stream:
    """A CUDA stream that only remembers for whom it waited."""

    def __init__(self) -> None:
        self.waited: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)


class Device:
    """What `CudaRecorder` asks of ``torch.cuda``, without a device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.usual = self.current = Stream()
        self.captures: list[dict[str, Any]] = []
        self.replayed = 0
        for name, put in {
            "Stream": Stream,
            "current_stream": lambda: self.current,
            "set_stream": lambda stream: setattr(self, "current", stream),
            "stream": self.on,
            "CUDAGraph": lambda: self,
            "graph": self.capturing,
        }.items():
            monkeypatch.setattr(torch.cuda, name, put)

    def replay(self) -> None:
        self.replayed += 1

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def capturing(self, graph: Any, **options: Any) -> Iterator[None]:
        """As torch: a capture that breaks raises once more at its end, and leaves its stream on."""
        assert graph is self
        self.captures.append(options)
        before, self.current = self.current, options["stream"]
        try:
            yield
        except RuntimeError:
            raise RuntimeError("capture was invalidated") from None
        self.current = before


def test_warm_up_and_capture_share_one_stream_and_mind_no_other_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, recorder = Device(monkeypatch), CudaRecorder()
    ran_on: list[Stream] = []
    collecting: list[bool] = []

    def work() -> None:
        ran_on.append(device.current)
        collecting.append(gc.isenabled())

    recorder.warm(work)
    recorder.warm(work)
    replay = recorder.record(work)
    side = ran_on[0]
    assert side is not device.usual
    assert ran_on == [side] * 3
    assert side.waited == [device.usual] * 2  # the batch is there
    assert device.usual.waited == [side] * 2  # Adam comes after the gradients
    assert device.captures == [{"stream": side, "capture_error_mode": "thread_local"}]
    assert collecting == [True, True, False]
    assert gc.isenabled()
    assert device.current is device.usual
    replay()
    assert device.replayed == 1


def test_a_broken_capture_says_what_broke_it_and_leaves_its_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, recorder = Device(monkeypatch), CudaRecorder()

    def work() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match=r"^operation not permitted when stream is capturing$"):
        recorder.record(work)
    assert device.current is device.usual
    assert gc.isenabled()


def test_a_full_device_is_not_an_update_that_cannot_be_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device(monkeypatch)

    def work(batch: Batch) -> dict[str, Tensor]:
        if device.current is not device.usual and device.captures:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"sum": batch["x"].sum()}

    captured = Captured(work, CudaRecorder())
    for _ in range(WARM):
        captured({"x": torch.ones(3)})
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        captured({"x": torch.ones(3)})
    assert device.current is device.usual


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


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (("cpu", 1), "trainer.accelerator=cpu, this machine"),
        (("auto", 2), "several processes \\(DDP\\) exchange gradients; this run has 2 processes"),
        (("auto", 1, "ddp"), "this run has 1 processes and trainer.strategy=ddp"),
    ],
)
def test_capture_wants_one_gpu(asked: tuple[Any, ...], why: str) -> None:
    with pytest.raises(ConfigError, match=f"records the work of one GPU.*{why}"):
        cuda_recorder(*asked)


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
