"""Days and money of the paper's tables on 1, 8 and 64 GPUs, computed from stated assumptions.

    python benchmarks/scaling.py                                  the tables of docs/performance.md
    python benchmarks/scaling.py gpu_hour=3.2 label_rate=60       with other numbers

Nothing here is measured on a GPU. Runs are independent and train side by side; no update is split
over GPUs. An update takes the longest of arithmetic, memory traffic and launches. Videos are
labelled before the runs that read their labels. In fine-tuning, a pool of label servers takes as
many of the GPUs as it needs to keep up. All is the best case: no GPU waits for another.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path


@dataclass(frozen=True)
class Assumptions:
    """What the tables follow from: value, unit and where it comes from."""

    gpus: int = 0
    """GPUs in all, of trainings and label servers; 0: rows for 1, 8 and 64 | - | input"""
    gpu_hour: float = 3.5
    """Price of an hour of an H200 with its share of the host | money | **assumption**, an input"""
    cpus_per_gpu: int = 16
    """Cores of the host per GPU | - | **assumption**, an input"""
    tflops: float = 180.0
    """Rate of bf16 convolutions and products of these sizes | TFLOP/s | assumed, 150 to 225"""
    bandwidth: float = 4.3
    """Memory of an H200 | TB/s | its maker"""
    launch_us: float = 5.0
    """One launch of an eager update | us | assumed, 5 to 10"""
    captured: bool = True
    """Whether an update is one graph: then kernels follow each other in `kernel_us` | - | input"""
    kernel_us: float = 2.0
    """From one kernel of a graph to the next, where they are short | us | assumed, 1.5 to 2.5"""
    pretrain_tflop: float = 1.10
    """Update of pre-training, 16 x 25 frames | TFLOP | counted (speed.md)"""
    pretrain_kernels: int = 1330
    """The same | kernels | counted (speed.md)"""
    pretrain_gb: float = 8.0
    """The same, memory traffic | GB | computed: two fifths of fine-tuning's"""
    finetune_tflop: float = 3.01
    """Update of fine-tuning, 16 x 50 frames | TFLOP | counted (speed.md)"""
    wide_tflop: float = 9.4
    """The same for Meta-World, 50 x 50 frames | TFLOP | computed from the counts (reproduce.md)"""
    finetune_kernels: int = 4752
    """Update of fine-tuning | kernels | counted (speed.md)"""
    finetune_gb: float = 20.0
    """The same, memory traffic, 16 x 50 frames | GB | computed (above)"""
    pretrainings: int = 9
    """Different ones | runs | conf/experiment"""
    dmc_runs: int = 84
    """Fine-tunings on DeepMind Control, 28 x 3 seeds | runs | conf/experiment, without iVideoGPT"""
    metaworld_runs: int = 72
    """Fine-tunings on Meta-World, 24 x 3 seeds | runs | conf/experiment"""
    pretrain_updates: int = 600_000
    """Of one pre-training | updates | O27"""
    dmc_updates: int = 100_300
    """Of one fine-tuning | updates | protocol=paper"""
    metaworld_updates: int = 50_300
    """Of one fine-tuning | updates | protocol=paper"""
    dmc_frames: float = 1.5e6
    """Frames drawn by one run, evaluations included | frames | computed from 0.6 h at 719/s"""
    metaworld_frames: float = 1.0e6
    """The same | frames | computed from 1.5 h at 183/s"""
    dmc_render: float = 667.0
    """Frames per second and core, fast | 1/s | measured: 1,334 with two processes (speed.md)"""
    metaworld_render: float = 133.0
    """The same | 1/s | measured: 266 with two processes (speed.md)"""
    render_cores: int = 4
    """Simulators of one run | cores | input: env.num_envs"""
    clip_rate: float = 4700.0
    """Clips per second of a worker, data.cache=decoded | 1/s | measured on a CPU (above)"""
    cold_rate: float = 11.0
    """The same, decoded anew | 1/s | measured on a CPU (above)"""
    video_frames: float = 7.6e6
    """Frames of Something-Something V2 for training | frames | 4 for each window, and 3 a video"""
    video_windows: float = 1.8e6
    """Its windows; those of Human3.6M, which are fewer, are left out | windows | reproduce.md"""
    run_windows: float = 142_000.0
    """Windows of one fine-tuning of a method with phrases | windows | 95,000 to 190,000"""
    phrase_share: float = 0.31
    """Fine-tunings whose method reads phrases | share | conf/experiment: 16 of 52 cells"""
    label_rate: float = 30.0
    """Windows per second and GPU, Qwen2.5-VL-7B behind vLLM | 1/s | assumed, 17 to 50"""
    client_rate: float = 37.9
    """Windows per second that one labelling process asks | 1/s | measured, its server's limit 40"""


class Part:
    """Seconds of one update, and what takes them."""

    def __init__(self, a: Assumptions, tflop: float, kernels: int, gigabytes: float) -> None:
        self.seconds_of = {
            "arithmetic": tflop / a.tflops,
            "memory": gigabytes / 1e3 / a.bandwidth,
            "launches": 1e-6 * kernels * (a.kernel_us if a.captured else a.launch_us),
        }
        self.limit = max(self.seconds_of, key=lambda name: self.seconds_of[name])
        self.seconds = self.seconds_of[self.limit]


def updates(a: Assumptions) -> dict[str, tuple[int, int, Part]]:
    """Kind of run -> (runs, updates of one, one update)."""
    wide = a.wide_tflop / a.finetune_tflop
    return {
        "pre-training": (
            a.pretrainings,
            a.pretrain_updates,
            Part(a, a.pretrain_tflop, a.pretrain_kernels, a.pretrain_gb),
        ),
        "fine-tuning, DeepMind Control": (
            a.dmc_runs,
            a.dmc_updates,
            Part(a, a.finetune_tflop, a.finetune_kernels, a.finetune_gb),
        ),
        "fine-tuning, Meta-World": (
            a.metaworld_runs,
            a.metaworld_updates,
            Part(a, a.wide_tflop, a.finetune_kernels, wide * a.finetune_gb),
        ),
    }


@dataclass(frozen=True)
class Stage:
    """A stretch of the whole during which GPUs do one kind of work."""

    name: str
    hours: float
    limit: str
    """What more GPUs would not make shorter, or what they would."""


def stages(a: Assumptions, gpus: int) -> list[Stage]:
    """Everything, in its order, on so many GPUs."""
    found = [_decoding(a, gpus), _labelling(a, gpus)]
    for name, (runs, made, part) in updates(a).items():
        one = made * part.seconds / 3600
        asked = 0.0 if name == "pre-training" else a.phrase_share * a.run_windows / a.label_rate
        drawn = 0.0 if name == "pre-training" else _rendering(a, name)
        work = {part.limit: runs * one / gpus, "labels": runs * asked / 3600 / gpus}
        # No run is shorter than its own updates, or its own simulators.
        least = max((one, f"one run's {part.limit}"), (drawn, "one run's simulators"))
        limit = max(work, key=lambda key: work[key])
        found.append(Stage(name, *max((sum(work.values()), limit), least)))
    return found


def _decoding(a: Assumptions, gpus: int) -> Stage:
    """All frames once, by all cores of the hosts."""
    cores = a.cpus_per_gpu * gpus
    return Stage("decoding, once", a.video_frames / 25 / a.cold_rate / cores / 3600, "cores")


def _labelling(a: Assumptions, gpus: int) -> Stage:
    """A server on each GPU, and a process of stage=label that asks it."""
    limit = "label servers" if a.label_rate < a.client_rate else "labelling processes"
    rate = gpus * min(a.label_rate, a.client_rate)
    return Stage("labelling the videos, once", a.video_windows / rate / 3600, limit)


def _rendering(a: Assumptions, name: str) -> float:
    frames, rate = a.metaworld_frames, a.metaworld_render
    if "DeepMind" in name:
        frames, rate = a.dmc_frames, a.dmc_render
    return frames / (rate * a.render_cores) / 3600


def gpu_hours(a: Assumptions) -> float:
    """Of all runs, if no GPU ever waited."""
    return sum(runs * made * part.seconds for runs, made, part in updates(a).values()) / 3600


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(line) + " |" for line in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


def stated(a: Assumptions) -> str:
    """The assumptions as a table: name, value, what it is, unit, source."""
    (made,) = (
        node
        for node in ast.parse(Path(__file__).read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "Assumptions"
    )
    rows = []
    for entry, text in pairwise(made.body):
        if isinstance(entry, ast.AnnAssign) and isinstance(text, ast.Expr):
            name = ast.unparse(entry.target)
            value = getattr(a, name)
            what, unit, source = ast.literal_eval(text.value).split(" | ")
            shown = str(value).lower() if isinstance(value, bool) else f"{value:,.10g}"
            rows.append([f"`{name}`", shown, unit, what, source])
    return table(["name", "value", "unit", "what", "source"], rows)


def report(a: Assumptions) -> Iterator[str]:
    rows = []
    for name, (runs, made, part) in updates(a).items():
        parts = ", ".join(f"{key} {1e3 * x:.1f}" for key, x in part.seconds_of.items())
        hours = made * part.seconds / 3600
        rows.append([name, f"{runs}", f"{made:,}", parts, f"{hours:.2f}"])
    yield stated(a)
    yield table(["kind of run", "runs", "updates", "ms of an update", "hours of one run"], rows)
    rows = []
    for gpus in (a.gpus,) if a.gpus else (1, 8, 64):
        found = stages(a, gpus)
        hours = sum(stage.hours for stage in found)
        rows.append(
            [
                f"{gpus}",
                *(f"{stage.hours:,.1f} ({stage.limit})" for stage in found),
                f"**{hours / 24:.1f}**",
                f"**{hours * gpus * a.gpu_hour:,.0f}**",
                f"{gpu_hours(a) / (hours * gpus):.0%}",
            ]
        )
    names = [stage.name for stage in stages(a, 1)]
    yield table(["GPUs", *(f"{n}, h" for n in names), "days", "money", "share of updates"], rows)
    appetite = 16 / updates(a)["pre-training"][2].seconds
    yield (
        f"Appetite of one pre-training: {appetite:,.0f} clips per second, "
        f"{appetite / a.clip_rate:.1f} workers from decoded frames, "
        f"{appetite / a.cold_rate:,.0f} if they are decoded anew; a GPU has {a.cpus_per_gpu} cores."
    )


def chosen(words: Sequence[str]) -> Assumptions:
    """The assumptions, some of them changed by words ``name=value``."""
    a, known = Assumptions(), {field.name: field for field in fields(Assumptions)}
    for word in words:
        name, _, value = word.partition("=")
        if name not in known:
            raise SystemExit(f"no assumption '{name}'; there are {', '.join(known)}")
        old = getattr(a, name)
        new = value.lower() == "true" if isinstance(old, bool) else type(old)(float(value))
        a = replace(a, **{name: new})
    return a


if __name__ == "__main__":
    print("\n\n".join(report(chosen(sys.argv[1:]))))
