"""Updates as a training makes them: one by one, compiled, or replayed from a CUDA graph."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from callbacks.codebook import CodebookUpdate
from mapo_lightning.models.interfaces import Codebook
from mapo_lightning.training.base_module import TrainedModule
from mapo_lightning.training.compile import compile_parts
from mapo_lightning.training.cuda_graph import Captured, Recorder
from mapo_lightning.training.finetune import FinetuneModule
from mapo_lightning.types import Batch

WARM = 8
"""Updates before the first that is timed: kernels are chosen, the graph is recorded."""
LAUNCHES = (
    "cudaLaunchKernel", "cudaLaunchCooperativeKernel", "cuLaunchKernel", "cudaGraphLaunch",
    "cudaMemcpy", "cudaMemset",
)  # fmt: skip
"""How calls begin that have the device do something, in the profiler's list."""


class Updates:
    """Updates of a copy of a module on a device, without Lightning around them.

    Args:
        module: Stays as it is.
        device: Where the copy goes.
        bf16: Compute under autocast.
        recorder: Replay the updates after the first few; None: run them as they are.
        compiled: Have torch compile encoder and decoder.
    """

    def __init__(
        self,
        module: TrainedModule,
        device: torch.device,
        *,
        bf16: bool = False,
        recorder: Recorder | None = None,
        compiled: bool = False,
    ) -> None:
        self.module = copy.deepcopy(module).to(device).train()
        self.device, self.bf16 = device, bf16
        found: Any = self.module.configure_optimizers()
        self.optimizer: torch.optim.Optimizer = found["optimizer"] if type(found) is dict else found
        self.captured = Captured(self._gradients, recorder) if recorder is not None else None
        self.books = [m for m in self.module.modules() if isinstance(m, Codebook) and not m.frozen]
        self.made = 0
        if compiled:
            world_model: Any = self.module.world_model
            compile_parts(world_model.parts())

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """One update: gradients, Adam, and what callbacks do; named scalars."""
        if self.made and isinstance(self.module, FinetuneModule):
            self.module.agent.after_update(self.made)
        work = self._gradients if self.captured is None else self.captured
        found = work(batch)
        self.optimizer.step()
        for book in self.books:
            book.update(book.batch_count, book.batch_sum, book.candidates)
        self.made += 1
        return found

    def _gradients(self, batch: Batch) -> dict[str, Tensor]:
        # Without the cache of cast weights, as Lightning has it.
        kind = self.device.type
        with torch.autocast(kind, torch.bfloat16, self.bf16, cache_enabled=False):
            return self.module.gradients(batch, self.optimizer)

    @property
    def state(self) -> str:
        """What becomes of updates now."""
        return "as they are" if self.captured is None else self.captured.state


class Course(NamedTuple):
    """Where a row of updates has led."""

    found: list[dict[str, float]]
    """Losses, gradient norms and all else that each update gives."""
    weights: dict[str, Tensor]
    """On the CPU; buffers too."""
    state: str
    """Of the capture."""


def course(updates: Updates, batches: Sequence[Batch], seed: int = 2) -> Course:
    """Make an update of each batch, from one state of the random numbers."""
    torch.manual_seed(seed)
    said = []
    for batch in batches:
        found = updates({key: value.to(updates.device) for key, value in batch.items()})
        said.append({name: float(x) for name, x in found.items()})  # now: the next writes there
    return Course(said, _weights(updates.module), updates.state)


def trained(
    module: TrainedModule,
    batches: Sequence[Batch],
    device: torch.device,
    recorder: Recorder | None = None,
    seed: int = 2,
) -> Course:
    """As `course`, of a copy that Lightning's Trainer trains; what updates say is not kept."""
    own = copy.deepcopy(module)
    if recorder is not None:
        own.capture(recorder)
    trainer = L.Trainer(
        accelerator="cpu" if device.type == "cpu" else "gpu", devices=1, max_steps=len(batches),
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[CodebookUpdate()],
    )  # fmt: skip
    torch.manual_seed(seed)
    trainer.fit(own, torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return Course([], _weights(own), "as they are" if own.captured is None else own.captured.state)


def _weights(module: TrainedModule) -> dict[str, Tensor]:
    return {name: x.detach().cpu() for name, x in module.state_dict().items()}


def apart(one: Course, other: Course) -> float:
    """How far two courses lie apart: the largest of all that updates say, and of the weights.

    Both relative to ``other``'s. What is near zero is compared with a thousandth of the largest.
    """
    said = 0.0
    for mine, right in zip(one.found, other.found, strict=True):
        least = 1e-3 * max(abs(x) for x in right.values())
        for name, x in right.items():
            off = abs(mine[name] - x) / max(abs(x), least)
            said = max(said, off if math.isfinite(off) else math.inf)
    floats = [n for n, x in other.weights.items() if x.is_floating_point()]
    gone = sum(float((one.weights[n] - other.weights[n]).double().square().sum()) for n in floats)
    size = sum(float(other.weights[n].double().square().sum()) for n in floats)
    return max(said, math.sqrt(gone / size))


@contextmanager
def repeatable() -> Iterator[None]:
    """Have kernels add in one order where they can: then equal updates are equal to the bit.

    The fast kernels of attention cannot.
    """
    settings: Any = torch.utils.deterministic
    kept = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    filled = settings.fill_uninitialized_memory
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    settings.fill_uninitialized_memory = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(kept[0], warn_only=warned)
        torch.backends.cudnn.deterministic = kept[1]
        settings.fill_uninitialized_memory = filled


class Timing(NamedTuple):
    """What an update takes on a GPU."""

    milliseconds: float
    """Median of a row of updates, as training makes them: without waiting after each."""
    launches: int
    """Calls of the host that have the device do something."""
    kernels: int
    """What the device does: kernels and copies."""
    busy: float
    """Share of the time in which it does any of them."""
    gigabytes: float
    """Peak of what tensors hold."""
    reserved: float
    """Peak of what torch has taken from the device, graphs included."""
    state: str


def timed(updates: Updates, batch: Batch, rounds: int = 5, each: int = 5) -> Timing:
    """Time updates on a CUDA device.

    Args:
        updates: Not yet warm.
        batch: On the CPU; its copy to the device is not timed.
        rounds: Rows of updates.
        each: Updates of a row.
    """
    given = {key: value.to(updates.device) for key, value in batch.items()}
    torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM):
        updates(given)
    torch.cuda.synchronize()
    rows = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(each):
            updates(given)
        torch.cuda.synchronize()
        rows.append((time.perf_counter() - began) / each)
    seconds = statistics.median(rows)
    launches, spans = profiled(lambda: updates(given))
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    busy = covered(spans) / 1e6 / seconds
    return Timing(
        1e3 * seconds, launches, len(spans), busy, peak / 1e9, reserved / 1e9, updates.state
    )


def profiled(update: Any) -> tuple[int, list[tuple[float, float]]]:
    """Launches of one update, and begin and end of what the device did, microseconds."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        update()
        torch.cuda.synchronize()
    launches, spans = 0, []
    for event in profile.events() or []:
        if event.device_type.name == "CPU":
            launches += event.name.startswith(LAUNCHES)
        elif not getattr(event, "is_user_annotation", False):
            # Not what only names a stretch of time, such as "Optimizer.step".
            spans.append((event.time_range.start, event.time_range.end))
    return launches, spans


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of what spans cover together; several streams may be busy at once."""
    total, end = 0.0, float("-inf")
    for begin, until in sorted(spans):
        total += max(0.0, until - max(begin, end))
        end = max(end, until)
    return total
