"""Does it learn? Every method on one task, same videos, same budget, several seeds.

What does the agent reach, what does the pre-trained model dream of videos that it has not seen, and
how well does the fine-tuned one foresee rewards? The protocol is docs/protocols/learning.md.

    python benchmarks/learning.py env=toy                    six methods, five seeds
    python benchmarks/learning.py env=dmc/cheetah_run --jobs 4
    python benchmarks/learning.py env=toy --methods mapo,apv finetune.agent_steps=5000

Each (method, seed) is one run of `train.py`: pre-train on the task's videos, fine-tune, evaluate.
Foresight is measured on episodes of random actions that no run has seen, the same for all. What is
finished is not run again, so a stopped benchmark goes on where it was. Words with a `=` are
overrides for all runs. The table and the picture go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from mlflow.tracking import MlflowClient
from numpy.typing import NDArray
from scipy import stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.token_world import dreams  # noqa: E402
from mapo_lightning.config.compose import from_base  # noqa: E402
from mapo_lightning.envs.episodes import RandomPolicy  # noqa: E402
from mapo_lightning.run.build import build_collection, load_finetuned  # noqa: E402
from mapo_lightning.run.config import RunConfig  # noqa: E402
from mapo_lightning.run.from_checkpoint import agent_settings  # noqa: E402
from mapo_lightning.training.datamodule import chunk_batch  # noqa: E402

METHODS = ("mapo", "mapo_no_cvq", "contextwm", "apv", "prelar", "dreamerv2")
# Okabe and Ito's palette: told apart with any kind of colour vision.
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#D55E00")


class Result(NamedTuple):
    """What one run of `train.py` reached."""

    method: str
    seed: int
    score: float  # mean return of the test episodes, trained agent
    floors: dict[str, float]  # the same, by policies that learn nothing
    curve: list[tuple[int, float]]  # (simulator frames, mean return of the test episodes)
    hours: float
    foresight: list[float]  # correlation of predicted with true reward: now, ten steps ahead
    dreams: dict[str, float]  # errors on held-out videos, thousandths; empty without pre-training


def main() -> None:
    """Run what is missing, then write the table and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default=",".join(METHODS), help="of " + ", ".join(METHODS))
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 .. N-1")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, a core each")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options, overrides = parser.parse_known_args()
    task = next((w.removeprefix("env=") for w in overrides if w.startswith("env=")), None)
    if task is None or any("=" not in word for word in overrides):
        parser.error(f"give the task as env=NAME, and overrides as key=value, got {overrides}")
    methods = options.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"no such method: {', '.join(unknown)}")
    slug = task.replace("/", "_")
    folder = options.runs / slug
    wanted = [(method, seed) for seed in range(options.seeds) for method in methods]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda pair: play(folder, *pair, overrides), wanted))
    results = [result(folder, *pair) for pair in wanted]
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"learning_{slug}"
    command = "python benchmarks/learning.py " + " ".join(sys.argv[1:])
    (options.out / f"{name}.md").write_text(report(task, command, results, methods))
    draw(options.out / f"{name}.png", task, results, methods)
    print(f"written: {options.out / name}.md and .png")


def play(folder: Path, method: str, seed: int, overrides: list[str]) -> None:
    """Run one (method, seed) unless its result is there already."""
    run = (folder / f"{method}-{seed}").absolute()
    done = run / "result.json"
    if done.exists():
        return
    words = [f"method={method}", f"seed={seed}", f"run_dir={run}", *overrides]
    words += [f"tracking.uri=sqlite:///{run / 'mlflow.db'}"]
    run.mkdir(parents=True, exist_ok=True)
    print(time.strftime("%H:%M:%S"), "train.py", *words, flush=True)
    began = time.time()
    with (run / "log.txt").open("w") as log:
        code = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *words],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        ).returncode
    if code:
        raise SystemExit(f"method={method} seed={seed} ended with {code}; see {run}/log.txt")
    measured = {"hours": (time.time() - began) / 3600, **read(run)}
    done.write_text(json.dumps(measured, indent=1))


def result(folder: Path, method: str, seed: int) -> Result:
    """What a finished run reached and what its world model foresees."""
    run = folder / f"{method}-{seed}"
    measured = json.loads((run / "result.json").read_text())
    videos = (run / "pretrain" / "last.ckpt").exists()
    seen = dreams(run) if videos else {}
    return Result(method, seed, foresight=foresight(run), dreams=seen, **measured)


@torch.no_grad()
def foresight(run: Path, chunks: int = 64, seen: int = 5, ahead: int = 10) -> list[float]:
    """How well a finished run's world model predicts rewards, from -1 to 1.

    The correlation with the true reward, over chunks of fresh episodes, of what the reward head
    says of a state whose frame was seen, and of the sum over a dream of the ``ahead`` steps after
    the first ``seen`` frames.
    """
    path, known = run / "finetune/best.ckpt", run / "foresight.json"
    path = path if path.exists() else path.with_name("last.ckpt")
    if known.exists():
        return list(json.loads(known.read_text()))
    cfg = from_base(agent_settings(path), RunConfig)
    cfg.seed = 12_345  # that of no run
    module, _ = load_finetuned(cfg, path)
    model = module.eval().world_model
    with tempfile.TemporaryDirectory() as folder:
        stage = build_collection(cfg, Path(folder), 0)
        policy = RandomPolicy(stage.action_dim, cfg.seed, cfg.finetune.prefill_hold)
        stage.collector.collect(policy, 1000)
        rng = np.random.default_rng(0)
        batch = chunk_batch(stage.replay, rng, chunks, seen + ahead, joined=False)
        stage.collector.close()
    torch.manual_seed(0)
    belief, action_BTA = model.observe(batch), batch["action"]
    dream = model.imagine(belief.at(seen - 1), lambda i, _: action_BTA[:, seen + i], ahead)
    # With a bonus the reward head learns the sum of both; the auxiliary one the task's reward.
    has_bonus = cfg.world_model.bonus.beta > 0 and cfg.world_model.aux_reward
    head = "aux_reward" if has_bonus else "reward"
    pairs = (
        (model.heads.read(head, belief.feat), batch["reward"]),
        (model.heads.read(head, dream.feat[1:]).sum(0), batch["reward"][:, seen:].sum(1)),
    )
    found = [float(np.corrcoef(a.flatten(), b.flatten())[0, 1]) for a, b in pairs]
    known.write_text(json.dumps(found))
    return found


def read(run: Path) -> dict[str, object]:
    """Test returns of a run: its last word, and the curve in its MLflow store."""
    policies = json.loads((run / "evaluation.json").read_text())["policies"]
    returns = {name: found["return"] for name, found in policies.items()}
    client = MlflowClient(f"sqlite:///{run / 'mlflow.db'}")
    experiments = [e.experiment_id for e in client.search_experiments()]
    (tuned,) = client.search_runs(experiments, "tags.mlflow.runName LIKE '%finetune'")
    points = client.get_metric_history(tuned.info.run_id, "eval/return")
    curve = sorted((point.step, point.value) for point in points)
    return {"score": returns.pop("agent"), "floors": returns, "curve": curve}


def interval(values: list[float]) -> float:
    """Half of the 95 % confidence interval of a mean over seeds, Student's t."""
    if len(values) < 2:
        return float("nan")
    spread = float(np.std(values, ddof=1)) / np.sqrt(len(values))
    return float(stats.t.ppf(0.975, len(values) - 1)) * spread


def report(task: str, command: str, results: list[Result], methods: list[str]) -> str:
    """Markdown page: what was reached, what is dreamt, and which methods can be told apart."""
    floors = {name: np.mean([r.floors[name] for r in results]) for name in results[0].floors}
    named = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in floors.items())
    of = {method: [r for r in results if r.method == method] for method in methods}
    lines = [
        f"# Learning on `{task}`",
        "",
        f"    {command}",
        "",
        f"{time.strftime('%Y-%m-%d')}, {cpu()}, one core per run. The protocol, written before the "
        "runs: [docs/protocols/learning.md](../../docs/protocols/learning.md). Return of the test "
        "episodes that end a run: mean ± half of the 95 % interval (Student's t over seeds). "
        f"Policies that learn nothing: {named}. Foreseen: correlation of predicted with true "
        "reward over fresh episodes of random actions, mean over seeds; ten steps ahead without "
        "seeing a frame.",
        "",
        "| method | return | seeds | against random | reward foreseen: now | ten steps ahead "
        "| minutes per run |",
        "|---|---|---|---|---|---|---|",
        *(reached(method, mine, floors["random"]) for method, mine in of.items()),
        "",
        f"![Return over simulator frames](learning_{task.replace('/', '_')}.png)",
        "",
        *dreamt(of),
    ]
    if "mapo" in of and len(of["mapo"]) > 1:
        lines += compared(of)
    kept = ("|", "!", " ")  # tables, pictures, code
    return "\n".join(x if x.startswith(kept) else textwrap.fill(x, 120) for x in lines)


def reached(method: str, mine: list[Result], random: float) -> str:
    """Row of one method: returns, rewards foreseen, time."""
    scores = [r.score for r in mine]
    seeds = ", ".join(f"{score:.1f}" for score in scores)
    now, ahead = np.mean([r.foresight for r in mine], axis=0)
    minutes = 60 * np.mean([r.hours for r in mine])
    return (
        f"| `{method}` | {np.mean(scores):.1f} ± {interval(scores):.1f} | {seeds} "
        f"| {np.mean(scores) / random:.1f}x | {now:.2f} | {ahead:.2f} | {minutes:.1f} |"
    )


def dreamt(of: dict[str, list[Result]]) -> list[str]:
    """Table of the pre-trained models' errors on held-out videos, beside the yardsticks."""
    videos = {method: mine for method, mine in of.items() if all(r.dreams for r in mine)}
    if not videos:
        return []
    columns = [f"{name} {ahead}" for ahead in (5, 10) for name in ("told", "untold")]
    lines = [
        "Dreams of the pre-trained models: error on held-out videos, thousandths on moving pixels, "
        "5 and 10 frames ahead, mean ± half of the 95 % interval over seeds. Untold: the same "
        "weights without the phrases of what follows.",
        "",
        "| method | " + " | ".join(f"{name} ahead" for name in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for method, mine in videos.items():
        found = [[r.dreams[name] for r in mine if name in r.dreams] for name in columns]
        cells = [f"{np.mean(x):.1f} ± {interval(x):.1f}" if x else "" for x in found]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    any_run = next(iter(videos.values()))[0].dreams
    for name in ("copy", "still_scene"):
        cells = [f"{any_run[f'{name} {ahead}']:.1f} |" for ahead in (5, 10)]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return [*lines, ""]


def compared(of: dict[str, list[Result]]) -> list[str]:
    """Table of `mapo` against each other method: can their returns be told apart?"""
    lines = [
        "`mapo` against each other method. Probability: share of all pairs of runs in which that "
        "of `mapo` is better (a tie counts half). Difference of the means with Welch's 95 % "
        "interval; where it holds zero, the two are not told apart, and the last column says how "
        "many seeds each would show a difference of this size (power 0.8).",
        "",
        "| against | probability that `mapo` is better | difference | told apart | seeds needed |",
        "|---|---|---|---|---|",
    ]
    ours = np.array([r.score for r in of["mapo"]])
    for method, mine in of.items():
        if method != "mapo":
            lines.append(f"| `{method}` | {against(ours, np.array([r.score for r in mine]))} |")
    return [*lines, ""]


def against(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> str:
    """Cells of one comparison."""
    pairs = ours[:, None] - theirs[None]
    better = float(np.mean((pairs > 0) + 0.5 * (pairs == 0)))
    found = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    mean, apart = float(ours.mean() - theirs.mean()), found.low > 0 or found.high < 0
    variance = float(ours.var(ddof=1) + theirs.var(ddof=1))
    # Of the normal distribution; with few seeds it promises too much.
    needed = math.ceil((1.96 + 0.84) ** 2 * variance / mean**2) if mean else None
    many = "" if apart else ("none would do" if needed is None else f"about {needed}")
    return (
        f"{better:.2f} | {mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}] "
        f"| {'yes' if apart else 'no'} | {many}"
    )


def cpu() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return name[1] if name else platform.processor()


def draw(path: Path, task: str, results: list[Result], methods: list[str]) -> None:
    """Curves: mean over seeds with a 95 % band, and the random policy as a line."""
    figure, axes = plt.subplots(figsize=(7.0, 4.2), layout="constrained")
    for method in methods:
        colour = COLOURS[METHODS.index(method)]
        curves = [r.curve for r in results if r.method == method]
        frames = [frame for frame, _ in curves[0]]
        points = [[value for _, value in curve] for curve in curves]
        mean = np.mean(points, axis=0)
        band = np.array([interval(list(column)) for column in zip(*points, strict=True)])
        axes.plot(frames, mean, color=colour, label=method, lw=2, marker="o", ms=3)
        axes.fill_between(frames, mean - band, mean + band, color=colour, alpha=0.12, lw=0)
    floor = np.mean([r.floors["random"] for r in results])
    axes.axhline(floor, color="0.4", ls="--", lw=1, label="random policy")
    axes.set(xlabel="simulator frames", ylabel="return of the test episodes", title=task)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if floor > 0 else None)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
