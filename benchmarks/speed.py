"""Measures what a training step costs, against the plain step of `reference_step.py`.

    python benchmarks/speed.py --quick                     under five minutes
    python benchmarks/speed.py --out benchmarks/results/speed.md
    python benchmarks/speed.py --only tiny,env             some sections

Every figure comes from a process of its own (the allocator's settings hold for a whole process);
implementations take turns, rounds are repeated, medians are shown. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.reference_step import ReferenceStep  # noqa: E402
from callbacks.codebook import CodebookUpdate  # noqa: E402
from callbacks.collect import CollectExperience  # noqa: E402
from mapo_lightning.build import (  # noqa: E402
    build_collection,
    build_finetune,
    build_pretrain,
    build_trainer,
    build_videos,
    render_demo,
)
from mapo_lightning.compose import compose  # noqa: E402
from mapo_lightning.config import RunConfig  # noqa: E402
from mapo_lightning.datamodule import ReplayDataModule  # noqa: E402
from mapo_lightning.envs.spec import make_vector_env  # noqa: E402
from mapo_lightning.models.rssm import RSSM  # noqa: E402
from mapo_lightning.runtime import keep_freed_memory  # noqa: E402
from mapo_lightning.semantics.factory import semantic_dim  # noqa: E402
from mapo_lightning.types import Batch  # noqa: E402

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
TARGETS = {
    ("pretrain paper", "ours fp32"): 1.75,
    ("pretrain paper", "ours bf16"): 3.0,
    ("finetune paper", "ours fp32"): 2.4,
    ("finetune paper", "ours bf16"): 4.2,
    ("pretrain tiny", "ours fp32"): 4.0,
    ("finetune tiny", "ours fp32"): 4.0,
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
        self.autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()

    def ours(self) -> None:
        """One update as Lightning makes it."""
        with self.autocast:
            fit = self.world_model.loss(self.batch)
            total = fit.total
            if self.agent is not None:
                start = fit.belief.control.flatten().detach()
                behaviour = self.agent.losses(self.world_model, start)
                total = total + behaviour.actor + behaviour.critic
        self.optimizer.zero_grad()
        total.backward()
        for group in self.optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 100.0, foreach=True)
        self.optimizer.step()

    def stepper(self, implementation: str) -> Callable[[], None]:
        """One update by either implementation, to be called again and again."""
        if implementation == "ours":
            return self.ours
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


# ---------------------------------------------------------------- in a process of its own


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
        "peak_gb": usage.ru_maxrss / 2**20,
    }


def measure_counts(args: argparse.Namespace) -> dict[str, Any]:
    step = Work(args.case).stepper(VARIANTS[args.variant][0])
    counted = operations(step)
    with FlopCounterMode(display=False) as flops:
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
    "counts": measure_counts,
    "parts": measure_parts,
    "ceiling": measure_ceiling,
    "envs": measure_envs,
    "data": measure_data,
    "overhead": measure_overhead,
}


def alone(measure: str, threads: int, **options: Any) -> dict[str, Any]:
    """Run one measurement in a fresh process."""
    words = [f"--{key}={value}" for key, value in options.items()]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, __file__, "--measure", measure, *words],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.processor()
    return f"{cpu}, {os.cpu_count()} cores, torch {torch.__version__}, {platform.system()}"


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def steps_table(cases: Sequence[str], threads: int, rounds: int, warm: int, steps: int) -> str:
    """Seconds per step and ratios; the variants take turns, round after round."""
    rows = []
    for case in cases:
        large = "paper" in case  # where memory matters
        found: dict[str, list[dict[str, Any]]] = {
            name: [] for name in VARIANTS if large or "recompute" not in name
        }
        for _ in range(rounds):
            for name in found:
                options = {"case": case, "variant": name, "warm": warm, "steps": steps}
                found[name].append(alone("step", threads, **options))
        # On a busy machine the wall clock measures the others: then the least processor time of
        # any step is what the step itself costs. With one thread the two agree on a quiet machine.
        wall = {
            name: statistics.median(t for one in runs for t in one["seconds"])
            for name, runs in found.items()
        }
        cpu = {name: min(t for one in runs for t in one["cpu"]) for name, runs in found.items()}
        for name, runs in found.items():
            target = TARGETS.get((case, name))
            rows.append(
                [
                    case,
                    name,
                    f"{wall[name]:.3f}",
                    f"{wall['reference'] / wall[name]:.2f}",
                    f"{cpu[name]:.3f}",
                    f"**{cpu['reference'] / cpu[name]:.2f}**",
                    f"{cpu['reference, allocator'] / cpu[name]:.2f}",
                    f"{target}" if target else "",
                    f"{statistics.median(one['faults'] for one in runs):,.0f}",
                    f"{max(one['peak_gb'] for one in runs):.2f}",
                ]
            )
    heads = ["step", "who", "wall s, median", "ratio", "processor s, least", "ratio"]
    heads += ["ratio to the reference with our allocator", "target", "page faults", "peak GB"]
    return f"\n{threads} thread(s).\n\n" + table(heads, rows)


def counts_table(cases: Sequence[str]) -> str:
    rows = []
    for case in cases:
        plain = alone("counts", 1, case=case, variant="reference")
        ours = alone("counts", 1, case=case, variant="ours fp32")
        rows.append(
            [
                case,
                f"{plain['kernels']:,}",
                f"{ours['kernels']:,}",
                f"**{plain['kernels'] / ours['kernels']:.2f}**",
                f"{plain['syncs']:,}",
                f"{ours['syncs']:,}",
                f"{ours['flops'] / 1e9:,.1f}",
            ]
        )
    heads = ["step", "kernels, reference", "kernels, ours", "ratio (target 4)"]
    return table([*heads, "syncs, reference", "syncs, ours (target 0)", "GFLOP, ours"], rows)


def parts_table(cases: Sequence[str], threads: int, steps: int) -> str:
    found = {
        (case, name): alone("parts", threads, case=case, variant=name, warm=2, steps=steps)
        for case in cases
        for name in ("ours fp32", "ours bf16")
    }
    keys = list(dict.fromkeys(key for one in found.values() for key in one))
    rows = [
        [k, *(f"{1e3 * one[k]:.1f}" if k in one else "" for one in found.values())] for k in keys
    ]
    return table(["part, ms", *(f"{case}, {name}" for case, name in found)], rows)


def other_tables(quick: bool) -> Iterator[str]:
    rate = alone("ceiling", 1)
    yield "\nCeilings of one core, GFLOP/s.\n\n" + table(
        list(rate), [[f"{x:.0f}" for x in rate.values()]]
    )
    over = alone("overhead", 1, warm=1, steps=60)
    rest = over["whole"] - sum(value for key, value in over.items() if key != "whole")
    shown = over | {"Lightning, logging, loader": rest}
    yield "\nOne fine-tuning update of the toy task (size=tiny) in Lightning's Trainer, ms."
    yield " Target: everything around the step under 10 % of it.\n\n"
    yield table(list(shown), [[f"{1e3 * x:.2f}" for x in shown.values()]])
    yield f"\nAround the step: **{(over['whole'] / over['step'] - 1):.1%}** of it.\n"
    data = alone("data", 1, steps=20 if quick else 60)
    yield "\nLoader, one worker (size=tiny, toy videos, `vlm=flow`).\n\n"
    yield table(list(data), [[f"{x:.1f}" for x in data.values()]])
    share = data["updates/s flow"] / data["updates/s none"]
    yield f"\nTraining with a warm label store: **{share:.1%}** of `vlm=none` (target 98 %).\n"
    rows = []
    for env, target in (("dmc_walker_run", 900), ("metaworld_door_open", 250)):
        for quality in ("fast",) if quick else ("full", "fast"):
            got = alone("envs", 1, case=env, variant=quality, steps=4 if quick else 15)
            rows.append(
                [env, quality, f"{got['frames/s']:.0f}", target if quality == "fast" else ""]
            )
    yield "\nEnvironments, two spawn workers.\n\n"
    yield table(["task", "render_quality", "rendered frames/s", "target"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--case", default="finetune tiny", help=argparse.SUPPRESS)
    parser.add_argument("--variant", default="ours fp32", help=argparse.SUPPRESS)
    parser.add_argument("--warm", type=int, default=2, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=10, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="no fine-tuning step at size=paper")
    parser.add_argument("--only", default="", help="of tiny,pretrain,finetune,counts,parts,other")
    parser.add_argument("--out", type=Path, help="append the tables to this file")
    args = parser.parse_args()
    if args.measure:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        print(json.dumps(MEASURES[args.measure](args)))
        return
    tiny, rounds = ["pretrain tiny", "finetune tiny"], 1 if args.quick else 3
    sections: dict[str, Callable[[], Iterator[str]]] = {
        "tiny": lambda: iter([steps_table(tiny, 1, rounds, 3, 8)]),
        "pretrain": lambda: iter([steps_table(["pretrain paper"], 2, rounds, 1, 2)]),
        "finetune": lambda: iter([steps_table(["finetune paper"], 2, 1 + rounds // 3, 1, 1)]),
        "counts": lambda: iter(["\n", counts_table(tiny if args.quick else list(CASES))]),
        "parts": lambda: iter(["\n", parts_table(tiny if args.quick else list(CASES), 1, 3)]),
        "other": lambda: other_tables(args.quick),
    }
    wanted = args.only.split(",") if args.only else list(sections)
    text = [f"\n{machine()}\n"]
    print(text[0])
    for name in wanted:
        if args.quick and not args.only and name == "finetune":
            continue
        for piece in sections[name]():
            print(piece, end="", flush=True)
            text.append(piece)
    if args.out:
        with args.out.open("a") as file:
            file.write("".join(text))


if __name__ == "__main__":
    main()
