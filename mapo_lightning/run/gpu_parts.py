"""What ``mapo-gpu-check`` measures, each part in a process of its own: one row per finding.

A broken capture, or a kernel that fails, leaves CUDA unusable for the rest of its process.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch

from mapo_lightning.run.step_check import (
    ACTION,
    Bounds,
    Case,
    Difference,
    Draws,
    all_cases,
    batch_of,
    configured,
    difference,
    one_step,
    prepared,
    smoothed,
)
from mapo_lightning.run.step_timing import (
    Course,
    Updates,
    apart,
    course,
    repeatable,
    timed,
    trained,
)
from mapo_lightning.training.base_module import TrainedModule
from mapo_lightning.training.cuda_graph import CudaRecorder, Recorder
from mapo_lightning.types import Batch, ConfigError

Kind = Literal["steps", "capture", "trainer", "time", "compile"]

FLOAT32 = Bounds(loss=1e-4, gradient=1e-4, choices=1e-3)
"""How far float32 on a device may lie from float32 on the CPU, at least. At size=tiny two libraries
on one CPU lie 2e-7 (losses) and 2e-6 (gradients) apart, and TF32 would lie about 5e-4 apart."""
OTHER_KERNELS = 20.0
"""A fresh network at size=paper amplifies rounding (its two libraries lie 5e-5 apart in the
gradients, 2e-2 with the kinks of ReLU, and bf16 lies as far as the gradient is long). So gradients
may lie this many times as far from the CPU's as those of another library on the same CPU do."""
BF16 = Bounds(loss=0.05, gradient=0.15, choices=0.15)
"""How far bf16 may lie from float32; on a CPU it lies up to 0.013, 0.022 and 0.04 apart at
size=tiny. At size=paper only losses and choices are held against it, see `OTHER_KERNELS`."""
UPDATES = 20
"""Captured updates that are compared with as many that run as they are."""
SPREAD = 10.0
"""How much further captured updates may be from others than those are from themselves."""
UNSURE = 1e-2
"""Where updates that run as they are differ so much from themselves, nothing can be compared."""
LEAST = 1e-6
"""What counts as equal in any case."""


class Part(NamedTuple):
    """What one process does."""

    kind: Kind
    methods: tuple[str, ...]
    """Of `step_check.all_cases`; none: all of them."""
    size: str
    batch: int
    """Clips, or chunks; 0: as many, and as long, as the method's settings have them."""
    steps: int
    """Frames of each."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.kind} of {', '.join(self.methods) or 'every method'} at size={self.size}"


class Row(NamedTuple):
    """One finding."""

    part: str
    """A heading of the report."""
    name: str
    ok: bool | None
    """None: nothing depends on it."""
    found: str
    numbers: dict[str, float] = {}  # noqa: RUF012 (read only)


def rows(part: Part, device: torch.device) -> Iterator[Row]:
    """Carry a part out; what fails in it is a row."""
    cases = all_cases(part.size, part.methods)
    for case in cases:
        if part.kind != "steps" and configured(case).tokens:
            yield Row(part.kind, case.name, None, "its agent makes updates of its own")
            continue
        try:
            module, batch = _made(case, part)
            yield from _case(part, case, module, batch, device)
        except torch.OutOfMemoryError as error:
            yield Row(part.kind, case.name, None, f"not measured: {str(error).splitlines()[0]}")
        except (RuntimeError, ConfigError) as error:
            yield Row(part.kind, case.name, False, f"{type(error).__name__}: {error}")
            if part.kind != "steps":
                return  # a capture that broke may leave CUDA of no use


def _made(case: Case, part: Part) -> tuple[TrainedModule, Batch]:
    if part.batch:
        return prepared(case, part.batch, part.steps, settled=part.kind == "steps")
    module, _ = prepared(case, 2, 12, settled=False)
    cfg = configured(case, settled=False)
    if case.stage == "finetune":
        sizes, action = (cfg.finetune.batch_size, cfg.finetune.chunk_length), ACTION
        return module, batch_of(cfg, *sizes, action)
    return module, batch_of(cfg, cfg.phase(case.stage).batch_size, cfg.data.clip_length, None)


def _case(
    part: Part, case: Case, module: TrainedModule, batch: Batch, device: torch.device
) -> Iterator[Row]:
    if part.kind == "steps":
        yield from compared(case.name, module, batch, device, tiny=case.size == "tiny")
    elif part.kind == "capture":
        for bf16 in (False, True):
            yield replayed(case.name, module, batch, device, CudaRecorder(), bf16=bf16)
    elif part.kind == "trainer":
        yield in_trainer(case.name, module, batch, device, CudaRecorder())
    else:
        yield from _timed(part.kind, case.name, module, batch, device)


def compared(
    name: str, module: TrainedModule, batch: Batch, device: torch.device, *, tiny: bool = True
) -> Iterator[Row]:
    """One step on the CPU against the same on a device: in float32, twice, and in bf16."""
    cpu = torch.device("cpu")

    def apart(device: torch.device, bf16: bool = False) -> Difference:
        return difference(one_step(module, batch, device, draws.again(), bf16=bf16), right, draws)

    def exact() -> tuple[Difference, Bounds]:
        with torch.backends.mkldnn.flags(enabled=False):
            usual = apart(cpu)
        gradient = max(FLOAT32.gradient, OTHER_KERNELS * max(usual.gradient, usual.weight))
        return apart(device), FLOAT32._replace(gradient=gradient)

    with smoothed():
        draws = Draws()
        right = one_step(module, batch, cpu, draws)
        yield _row("float32, smooth units", name, *exact())
    draws = Draws()
    right = one_step(module, batch, cpu, draws)
    yield _row("float32, as shipped", name, *exact())
    bounds = BF16 if tiny else BF16._replace(gradient=math.inf)
    yield _row("bf16", name, apart(device, bf16=True), bounds)


def _row(part: str, name: str, found: Difference, bounds: Bounds) -> Row:
    allowed = f"{bounds.loss:.0e}, {bounds.gradient:.0e}, {bounds.choices:.0e}"
    return Row(part, name, found.within(bounds), f"{found.line()}; allowed {allowed}")


def replayed(
    name: str,
    module: TrainedModule,
    batch: Batch,
    device: torch.device,
    recorder: Recorder,
    *,
    bf16: bool = False,
    updates: int = UPDATES,
) -> Row:
    """Captured updates against as many that run as they are, which run twice for their spread."""
    batches = _others(batch, updates)
    with repeatable():
        eager = [course(Updates(module, device, bf16=bf16), batches) for _ in range(2)]
        captured = course(Updates(module, device, bf16=bf16, recorder=recorder), batches)
    return _judged("capture", f"{name}, {'bf16' if bf16 else 'float32'}", eager, captured, updates)


def in_trainer(
    name: str,
    module: TrainedModule,
    batch: Batch,
    device: torch.device,
    recorder: Recorder,
    updates: int = 8,
) -> Row:
    """As `replayed`, with Lightning's Trainer around the updates, in float32."""
    batches = _others(batch, updates)
    with repeatable():
        eager = [trained(module, batches, device) for _ in range(2)]
        captured = trained(module, batches, device, recorder)
    return _judged("capture in Lightning's Trainer", name, eager, captured, updates)


def _others(batch: Batch, count: int) -> list[Batch]:
    """Batches that differ from each other: the same rows in another order."""
    return [{key: value.roll(number, 0) for key, value in batch.items()} for number in range(count)]


def _judged(part: str, name: str, eager: list[Course], captured: Course, updates: int) -> Row:
    spread, gone = apart(eager[1], eager[0]), apart(captured, eager[0])
    recorded = captured.state.startswith("recorded")
    fine = recorded and spread <= UNSURE and gone <= max(LEAST, SPREAD * spread)
    said = (
        f"{captured.state}; {updates} captured updates lie {gone:.1e} from those that ran as they "
        f"are, which lie {spread:.1e} from themselves"
    )
    if spread > UNSURE:
        said += ": too far to tell"
    return Row(part, name, fine, said)


TIMED: dict[Kind, dict[str, dict[str, bool]]] = {
    "time": {
        "eager, float32": {},
        "eager, bf16": {"bf16": True},
        "captured, bf16": {"bf16": True, "recorder": True},
    },
    "compile": {
        "compiled, bf16": {"bf16": True, "compiled": True},
        "compiled and captured, bf16": {"bf16": True, "compiled": True, "recorder": True},
    },
}
"""What is timed: how the updates are made."""


def _timed(
    part: Kind, name: str, module: TrainedModule, batch: Batch, device: torch.device
) -> Iterator[Row]:
    for kind, asked in TIMED[part].items():
        options: dict[str, Any] = dict(asked)
        try:
            options["recorder"] = CudaRecorder() if asked.get("recorder") else None
            updates = Updates(module, device, **options)
            torch._dynamo.config.suppress_errors = False  # a part that is not compiled shall say so
            taken = timed(updates, batch)
        except torch.OutOfMemoryError as error:
            yield Row("time", f"{name}, {kind}", None, f"not measured: {_line(error)}")
        except Exception as error:  # compilers fail in their own ways
            ok = None if part == "compile" else False
            yield Row("time", f"{name}, {kind}", ok, f"{type(error).__name__}: {_line(error)}")
            if part != "compile":
                return  # CUDA may be of no use any more
        else:
            numbers = {k: v for k, v in taken._asdict().items() if k != "state"}
            yield Row("time", f"{name}, {kind}", True, taken.state, numbers)
        updates = taken = None  # type: ignore[assignment]
        gc.collect()  # a captured update and its module hold each other, and the graph's memory
        torch.cuda.empty_cache()


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def threads() -> int:
    """Torch threads for the CPU's side of a comparison."""
    return max(1, min(16, os.cpu_count() or 1))
