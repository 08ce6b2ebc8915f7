"""What `speed.py` measures, each in a process of its own: steps, counts, parts, surroundings."""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.reference_step import ReferenceStep
from callbacks.codebook import CodebookUpdate
from callbacks.collect import CollectExperience
from mapo_lightning.build import (
    build_collection,
    build_finetune,
    build_pretrain,
    build_trainer,
    build_videos,
    render_demo,
)
from mapo_lightning.capture import Captured, CudaRecorder
from mapo_lightning.compose import compose
from mapo_lightning.config import RunConfig
from mapo_lightning.datamodule import ReplayDataModule
from mapo_lightning.envs.spec import make_vector_env
from mapo_lightning.models.rssm import RSSM
from mapo_lightning.runtime import keep_freed_memory
from mapo_lightning.semantics.factory import semantic_dim
from mapo_lightning.types import Batch

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
ACTION = 6
CASES: dict[str, tuple[str, str]] = {
    "pretrain paper": ("pretrain", "size=paper method=contextwm"),
    "finetune paper": ("finetune", "size=paper method=contextwm"),
    "pretrain tiny": ("pretrain", "size=tiny method=mapo"),
    "finetune tiny": (
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
RECOMPUTE = ["world_model.image.recompute=true"]
# Name -> (implementation, allocator set up, bf16).
VARIANTS = {
    "reference": ("reference", False, False),
    "reference, allocator": ("reference", True, False),
    "ours fp32, no allocator": ("ours", False, False),
    "ours fp32": ("ours", True, False),
    "ours bf16": ("ours", True, True),
    "ours fp32, recompute": ("ours", True, False),
    "ours bf16, recompute": ("ours", True, True),
}
VIEWS = {"detach", "alias", "_unsafe_view", "lift_fresh", "_reshape_alias", "empty", "empty_like"}
VIEWS |= {"empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"}
SYNCS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique"}


def batch_of(cfg: RunConfig, batch: int, steps: int, action: int | None) -> Batch:
    """Random clips, or chunks of replay where there is an action of that width."""
    first = torch.zeros(batch, steps, dtype=torch.bool)
    first[:, 0] = True
    found = {
        "obs": torch.randint(0, 256, (batch, steps, 64, 64, 3), dtype=torch.uint8),
        "semantic": torch.randn(batch, steps, semantic_dim(cfg.vlm)),
        "has_semantic": torch.rand(batch, steps) < 0.7,
        "position": torch.arange(steps).expand(batch, steps),
        "is_first": first,
    }
    if action is not None:
        found["action"] = torch.rand(batch, steps, action) * 2 - 1
        found["reward"] = torch.rand(batch, steps)
        found["is_terminal"] = torch.zeros(batch, steps, dtype=torch.bool)
    return found


class Work:
    """One case, ready to be stepped by either implementation."""

    def __init__(self, case: str, bf16: bool = False, words: Sequence[str] = ()) -> None:
        stage, chosen = CASES[case]
        torch.manual_seed(0)
        cfg = compose(["env=dmc_walker_run", *chosen.split(), *words], RunConfig, CONF).config
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
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            total, terms = self.module.losses(batch)
        self.optimizer.zero_grad()
        total.backward()
        for group in self.optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 100.0, foreach=True)
        return dict(terms)

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
    work = Work(args.case, bf16, RECOMPUTE if "recompute" in args.variant else ())
    step = work.stepper(implementation)
    for _ in range(args.warm):
        step()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    seconds, cpu = [], []
    for _ in range(args.steps):
        started, spent = time.perf_counter(), time.process_time()
        step()
        seconds.append(time.perf_counter() - started)
        cpu.append(time.process_time() - spent)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": seconds,
        "cpu": cpu,
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
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() or [] if event.device_type.name == "CUDA"]
    return {
        "seconds": seconds,
        "kernels": len(kernels),
        "busy": sum(e.device_time for e in kernels) / 1e6 / statistics.median(seconds),
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
        (RSSM, "observe", "scans"),
        (RSSM, "kl", "KL"),
        (Tensor, "backward", "backward of everything"),
        (work.optimizer, "step", "Adam"),
        (torch.nn.utils, "clip_grad_norm_", "clipping"),
        (world_model, "loss", "world model, forward"),
    ]
    if world_model.context is not None:
        parts.append((world_model.context, "forward", "context"))
    if agent is not None:
        parts += [
            (world_model, "imagine", "imagination"),
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


def measure_ceiling(args: argparse.Namespace) -> dict[str, Any]:
    """FLOP/s of a large convolution and of a large product, the best of a few."""
    keep_freed_memory()
    x = torch.randn(64, 96, 32, 32).contiguous(memory_format=torch.channels_last)
    conv = torch.nn.Conv2d(96, 96, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    a = torch.randn(2048, 2048)
    found: dict[str, Any] = {}
    with torch.no_grad():
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            xs, layer, matrix = x.to(dtype), conv.to(dtype), a.to(dtype)
            found[f"conv {name}"] = best(lambda xs=xs, f=layer: f(xs), 2 * 64 * 1024 * 96 * 96 * 9)
            found[f"product {name}"] = best(lambda m=matrix: m @ m, 2 * 2048**3)
    return found


def measure_envs(args: argparse.Namespace) -> dict[str, Any]:
    """Rendered frames per second of two spawn workers under random actions."""
    cfg = compose([f"env={args.case}", "env.num_envs=2"], RunConfig, CONF).config
    envs = make_vector_env(replace(cfg.env, render_quality=args.variant), 0)
    try:
        envs.reset(seed=0)
        envs.action_space.seed(0)
        started, frames = time.perf_counter(), 0
        while time.perf_counter() - started < args.steps:
            envs.step(envs.action_space.sample())
            frames += 2
        return {"frames/s": frames / (time.perf_counter() - started)}
    finally:
        envs.close()


def measure_data(args: argparse.Namespace) -> dict[str, Any]:
    """Clips per second of the loader, cold and warm; and pre-training with labels and without."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["data=toy", f"data.root={folder}/videos", "data.workers=1"]
        words += [f"work_dir={folder}/work", "pretrain.batch_size=8"]
        cfgs = {
            kind: compose([*words, f"vlm={kind}"], RunConfig, CONF).config
            for kind in ("flow", "none")
        }
        render_demo(cfgs["flow"])
        found: dict[str, Any] = {}
        for name, kind in (("cold", "flow"), ("warm", "flow"), ("none", "none")):
            # Enough batches to have seen every window, so that the store is warm afterwards.
            batches = iter(build_videos(cfgs[kind]).train_dataloader())
            next(batches)
            started, windows = time.perf_counter(), 0
            for _ in range(args.steps):
                windows += int(next(batches)["vlm_asked"].sum())
            seconds = time.perf_counter() - started
            found[f"clips/s {name}"] = 8 * args.steps / seconds
            if name == "cold":
                found["windows/s cold"] = windows / seconds
        work = Work("pretrain tiny")
        rates: dict[str, list[float]] = {"flow": [], "none": []}
        loaders = {kind: iter(build_videos(cfg).train_dataloader()) for kind, cfg in cfgs.items()}
        for turn in range(6):
            for kind, loader in loaders.items():
                started = time.perf_counter()
                for _ in range(args.steps // 4):
                    work.batch = {k: v for k, v in next(loader).items() if k in work.batch}
                    work.ours()
                if turn:
                    rates[kind].append(args.steps // 4 / (time.perf_counter() - started))
        found |= {f"updates/s {kind}": statistics.median(r) for kind, r in rates.items()}
    return found


def measure_overhead(args: argparse.Namespace) -> dict[str, Any]:
    """What one tiny fine-tuning update costs with everything around it, part by part."""
    keep_freed_memory()
    seconds = Counter[str]()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        cfg = compose(
            [
                "env=toy",
                "size=tiny",
                "vlm=none",
                "trainer.log_every=50",
                "finetune.prefill=200",
                "finetune.initial_updates=10",
                "finetune.agent_steps=100000",
            ],
            RunConfig,
            CONF,
        ).config
        stage = build_collection(cfg, Path(folder), 0)
        module, _ = build_finetune(cfg, stage.action_dim, None)
        collect, codes = CollectExperience(stage.collector, 2, 0), CodebookUpdate()
        data = ReplayDataModule(stage.replay, 4, 16, 0)
        trainer = build_trainer(cfg, args.warm, Path(folder), [collect, codes], CSVLogger(folder))
        for target, name, key in (
            (module, "training_step", "step"),
            (Tensor, "backward", "step"),
            (module, "configure_gradient_clipping", "step"),
            (torch.optim.Adam, "zero_grad", "step"),
            (collect, "on_train_batch_end", "collection"),
            (codes, "on_train_batch_end", "codebook"),
            (stage.replay, "sample", "replay"),
        ):
            stack.enter_context(timed(target, name, seconds, key))
        times: list[float] = []

        class Clock(L.Callback):
            def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
                times.append(time.perf_counter())
                if len(times) == 30:
                    seconds.clear()

        trainer.fit_loop.epoch_loop.max_steps = 30 + args.steps
        trainer.callbacks.insert(0, Clock())
        trainer.fit(module, datamodule=data)
    whole = (times[29 + args.steps] - times[29]) / args.steps
    return {"whole": whole} | {key: value / args.steps for key, value in seconds.items()}


def best(work: Callable[[], Any], flops: int) -> float:
    fastest = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        work()
        fastest = min(fastest, time.perf_counter() - started)
    return flops / fastest / 1e9


MEASURES = {
    "step": measure_step,
    "gpu": measure_gpu,
    "counts": measure_counts,
    "parts": measure_parts,
    "ceiling": measure_ceiling,
    "envs": measure_envs,
    "data": measure_data,
    "overhead": measure_overhead,
}
