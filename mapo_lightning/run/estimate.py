"""``mapo-train ... --preflight``: what a run will take, from a few of its real updates.

Each phase trains for `UPDATES` updates, on the run's own videos and environments and on its own
hardware, in a temporary folder and without MLflow. What they took is multiplied by what the run
will do. Rendered videos, the scan of the videos and the few labels stay, because the run needs them
too. A describer that is not part of the loader's workers, such as one behind a server, is asked
about `WINDOWS` windows only; the updates are made without it.
"""

from __future__ import annotations

import logging
import math
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import psutil
import torch

from callbacks.codebook import CodebookUpdate
from callbacks.collect import CollectExperience
from mapo_lightning.data.label_corpus import CorpusLabelling
from mapo_lightning.data.video import FILM_HEIGHT, write_mp4
from mapo_lightning.run import build
from mapo_lightning.run.config import RunConfig
from mapo_lightning.run.episode_player import EpisodePlayer
from mapo_lightning.run.from_checkpoint import resumed
from mapo_lightning.run.phase import NAMES
from mapo_lightning.run.preflight import phases_of
from mapo_lightning.run.stages import render_demo
from mapo_lightning.run.trainer import build_trainer
from mapo_lightning.semantics.factory import semantic_dim
from mapo_lightning.training.acting import greedy
from mapo_lightning.training.base_module import TrainedModule
from mapo_lightning.training.cuda_graph import cuda_recorder
from mapo_lightning.training.settings import EvaluateConfig
from mapo_lightning.types import ConfigError

UPDATES = 8
"""Updates of each phase that are made; the first `WARM` of them are not counted."""
WARM = 3
WINDOWS = 4
"""Windows that a describer outside the loader's workers is asked about."""
CHECKPOINTS = 4
"""Checkpoints of a phase on disk at most: the newest, the last, the best, and one being written."""

log = logging.getLogger("mapo")


@dataclass
class Phase:
    """What one phase was measured to take."""

    name: str
    updates: int
    """Updates that the run will make in all."""
    seconds: float
    """Of one update, everything between two updates included."""
    before: float = 0.0
    """Seconds before the first update: the prefill."""
    evaluating: float = 0.0
    """Seconds of all evaluations."""
    checkpoint: int = 0
    """Bytes of one checkpoint."""
    replay: int = 0
    """Bytes of replay at its end, on all ranks."""
    films: int = 0
    """Bytes of the films that its evaluations record in MLflow."""

    @property
    def hours(self) -> float:
        """Of the whole phase."""
        return (self.updates * self.seconds + self.before + self.evaluating) / 3600

    @property
    def disk(self) -> int:
        """Bytes that it leaves on disk at most."""
        return CHECKPOINTS * self.checkpoint + self.replay + self.films


@dataclass
class Labels:
    """What the describer will be asked."""

    questions: int
    seconds: float
    """Of one question, measured; 0.0 where it is part of the updates."""
    disk: int
    """Bytes of the label store at its end."""


def preflight(cfg: RunConfig) -> str:
    """Train a little of each phase, and tell what the whole run will take.

    Returns:
        The report.

    Raises:
        ConfigError: The stage trains nothing, or the run does not fit this machine's disk, memory
            or GPU.
    """
    names = phases_of(cfg, resumed(cfg))
    if not names:
        raise ConfigError(
            f"--preflight measures trainings, and stage={cfg.stage} is none; label.dry=true "
            "estimates stage=label"
        )
    quiet = _small(cfg)
    labels = _labels(cfg) if "pretrain" in names and cfg.reads_phrases else Labels(0, 0.0, 0)
    if not _in_workers(cfg):
        width = semantic_dim(cfg.vlm)
        quiet = replace(quiet, vlm=replace(quiet.vlm, kind="none", hidden_dim=width))
    with tempfile.TemporaryDirectory(prefix="mapo-preflight-") as place, _gpu_memory():
        phases = [
            _finetune(quiet, Path(place))
            if name == "finetune"
            else _learn_videos(quiet, Path(place), name)
            for name in names
        ]
    report, needed = _report(cfg, phases, labels)
    _check_disk(cfg, needed)
    _check_memory(cfg)
    return report


def _small(cfg: RunConfig) -> RunConfig:
    """The run in one process, without what happens around its updates."""
    callbacks = replace(cfg.callbacks, progress=False)
    trainer = replace(cfg.trainer, devices=1, num_nodes=1, strategy="auto")
    tracking = replace(cfg.tracking, enabled=False)
    return replace(cfg, callbacks=callbacks, trainer=trainer, tracking=tracking)


def _learn_videos(cfg: RunConfig, place: Path, phase: str) -> Phase:
    render_demo(cfg)
    module, data = build.build_pretrain(cfg, phase), build.build_videos(cfg, phase)
    watch = _fit(cfg, phase, module, data, [], place)
    size = (place / phase / "last.ckpt").stat().st_size
    return Phase(NAMES[phase], cfg.phase(phase).updates, watch.seconds, checkpoint=size)


def _finetune(cfg: RunConfig, place: Path) -> Phase:
    updates = cfg.finetune.updates(cfg.trainer.processes)
    # At once with acting, and with an agent that learns.
    agent = replace(cfg.agent, mbpo=replace(cfg.agent.mbpo, hold=0))
    tuned = replace(cfg.finetune, prefill=1, initial_updates=0)
    short = replace(cfg, finetune=tuned, agent=agent)
    stage = build.build_collection(short, place / "replay", 0)
    start = Path(cfg.init_from) if cfg.init_from else None
    module, _ = build.build_finetune(short, stage.action_dim, start)
    collect = CollectExperience(stage.collector, cfg.env.frames_per_step, cfg.seed)
    tune = cfg.finetune
    data = build.build_chunks(cfg, stage.replay, cfg.seed)
    watch = _fit(short, "finetune", module, data, [collect], place, action_dim=stage.action_dim)
    steps = stage.replay.steps
    per_step = _bytes_under(place / "replay") / max(1, steps)
    # The last two checkpoints keep the episodes that were evicted since.
    since = 2 * cfg.callbacks.checkpoint_every * tune.train_every
    kept = min(cfg.replay.capacity + min(since, 2 * cfg.replay.capacity), tune.agent_steps)
    seconds, film = _one_episode(short, module)
    played, filmed = evaluations(cfg.evaluate, updates)
    return Phase(
        "fine-tuning",
        updates,
        watch.seconds,
        before=watch.before * tune.prefill / max(1, steps),
        evaluating=played * cfg.evaluate.episodes * seconds,
        checkpoint=(place / "finetune/last.ckpt").stat().st_size,
        replay=math.ceil(per_step * kept),
        films=filmed * film,
    )


def evaluations(cfg: EvaluateConfig, updates: int) -> tuple[int, int]:
    """How often a fine-tuning plays its test episodes, and how many films it writes."""
    too_early = max(0, cfg.first - 1) // cfg.every
    in_training = max(1, -(-updates // cfg.every) - too_early)  # each films one episode
    # The three baselines, which play unseen and faster: counted as if they looked, to be on the
    # safe side. With keep_best the kept agent too, and they again.
    played = in_training + 3 + 4 * cfg.keep_best
    # Those of the kept agent go into the folder and into MLflow.
    return played, in_training + 2 * min(cfg.videos, cfg.episodes) * cfg.keep_best


def _one_episode(cfg: RunConfig, module: Any) -> tuple[float, int]:
    """(seconds, bytes of its film) of one evaluation episode."""
    one = replace(cfg, evaluate=replace(cfg.evaluate, episodes=1, num_envs=1))
    with EpisodePlayer(one) as play:
        play.start()  # once in a run
        began = time.perf_counter()
        _, films = play(greedy(module), 1)
        seconds = time.perf_counter() - began
    return seconds, len(write_mp4(None, films[0], cfg.env.fps, FILM_HEIGHT))


class _Watch(L.Callback):
    """Times updates."""

    def __init__(self) -> None:
        self._made = time.perf_counter()
        self._ends: list[float] = []
        self.before = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note how long everything before the first update took."""
        self.before = time.perf_counter() - self._made

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Note the end of an update, and of what the callbacks before this one do after it."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Median time of an update."""
        ends = self._ends[WARM - 1 :]
        return median(later - earlier for earlier, later in pairwise(ends))


def _fit(
    cfg: RunConfig,
    phase: str,
    module: TrainedModule,
    data: L.LightningDataModule,
    extra: list[L.Callback],
    place: Path,
    **widths: int,
) -> _Watch:
    if cfg.trainer.capture:
        module.capture(cuda_recorder(cfg.trainer.accelerator, 1))
    module.metadata = {"stage": phase, "method": cfg.method, **widths}
    watch = _Watch()
    around = [CodebookUpdate()] if cfg.callbacks.codebook else []
    trainer = build_trainer(cfg, UPDATES, place / phase, [*around, *extra, watch], [])
    try:
        trainer.fit(module, datamodule=data)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{phase} does not fit the memory of the GPU ({str(error).splitlines()[0]}): set a "
            f"smaller size= or {cfg.section(phase)}.batch_size"
        ) from error
    return watch


def _in_workers(cfg: RunConfig) -> bool:
    return cfg.vlm.kind in ("flow", "none", "templates")


def _labels(cfg: RunConfig) -> Labels:
    """Count what the describer will be asked about the videos, and measure it where it is slow."""
    if cfg.vlm.kind == "none":
        return Labels(0, 0.0, 0)
    render_demo(cfg)
    work: CorpusLabelling = build.build_labelling(cfg, 0, 1)
    found = work.estimate(0 if _in_workers(cfg) else WINDOWS)
    seconds = 1.0 / found.rate if found.rate else 0.0
    known, folder = found.windows - found.missing, Path(build.shared_store(cfg).store)
    per_label = _bytes_under(folder) / known if known else 0.0
    return Labels(found.missing, seconds, math.ceil(per_label * found.windows))


def _report(cfg: RunConfig, phases: list[Phase], labels: Labels) -> tuple[str, int]:
    lines = [f"measured on {UPDATES} updates of each phase:"]
    for phase in phases:
        more = [f"{phase.updates:,} updates of {1000 * phase.seconds:.1f} ms"]
        if phase.before:
            more.append(f"prefill {phase.before / 3600:.2f} h")
        if phase.evaluating:
            more.append(f"evaluations {phase.evaluating / 3600:.2f} h")
        lines.append(f"  {phase.name}: {phase.hours:.2f} hours ({', '.join(more)})")
    hours = sum(phase.hours for phase in phases)
    asking = labels.questions * labels.seconds / 3600
    if labels.questions:
        told = f"  describer: {labels.questions:,} questions about the videos"
        if labels.seconds:
            told += f", {1000 * labels.seconds:.0f} ms each (measured): at most {asking:.2f} hours"
        lines.append(told if labels.seconds else f"{told}, in the loader's workers")
    lines.append(f"  in all: {hours:.2f} hours" + (f", labels up to {asking:.2f}" * bool(asking)))
    if cfg.trainer.processes > 1:
        lines.append(f"  (measured with one of {cfg.trainer.processes} processes)")
    lines.append(f"  memory: {_peak() / 1e9:.2f} GB of {_memory() / 1e9:.2f} GB")
    if torch.cuda.is_available():
        used, there = torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()[1]
        lines.append(f"  GPU memory: {used / 1e9:.2f} GB of {there / 1e9:.2f} GB")
    parts = {
        "checkpoints": sum(CHECKPOINTS * phase.checkpoint for phase in phases),
        "replay": sum(phase.replay for phase in phases),
        "films": sum(phase.films for phase in phases) if cfg.tracking.enabled else 0,
        "labels": labels.disk,
    }
    needed = sum(parts.values())
    named = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    lines.append(f"  disk: {needed / 1e9:.2f} GB ({named})")
    return "\n".join(lines) + "\n", needed


def _check_disk(cfg: RunConfig, needed: int) -> None:
    folder = Path(cfg.run_dir or "runs").absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"this run does not fit the disk: it needs {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free at '{folder}'; lower replay.capacity, or give another "
            "disk with run_dir=DIR"
        )


def _check_memory(cfg: RunConfig) -> None:
    """Refuse what the loaders' workers will need once they keep what they have decoded."""
    kept = cfg.data.cache_mb << 20 if cfg.data.cache == "memory" else 0
    needed = _peak() + cfg.data.workers * kept
    if needed > _memory():
        raise ConfigError(
            f"this run does not fit the memory: it needs up to {needed / 1e9:.1f} GB with the "
            f"frames that {cfg.data.workers} workers keep, and there are {_memory() / 1e9:.1f} GB; "
            "lower data.cache_mb or data.workers"
        )


def _peak() -> int:
    """Largest resident memory of this process so far, and of its largest child, in bytes."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(resource.getrusage(who).ru_maxrss for who in whose) * 1024


def _memory() -> int:
    """Memory of this machine, or what its control group may use, in bytes."""
    there = int(psutil.virtual_memory().total)
    try:
        return min(there, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no control group, or "max"
        return there


@contextmanager
def _gpu_memory() -> Iterator[None]:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    yield


def _bytes_under(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
