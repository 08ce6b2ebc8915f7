"""What `speed.py` measures of a step, each in a process of its own: time, counts, parts."""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.reference_step import ReferenceStep
from mapo_lightning.config.compose import compose
from mapo_lightning.models.rssm_world.fused.rssm import FusedRSSM
from mapo_lightning.run.build import (
    build_finetune,
    build_pretrain,
)
from mapo_lightning.run.config import RunConfig
from mapo_lightning.run.step_check import batch_of
from mapo_lightning.run.step_timing import covered, profiled
from mapo_lightning.training.cuda_graph import Captured, CudaRecorder
from mapo_lightning.training.process import keep_freed_memory
from mapo_lightning.types import Batch

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
ACTION = 6
# `ReferenceStep` is written out for residual networks.
RESIDUAL = "world_model.image.kind=resnet world_model.image.size=64"
RESIDUAL += " world_model.image.channels=[12,24,48] world_model.image.layers=1"
CASES: dict[str, tuple[str, str]] = {
    "pretrain paper": ("pretrain", "size=paper method=contextwm"),
    "finetune paper": ("finetune", "size=paper method=contextwm"),
    "pretrain tiny": ("pretrain", f"size=tiny method=mapo {RESIDUAL}"),
    "finetune tiny": (
        "finetune",
        f"size=tiny method=mapo {RESIDUAL} finetune.batch_size=4 finetune.chunk_length=16 "
        "agent.horizon=10",
    ),
}
# size=tiny as it is today, of which there is no plain step.
TODAY: dict[str, tuple[str, str]] = {
    "pretrain tiny, today": ("pretrain", "size=tiny method=mapo"),
    "finetune tiny, today": (
        "finetune",
        "size=tiny method=mapo finetune.batch_size=4 finetune.chunk_length=16 agent.horizon=10",
    ),
}
# The same for a GPU.
GPU_VARIANTS = {
    "reference": ("reference", False),
    "ours fp32": ("ours", False),
    "ours bf16": ("ours", True),
    "ours bf16, captured": ("captured", True),
}
# Name -> (implementation, allocator set up, bf16).
VARIANTS = {
    "reference": ("reference", False, False),
    "reference, allocator": ("reference", True, False),
    "ours fp32, no allocator": ("ours", False, False),
    "ours fp32": ("ours", True, False),
    "ours bf16": ("ours", True, True),
    "ours fp32, recompute cheap": ("ours", True, False),
    "ours bf16, recompute cheap": ("ours", True, True),
    "ours fp32, recompute all": ("ours", True, False),
    "ours bf16, recompute all": ("ours", True, True),
}
VIEWS = {"detach", "alias", "_unsafe_view", "lift_fresh", "_reshape_alias", "empty", "empty_like"}
VIEWS |= {"empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"}
SYNCS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique"}


class Work:
    """One case, ready to be stepped by either implementation."""

    def __init__(self, case: str, bf16: bool = False, words: Sequence[str] = ()) -> None:
        stage, chosen = (CASES | TODAY)[case]
        torch.manual_seed(0)
        cfg = compose(["env=dmc/walker_run", *chosen.split(), *words], RunConfig, CONF).config
        self.module: Any
        if stage == "pretrain":
            self.module, self.agent = build_pretrain(cfg), None
            self.batch = batch_of(cfg, cfg.pretrain.batch_size, cfg.data.clip_length, None)
        else:
            self.module, _ = build_finetune(cfg, ACTION, None)
            self.agent = self.module.agent
            sizes = cfg.finetune.batch_size, cfg.finetune.chunk_length
            self.batch = batch_of(cfg, *sizes, ACTION)
        self.world_model = self.module.world_model
        found = self.module.configure_optimizers()
        self.optimizer = found["optimizer"] if isinstance(found, dict) else found
        self.bf16, self.device = bf16, self.batch["obs"].device

    def ours(self) -> None:
        """One update as Lightning makes it."""
        self.gradients(self.batch)
        self.optimizer.step()

    def gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Losses, backward and clipping."""
        # Without the cache of cast weights, as Lightning has it.
        bf16 = torch.autocast(self.device.type, torch.bfloat16, self.bf16, cache_enabled=False)
        with bf16:
            return self.module.gradients(batch, self.optimizer)

    def stepper(self, implementation: str) -> Callable[[], None]:
        """One update by either implementation, to be called again and again."""
        if implementation == "ours":
            return self.ours
        if implementation == "captured":
            captured = Captured(self.gradients, CudaRecorder())

            def update() -> None:
                captured(self.batch)
                self.optimizer.step()

            return update
        self.world_model.to(memory_format=torch.contiguous_format)
        reference = ReferenceStep(self.world_model, self.agent)
        return lambda: reference.step(self.batch)


class Operations(TorchDispatchMode):
    """Counts operations that start a kernel on a GPU, and those that make the host wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in SYNCS:
            self.syncs[name] += 1
        elif not func.is_view and name not in VIEWS:
            self.kernels[name] += 1
        return func(*args, **(kwargs or {}))


def operations(step: Callable[[], None]) -> Operations:
    """Count what one call does, after one that is not counted."""
    step()
    with Operations() as counted:
        step()
    return counted


def measure_step(args: argparse.Namespace) -> dict[str, Any]:
    implementation, keep, bf16 = VARIANTS[args.variant]
    if keep:
        keep_freed_memory()
    _, _, again = args.variant.partition(", recompute ")
    work = Work(args.case, bf16, [f"world_model.image.recompute={again}"] if again else ())
    step = work.stepper(implementation)
    for _ in range(args.warm):
        step()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    seconds = []
    for _ in range(args.steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": seconds,
        "faults": (usage.ru_minflt - faults) / args.steps,
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,
    }


def measure_gpu(args: argparse.Namespace) -> dict[str, Any]:
    """Wall clock, kernels, busy share and memory of an update on a GPU."""
    torch.set_default_device("cuda")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    implementation, bf16 = GPU_VARIANTS[args.variant]
    step = Work(args.case, bf16).stepper(implementation)
    for _ in range(args.warm):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(args.steps):
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    _, spans = profiled(step)
    return {
        "seconds": seconds,
        "kernels": len(spans),
        "busy": covered(spans) / 1e6 / statistics.median(seconds),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def measure_counts(args: argparse.Namespace) -> dict[str, Any]:
    step = Work(args.case).stepper(VARIANTS[args.variant][0])
    with FlopCounterMode(display=False) as flops:
        step()
    with Operations() as counted:
        step()
    return {
        "kernels": counted.kernels.total(),
        "syncs": counted.syncs.total(),
        "flops": flops.get_total_flops(),
    }


@contextmanager
def timed(target: Any, name: str, seconds: Counter[str], key: str) -> Iterator[None]:
    plain = getattr(target, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return plain(*args, **kwargs)
        finally:
            seconds[key] += time.perf_counter() - started

    setattr(target, name, wrapper)
    try:
        yield
    finally:
        setattr(target, name, plain)


def measure_parts(args: argparse.Namespace) -> dict[str, Any]:
    """Where our step's time goes, by wrapping its parts."""
    _, keep, bf16 = VARIANTS[args.variant]
    if keep:
        keep_freed_memory()
    work, seconds = Work(args.case, bf16), Counter[str]()
    world_model, agent = work.world_model, work.agent
    parts: list[tuple[Any, str, str]] = [
        (world_model.encoder, "forward", "encoder"),
        (world_model.decoder, "forward", "decoder"),
        (FusedRSSM, "observe", "scans"),
        (FusedRSSM, "kl", "KL"),
        (Tensor, "backward", "backward of everything"),
        (work.optimizer, "step", "Adam"),
        (torch.nn.utils, "clip_grad_norm_", "clipping"),
        (world_model, "loss", "world model, forward"),
    ]
    if world_model.context is not None:
        parts.append((world_model.context, "forward", "context"))
    if agent is not None:
        parts += [
            (world_model, "imagine_with_gradients", "imagination"),
            (agent, "losses", "agent, forward"),
            (agent.critic, "forward", "critic"),
        ]
    for _ in range(args.warm):
        work.ours()
    with ExitStack() as stack:
        for target, name, key in parts:
            stack.enter_context(timed(target, name, seconds, key))
        started = time.perf_counter()
        for _ in range(args.steps):
            work.ours()
        whole = (time.perf_counter() - started) / args.steps
    return {"whole": whole} | {key: value / args.steps for key, value in seconds.items()}


STEPS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "step": measure_step,
    "gpu": measure_gpu,
    "counts": measure_counts,
    "parts": measure_parts,
}
