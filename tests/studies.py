"""Makes the folders that runs leave behind, with results of known value."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mapo_lightning.config.compose import compose
from mapo_lightning.run import finished
from mapo_lightning.run.config import RunConfig, conf_folder

RANDOM = {"random": {"return": 2.0, "success": 0.1}, "still": {"return": 1.0}}
Points = Sequence[tuple[int, float]]


def make_run(
    folder: Path,
    *words: str,
    score: float | None = None,
    curve: Points = (),
    frames: int | None = None,
    success: float | None = None,
    mark: bool = True,
    more: Mapping[str, Any] | None = None,
) -> Path:
    """A run as it lies on disk.

    Args:
        folder: Of the run.
        words: Of its command line.
        score: Mean return of its last test episodes; None: it was not evaluated.
        curve: Environment frames and return of its evaluations.
        frames: At which it was evaluated; None: its whole budget.
        success: Share of successful test episodes.
        mark: Whether it has come to its end.
        more: Name of a JSON file -> its content.
    """
    given = ["tracking.enabled=false", "data.root=videos", *words]
    composed = compose(given, RunConfig, conf_folder())
    folder.mkdir(parents=True)
    composed.save(folder / "config.yaml")
    cfg = composed.config
    if score is not None:
        agent = {"return": score} | ({} if success is None else {"success": success})
        budget = cfg.finetune.agent_steps * cfg.env.frames_per_step
        tree = {**cfg.about, "env_frames": budget if frames is None else frames}
        tree |= {"updates": 1, "confidence": 0.95, "policies": {**RANDOM, "agent": agent}}
        (folder / "evaluation.json").write_text(json.dumps(tree))
    if curve:
        write_curve(folder, curve)
    if mark:
        finished.write(folder, cfg.stage)
    for name, content in (more or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def write_curve(run: Path, points: Points) -> None:
    """The file that fine-tuning keeps of its values."""
    (run / "finetune").mkdir(exist_ok=True)
    rows = [f"eval/return,{frames},{value},{1000 + frames}" for frames, value in points]
    rows.insert(1, f"train/actor,{points[0][0]},0.5,1000")
    (run / "finetune" / "curves.csv").write_text("name,step,value,time\n" + "\n".join(rows) + "\n")
