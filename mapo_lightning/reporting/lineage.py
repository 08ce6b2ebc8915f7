"""Where a run's agent comes from: videos, pre-training, fine-tuning, the checkpoint that played."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mapo_lightning.reporting.runs import CONFIG, Run, is_of, read_run

_OF_PRETRAINING = ("data", "demo", "pretrain")
"""Sections that say what a model was pre-trained on; a run that starts from one may have others."""


class Origin(NamedTuple):
    """What went before fine-tuning."""

    videos: str
    """Kind and folder of the videos; empty for an agent that saw none."""
    pretraining: str
    """Which run, or what is known of it."""
    folder: Path | None
    """Of that run; None where it is not on this machine."""
    checkpoint: str
    """File that fine-tuning began with; empty: none."""
    settings: Mapping[str, Any]
    """Of the run, with those that its pre-training really had."""


def origin(run: Run, others: Sequence[Run] = ()) -> Origin:
    """Follow a run back to its videos.

    Args:
        run: A run of an agent.
        others: Runs of the same report, for their names.
    """
    settings, start = dict(run.settings), run.settings.get("init_from")
    if start not in (None, "", "None", "null"):
        path = Path(str(start))
        folder = path.parent.parent  # RUN/pretrain/last.ckpt
        if not (folder / CONFIG).is_file():
            return Origin("", "not on this machine", None, str(start), settings)
        named = {other.folder: other.name for other in others}
        before = read_run(folder, named.get(folder.absolute(), folder.name))
        settings |= {k: v for k, v in before.settings.items() if is_of(k, _OF_PRETRAINING)}
        return Origin(_videos(settings), before.name, folder.absolute(), str(start), settings)
    phases = [
        phase for phase in ("tokenizer", "pretrain") if run.folder and (run.folder / phase).is_dir()
    ]
    if run.stage == "finetune" or (run.folder is not None and not phases):
        return Origin("", "none", None, "", settings)
    own = f"{phases[-1]}/last.ckpt" if phases else ""
    return Origin(_videos(settings), "in the same run", run.folder, own, settings)


def _videos(settings: Mapping[str, Any]) -> str:
    kind, root = settings.get("data.kind", ""), Path(str(settings.get("data.root") or "")).name
    if kind == "demo" and settings.get("demo.scenes"):
        scenes = settings["demo.scenes"]
        return f"demo: {', '.join(scenes) if isinstance(scenes, list) else scenes}"
    return f"{kind}: {root}" if root else str(kind)


def played(run: Run) -> str:
    """Name of the checkpoint whose return stands for the run."""
    if run.checkpoint:
        path = Path(run.checkpoint)
        inside = run.folder is not None and path.is_relative_to(run.folder)
        return path.relative_to(run.folder).as_posix() if inside and run.folder else str(path)
    return "finetune/last.ckpt"
