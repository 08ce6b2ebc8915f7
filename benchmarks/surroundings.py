"""What `speed.py` measures around a step: the machine, simulators, the loader, Lightning."""

from __future__ import annotations

import argparse
import mmap
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from benchmarks.measures import CONF, Work, timed
from callbacks.codebook import CodebookUpdate
from callbacks.collect import CollectExperience
from mapo_lightning.config.compose import compose
from mapo_lightning.envs.factory import make_vector_env
from mapo_lightning.run.build import build_collection, build_finetune, build_videos
from mapo_lightning.run.config import RunConfig
from mapo_lightning.run.stages import render_demo
from mapo_lightning.run.trainer import build_trainer
from mapo_lightning.tracking.artifacts import log_video
from mapo_lightning.tracking.logger import RunLogger, make_logger
from mapo_lightning.tracking.settings import TrackingConfig
from mapo_lightning.training.datamodule import ReplayDataModule
from mapo_lightning.training.process import keep_freed_memory


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
    return found | fresh_memory()


def fresh_memory(size: int = 1 << 29) -> dict[str, float]:
    """GB/s at which memory is written that the process gets anew, and that it has already."""
    with mmap.mmap(-1, size) as pages:
        found = {}
        for name in ("fresh memory GB/s", "memory GB/s"):
            started = time.perf_counter()
            np.frombuffer(pages, np.uint8)[:] = 1
            found[name] = size / (time.perf_counter() - started) / 1e9
    return found


def best(work: Callable[[], Any], flops: int) -> float:
    fastest = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        work()
        fastest = min(fastest, time.perf_counter() - started)
    return flops / fastest / 1e9


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
        work = Work("pretrain tiny, today")
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
        trainer = build_trainer(cfg, args.warm, Path(folder), [collect, codes], [CSVLogger(folder)])
        for target, name, key in (
            (module, "training_step", "step"),
            (Tensor, "backward", "step"),
            (module, "configure_gradient_clipping", "step"),
            (torch.optim.Adam, "zero_grad", "step"),
            (import_module("torch.optim.adam"), "adam", "step"),
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


def measure_logging(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds that training waits for MLflow: for 30 values of an update, and for a film."""
    spent = []
    with tempfile.TemporaryDirectory() as folder:
        cfg = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", artifacts=f"{folder}/a")
        run = make_logger(cfg, "cost")
        assert isinstance(run, RunLogger)
        values = {f"train/m{i}": float(i) for i in range(30)}
        for step in range(args.steps):
            started = time.perf_counter()
            run.log_metrics(values, step)
            spent.append(time.perf_counter() - started)
        if not run.flush(240):
            raise RuntimeError("the values did not reach the store")
        film = np.random.default_rng(0).integers(0, 256, (50, 192, 384, 3), np.uint8)
        started = time.perf_counter()
        if not log_video(run, film, "dream", 1, 10.0):
            raise RuntimeError("the film did not reach the store")
        seconds = time.perf_counter() - started
        run.finalize("success")
    return {"values": statistics.median(spent), "film": seconds}


SURROUNDINGS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "ceiling": measure_ceiling,
    "envs": measure_envs,
    "data": measure_data,
    "overhead": measure_overhead,
    "logging": measure_logging,
}
