"""Does the codebook help? The protocol is docs/protocols/codebook.md.

    python benchmarks/codebook.py tint                  one scene in many colours
    python benchmarks/codebook.py floors --jobs 2       four scenes
    python benchmarks/codebook.py return                the whole toy

Every (arm, seed) is one run of `train.py`. What is finished is not run again, so a stopped
benchmark goes on where it was. Words with a `=` are overrides for all runs, such as
pretrain.updates=100 to try it out. The table is printed and written to FOLDER/STEP.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mapo_lightning.config.compose import from_base  # noqa: E402
from mapo_lightning.run import build  # noqa: E402
from mapo_lightning.run.config import RunConfig  # noqa: E402
from mapo_lightning.run.from_checkpoint import agent_settings  # noqa: E402
from mapo_lightning.training.checkpoint import read_checkpoint  # noqa: E402
from mapo_lightning.training.told import (  # noqa: E402
    HORIZONS,
    ToldReport,
    measure_held_out,
    moving_pixels,
)

ARMS = {
    "quantised": ["method=mapo"],
    "continuous": ["method=mapo_no_cvq"],
    "none": ["method=mapo_no_cvq", "world_model.context.kind=none"],
}
_FOUR = "dmc/cartpole_swingup,dmc/cheetah_run,dmc/finger_spin,dmc/walker_run"
STEPS = {
    "tint": ["stage=pretrain"],
    "floors": ["stage=pretrain", f"demo.scenes=[{_FOUR}]", "demo.clips_per_scene=24"],
    "return": ["env=toy"],
}
CLIPS = 96
Row = dict[str, float]


def main() -> None:
    """Run what is missing, measure it, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 .. N-1")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, a core each")
    parser.add_argument("--folder", type=Path, default=Path("runs/codebook"))
    options, overrides = parser.parse_known_args()
    if any("=" not in word for word in overrides):
        parser.error(f"overrides must be key=value, got {' '.join(overrides)}")
    folder = options.folder.absolute() / options.step
    points = [(arm, seed) for seed in range(options.seeds) for arm in ARMS]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda point: run(folder, options.step, *point, overrides), points))
    rows = {(arm, seed): measured(folder / f"{arm}-{seed}", options.step) for arm, seed in points}
    text = table(rows, options.seeds)
    (folder.parent / f"{options.step}.md").write_text(text)
    print(text)


def run(folder: Path, step: str, arm: str, seed: int, overrides: Sequence[str]) -> None:
    """Run one (arm, seed) unless it is finished."""
    point = folder / f"{arm}-{seed}"
    if (point / "done").exists():
        return
    point.mkdir(parents=True, exist_ok=True)
    words = [*STEPS[step], *ARMS[arm], f"seed={seed}", f"run_dir={point / 'run'}"]
    words += [f"data.root={folder / 'videos'}", f"work_dir={folder / 'cache'}"]
    words += ["tracking.enabled=false", "callbacks.gallery=0", "callbacks.quality=0", *overrides]
    print(time.strftime("%H:%M:%S"), "train.py", *words, flush=True)
    with (point / "log.txt").open("w") as log:
        code = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *words],
            stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        ).returncode  # fmt: skip
    if code:
        raise SystemExit(f"arm={arm} seed={seed} ended with {code}; see {point / 'log.txt'}")
    (point / "done").touch()


def measured(point: Path, step: str) -> Row:
    """Everything that the protocol names, of one run; kept beside it."""
    file = point / "measured.json"
    if not file.exists():
        found = dream(point / "run" / "pretrain" / "last.ckpt")
        if step == "return":
            tree = json.loads((point / "run" / "evaluation.json").read_text())
            found["return"] = float(tree["policies"]["agent"]["return"])
        file.write_text(json.dumps(found, indent=1))
    row: Row = json.loads(file.read_text())
    return row


def dream(checkpoint: Path) -> Row:
    """Reconstruction, dream and probes of a pre-trained model on its held-out videos."""
    cfg = from_base(agent_settings(checkpoint), RunConfig)
    data, module = build.build_videos(cfg), build.build_pretrain(cfg)
    module.load_state_dict(read_checkpoint(checkpoint)["state_dict"])
    report = measure_held_out(module.world_model, data, CLIPS)
    found = {"reconstruction": last_shown(report)}
    found |= {f"told, {h} ahead": report.at("told", h).mean for h in HORIZONS}
    batch = data.held_out_batch(CLIPS)
    video, still = batch["video"], data.still_scenes(batch["video"])
    clips = {key: value for key, value in batch.items() if value.ndim > 1}
    with torch.no_grad(), module.world_model.evaluating():
        feat = module.world_model.observe(clips).feat
    steps = feat.shape[1]
    group = video.repeat_interleave(steps).numpy()
    quarters = torch.nn.functional.adaptive_avg_pool2d(still.permute(0, 3, 1, 2), 2).flatten(1)
    moved = (clips["obs"].float() / 255.0 - still[:, None]).flatten(0, 1).flatten(1).numpy()
    moved = moved - moved.mean(axis=0)
    _, _, axes = np.linalg.svd(moved, full_matrices=False)
    inputs = feat.flatten(0, 1).numpy().astype(np.float64)
    found["probe: scene, R²"] = probe(inputs, quarters.repeat_interleave(steps, 0).numpy(), group)
    found["probe: motion, R²"] = probe(inputs, moved @ axes[:3].T, group)
    return found


def last_shown(report: ToldReport) -> float:
    """Error of the last frame that was shown, thousandths on moving pixels, mean over clips."""
    truth, seen = report.frames["truth"], report.seen - 1
    moving = moving_pixels(truth)
    squared = (report.frames["told"][:, seen] - truth[:, seen]).pow(2) * moving
    errors = squared.sum(dim=(1, 2, 3)) / (3 * moving.sum(dim=(1, 2, 3)))
    return 1e3 * float(errors[~errors.isnan()].mean())


def probe(
    inputs: NDArray[np.float64], targets: NDArray[np.float64], group: NDArray[np.int64]
) -> float:
    """R² of ridge regressions, each judged on a fifth of the videos that it has not seen."""
    videos = np.unique(group)
    left, total = 0.0, 0.0
    for fold in range(5):
        judged = np.isin(group, videos[fold::5])
        mean, spread = inputs[~judged].mean(0), inputs[~judged].std(0) + 1e-6
        x, rest = (inputs[~judged] - mean) / spread, (inputs[judged] - mean) / spread
        offset = targets[~judged].mean(0)
        weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ (targets[~judged] - offset))
        left += float(((targets[judged] - offset - rest @ weights) ** 2).sum())
        total += float(((targets[judged] - offset) ** 2).sum())
    return 1.0 - left / total


def table(rows: dict[tuple[str, int], Row], seeds: int) -> str:
    """Markdown: a row per measure; means, and differences seed by seed with their intervals."""
    others = [arm for arm in ARMS if arm != "quantised"]
    head = [*ARMS, *(f"{arm} - quantised" for arm in others)]
    lines = [f"| {seeds} seeds | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for name in rows["quantised", 0]:
        values = {arm: np.array([rows[arm, s][name] for s in range(seeds)]) for arm in ARMS}
        cells = [f"{values[arm].mean():.3g}" for arm in ARMS]
        cells += [difference(values[arm] - values["quantised"]) for arm in others]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    single = [
        f"- {arm}, seed {seed}: " + ", ".join(f"{k} {v:.3g}" for k, v in row.items())
        for (arm, seed), row in sorted(rows.items())
    ]
    return "\n".join([*lines, "", "Single runs:", "", *single, ""])


def difference(values: NDArray[np.float64]) -> str:
    """Mean with Student's t interval; where it holds zero, how many seeds would be needed."""
    if len(values) < 2:
        return f"{values[0]:.3g}"
    mean, error = float(values.mean()), float(stats.sem(values))
    half = error * float(stats.t.ppf(0.975, len(values) - 1))
    text = f"{mean:.3g} [{mean - half:.3g}, {mean + half:.3g}]"
    if abs(mean) > half:
        return text
    spread = float(values.std(ddof=1))
    # Of the normal distribution, for a power of 0.8; with few seeds it promises too much.
    needed = ((1.96 + 0.84) * spread / mean) ** 2 if mean else math.inf
    if needed > 1e4:
        return text
    return f"{text}, not told apart; about {max(len(values) + 1, math.ceil(needed))} seeds would be"


if __name__ == "__main__":
    main()
