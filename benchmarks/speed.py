"""Measures what a training step costs, against the plain step of `reference_step.py`.

    python benchmarks/speed.py --quick                     under five minutes
    python benchmarks/speed.py --out benchmarks/results/speed.md
    python benchmarks/speed.py --only tiny,other           some sections

Every figure comes from a process of its own (the allocator's settings hold for a whole process);
implementations take turns, rounds are repeated, medians are shown. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measures import CASES, GPU_VARIANTS, STEPS, TODAY, VARIANTS  # noqa: E402
from benchmarks.surroundings import SURROUNDINGS  # noqa: E402
from callbacks.settings import CallbacksConfig  # noqa: E402
from mapo_lightning.training.settings import TrainerConfig  # noqa: E402

MEASURES = STEPS | SURROUNDINGS

TARGETS = {
    ("pretrain paper", "ours fp32"): 1.75,
    ("pretrain paper", "ours bf16"): 3.0,
    ("finetune paper", "ours fp32"): 2.4,
    ("finetune paper", "ours bf16"): 4.2,
    ("pretrain tiny", "ours fp32"): 4.0,
    ("finetune tiny", "ours fp32"): 4.0,
}
# Ratios to ContextWM's own code, which is not part of this project: measured once beside it
# (docs/performance.md, "How slow is the plain step?").
PUBLISHED = {
    ("pretrain paper", "ours fp32"): "1.34 to 1.53",
    ("pretrain paper", "ours bf16"): "2.34 to 2.63",
    ("finetune paper", "ours fp32"): "1.55 to 1.67",
    ("finetune paper", "ours bf16"): "2.76 to 3.2",
}
MEMORY = {"ours fp32": 8.0, "ours bf16": 6.0}  # GB, of fine-tuning at size=paper
SMALL = [name for name in VARIANTS if "recompute" not in name]  # where memory does not matter
FEW = ["reference", "reference, allocator", "ours fp32"]
TINY, PAPER = ["pretrain tiny", "finetune tiny"], ["pretrain paper", "finetune paper"]


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
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    return (
        f"{time.strftime('%Y-%m-%d %H:%M')}, {cpu}, {os.cpu_count()} cores, torch "
        f"{torch.__version__}, {platform.system()}; load before (1, 5, 15 minutes): {load}"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def steps_table(
    cases: Sequence[str],
    variants: Sequence[str],
    threads: int,
    rounds: int,
    warm: int,
    steps: int,
) -> str:
    """Seconds per step and ratios; the variants take turns, round after round."""
    rows, ceiling = [], alone("ceiling", threads)
    for case in cases:
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
        for _ in range(rounds):
            for name in found:
                options = {"case": case, "variant": name, "warm": warm, "steps": steps}
                found[name].append(alone("step", threads, **options))
        wall = {
            name: statistics.median(t for one in runs for t in one["seconds"])
            for name, runs in found.items()
        }
        for name, runs in found.items():
            who = "reference" if "reference" in name else "ours fp32"
            rate = counts(case, who)["flops"] / 1e9 / wall[name]
            top = ceiling["conv bf16" if "bf16" in name else "conv fp32"]
            peak = max(one["peak_gb"] for one in runs)
            limit = MEMORY.get(name.split(",")[0]) if case == "finetune paper" else None
            rows.append(
                [
                    case,
                    name,
                    f"{wall[name]:.3f}",
                    f"**{wall['reference, allocator'] / wall[name]:.2f}**",
                    f"{wall['reference'] / wall[name]:.2f}",
                    PUBLISHED.get((case, name), ""),
                    TARGETS.get((case, name), ""),
                    f"{rate:.0f}",
                    f"{rate / top:.0%}",
                    f"{statistics.median(one['faults'] for one in runs):,.0f}",
                    f"{peak:.2f}" + (f" (limit {limit:g})" if limit else ""),
                ]
            )
    heads = ["step", "who", "wall s, median", "ratio to the reference with our allocator"]
    heads += ["to the reference as it is", "to the published code, elsewhere", "target", "GFLOP/s"]
    heads += ["of the convolution's ceiling", "page faults", "peak GB"]
    shown = ", ".join(f"{name} {rate:.3g}" for name, rate in ceiling.items())
    return (
        f"\n{threads} thread(s), {rounds} round(s) of {steps} steps after {warm} that are not "
        f"counted. Ceilings, GFLOP/s of convolution and product: {shown}.\n\n{table(heads, rows)}"
    )


@cache
def counts(case: str, variant: str) -> dict[str, Any]:
    """Kernels, host syncs and FLOPs of one step; on two threads, for the wait's sake."""
    return alone("counts", 2, case=case, variant=variant)


def today_table(rounds: int, steps: int) -> str:
    """Updates per second of size=tiny today beside the networks that it had in version 0.1.0."""
    pairs = list(zip(TINY, TODAY, strict=True))
    found: dict[str, list[float]] = {case: [] for pair in pairs for case in pair}
    for _ in range(rounds):
        for case, seconds in found.items():
            one = alone("step", 1, case=case, variant="ours fp32", warm=3, steps=steps)
            seconds += one["seconds"]
    rate = {case: 1.0 / statistics.median(seconds) for case, seconds in found.items()}
    rows = [
        [old, f"{rate[old]:.1f}", f"{rate[new]:.1f}", f"**{rate[new] / rate[old]:.2f}**"]
        for old, new in pairs
    ]
    heads = ["step, ours fp32, 1 thread", "updates/s, networks of 0.1.0", "today", "ratio"]
    return "\n" + table(heads, rows)


def counts_table(cases: Sequence[str]) -> str:
    rows = []
    for case in cases:
        plain, ours = counts(case, "reference"), counts(case, "ours fp32")
        rows.append(
            [
                case,
                f"{plain['kernels']:,}",
                f"{ours['kernels']:,}",
                f"**{plain['kernels'] / ours['kernels']:.2f}**",
                f"{plain['syncs']:,}",
                f"{ours['syncs']:,}",
                f"{plain['flops'] / 1e9:,.1f}",
                f"{ours['flops'] / 1e9:,.1f}",
            ]
        )
    heads = ["step", "kernels, reference", "kernels, ours", "ratio (target 4)"]
    heads += ["syncs, reference", "syncs, ours (target 0)", "GFLOP, reference", "GFLOP, ours"]
    return "\n" + table(heads, rows)


def parts_table(cases: Sequence[str], variants: Sequence[str], threads: int, steps: int) -> str:
    found = {
        (case, name): alone("parts", threads, case=case, variant=name, warm=2, steps=steps)
        for case in cases
        for name in variants
    }
    keys = list(dict.fromkeys(key for one in found.values() for key in one))
    rows = [
        [k, *(f"{1e3 * one[k]:.1f}" if k in one else "" for one in found.values())] for k in keys
    ]
    text = table(["part, ms", *(f"{case}, {name}" for case, name in found)], rows)
    return f"\nParts of our step, {threads} thread(s).\n\n{text}"


def overhead_table() -> str:
    over = alone("overhead", 1, warm=1, steps=60)
    rest = over["whole"] - sum(value for key, value in over.items() if key != "whole")
    shown = over | {"Lightning, logging, loader": rest}
    return (
        "\nOne fine-tuning update of the toy task (size=tiny) in Lightning's Trainer, ms.\n\n"
        + table(list(shown), [[f"{1e3 * x:.2f}" for x in shown.values()]])
        + f"\nAround the step: **{over['whole'] / over['step'] - 1:.1%}** of it (target 10 %).\n"
        + logging_lines(over["whole"])
    )


def logging_lines(update: float) -> str:
    """What MLflow takes of training's time at the default cadence, beside updates of so long."""
    found = alone("logging", 1, steps=400)
    values, film = TrainerConfig().log_every, CallbacksConfig().rollout_every
    share = found["values"] / (values * update) + found["film"] / (film * update)
    return (
        f"\nMLflow on SQLite: training waits {1e3 * found['values']:.2f} ms for 30 values every "
        f"{values} updates and {found['film']:.2f} s for a film every {film:,}: **{share:.2%}** of "
        "the time of such updates (target 2 %).\n"
    )


def data_table(batches: int) -> str:
    data = alone("data", 1, steps=batches)
    share = data["updates/s flow"] / data["updates/s none"]
    return (
        "\nLoader, one worker (size=tiny, toy videos, `vlm=flow`).\n\n"
        + table(list(data), [[f"{x:.1f}" for x in data.values()]])
        + f"\nTraining with a warm label store: **{share:.1%}** of `vlm=none` (target 98 %).\n"
    )


def envs_table(qualities: Sequence[str], seconds: int) -> str:
    rows = []
    for env, target in (("dmc/walker_run", 900), ("metaworld/door-open", 250)):
        for quality in qualities:
            rate = alone("envs", 1, case=env, variant=quality, steps=seconds)["frames/s"]
            rows.append([env, quality, f"{rate:.0f}", target if quality == "fast" else ""])
    heads = ["task", "render_quality", "rendered frames/s", "target"]
    return f"\nEnvironments, two spawn workers.\n\n{table(heads, rows)}"


def gpu_table(rounds: int) -> str:
    """Updates on a GPU; the target is 45 ms and 85 % busy for the captured one at size=paper."""
    rows = []
    for case in CASES:
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in GPU_VARIANTS}
        for _ in range(rounds):
            for name, runs in found.items():
                runs.append(alone("gpu", 4, case=case, variant=name, warm=8, steps=20))
        wall = {
            name: statistics.median(t for one in runs for t in one["seconds"])
            for name, runs in found.items()
        }
        for name, runs in found.items():
            rows.append(
                [
                    case,
                    name,
                    f"{1e3 * wall[name]:.1f}",
                    f"**{wall['reference'] / wall[name]:.2f}**",
                    f"{runs[0]['kernels']:,}",
                    f"{statistics.median(one['busy'] for one in runs):.0%}",
                    f"{runs[0]['peak_gb']:.2f}",
                ]
            )
    heads = ["step", "who", "ms, median", "ratio", "kernels", "GPU busy", "peak GB"]
    return f"\n{torch.cuda.get_device_name()}.\n\n{table(heads, rows)}"


def sections(quick: bool, rounds: int = 3) -> dict[str, Callable[[], Iterator[str]]]:
    """What can be asked for, in the order of the report."""

    def tiny() -> Iterator[str]:
        if quick:
            yield steps_table(TINY, FEW, 1, rounds, 2, 4)
        else:
            yield steps_table(TINY, SMALL, 1, rounds, 3, 8)
        yield today_table(rounds, 8)

    def pretrain() -> Iterator[str]:
        yield steps_table(PAPER[:1], list(VARIANTS), 2, rounds, 4, 2)

    def finetune() -> Iterator[str]:
        yield steps_table(PAPER[1:], list(VARIANTS), 2, rounds, 4, 2)

    def kernels() -> Iterator[str]:
        yield counts_table(TINY if quick else TINY + PAPER)

    def parts() -> Iterator[str]:
        if quick:
            yield parts_table(TINY, ["ours fp32"], 1, 2)
        else:
            yield parts_table(TINY, ["ours fp32", "ours bf16"], 1, 5)
            yield parts_table(PAPER, ["ours fp32", "ours bf16"], 2, 1)

    def other() -> Iterator[str]:
        yield overhead_table()
        yield data_table(12 if quick else 60)
        yield envs_table(("fast",) if quick else ("full", "fast"), 4 if quick else 15)

    found = {f.__name__: f for f in (tiny, pretrain, finetune, kernels, parts, other)}
    if quick:
        del found["pretrain"], found["finetune"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--case", default="finetune tiny", help=argparse.SUPPRESS)
    parser.add_argument("--variant", default="ours fp32", help=argparse.SUPPRESS)
    parser.add_argument("--warm", type=int, default=2, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=10, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, help="turns of each implementation: 3, quick: 1")
    parser.add_argument("--quick", action="store_true", help="size=tiny only")
    parser.add_argument("--only", default="", help="of " + ",".join(sections(False)))
    parser.add_argument("--out", type=Path, help="append the tables to this file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: that alone")
    args = parser.parse_args()
    if args.measure:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        print(json.dumps(MEASURES[args.measure](args)))
        return
    rounds = args.rounds or (1 if args.quick else 3)
    known = sections(args.quick, rounds)
    if args.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda: torch sees no GPU on this machine")
        known = {"gpu": lambda: iter([gpu_table(rounds)])}
    wanted = args.only.split(",") if args.only else list(known)
    if unknown := set(wanted) - set(known):
        parser.error(f"--only: no section {', '.join(sorted(unknown))}; of {', '.join(known)}")
    text = [f"\n{machine()}\n"]
    print(text[0], flush=True)
    for name in wanted:
        for piece in known[name]():
            print(piece, end="", flush=True)
            text.append(piece)
    if args.out:
        with args.out.open("a") as file:
            file.write("".join(text))


if __name__ == "__main__":
    main()
