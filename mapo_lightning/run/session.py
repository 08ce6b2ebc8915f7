"""One start of the program: threads, seeds, the run's folder and its MLflow run."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist

from mapo_lightning.config.compose import Composed
from mapo_lightning.files import atomic_write
from mapo_lightning.run import finished, job
from mapo_lightning.run.config import RunConfig, conf_folder
from mapo_lightning.run.from_checkpoint import Resumed, resumed
from mapo_lightning.stopping import Stopped
from mapo_lightning.tracking import logger as tracking
from mapo_lightning.training.checkpoint import newest_checkpoint
from mapo_lightning.training.cuda_graph import CudaRecorder, cuda_recorder
from mapo_lightning.training.process import keep_freed_memory
from mapo_lightning.types import CheckpointError, ConfigError

log = logging.getLogger(__name__)

_TRACKED = "mlflow.json"  # MLflow runs of the run's phases, for a start that finds no checkpoint
_SHARED = "MAPO_RUN_DIR"


class Session(NamedTuple):
    """What every stage needs to know of this start."""

    composed: Composed[RunConfig]
    folder: Path
    """Absolute path of the run's folder."""
    parent: str | None
    """MLflow run that holds those of the phases; None without tracking and off rank 0."""
    resumed: Resumed
    recorder: CudaRecorder | None
    """Of whole updates, where ``trainer.capture`` asks for it."""
    continues: bool
    """Whether this goes on with a run that was begun before."""
    results: dict[str, float]
    """What came out so far, by name."""

    @property
    def cfg(self) -> RunConfig:
        """Settings of the run."""
        return self.composed.config

    @property
    def rank(self) -> int:
        """Number of this process among all of a job; known before a Trainer counts them."""
        return job.rank()

    def tracked(self, name: str) -> str | None:
        """The MLflow run that a phase goes on with; None where it gets one of its own."""
        return self.resumed.tracked(name) or noted(self.folder, self.continues).get(name)

    def run_name(self, phase: str) -> str:
        """What the MLflow run of a phase is called: unlike a bare phase, it names its run."""
        return f"{self.folder.name}/{phase}"

    def conclude(self, figures: Mapping[str, float], words: str = "") -> None:
        """Show what came out in MLflow's list of runs; a later figure replaces an earlier one.

        ``words``, if any, follow those before them in the run's description.
        """
        self.results.update(figures)
        tracking.log_results(self.cfg.tracking, self.parent, self.results, words)

    def note(self, name: str, run: str | None) -> None:
        """Write down a phase's MLflow run: it may be stopped before its first checkpoint."""
        if run is not None:
            note(self.folder, name, run)


@contextmanager
def opened(composed: Composed[RunConfig]) -> Iterator[Session]:
    """Begin a run; however the stage ends, its MLflow run and process group are closed.

    Raises:
        ConfigError: The MLflow store or the run's folder cannot be written.
    """
    cfg = composed.config
    recorder = _settle_process(cfg)
    earlier = resumed(cfg)
    folder = run_folder(_name(cfg), cfg.run_dir)
    continues = cfg.resume is not None or job.restarted()
    if not continues:
        _check_job_folder(folder, cfg)
    known = earlier.tracked("parent") or noted(folder, continues).get("parent")
    parent = tracking.start_parent(
        cfg.tracking, folder.name, _tags(cfg, folder), known, parameters(composed)
    )
    status: tracking.Status = "FAILED"
    inherited = os.environ.get(_SHARED)
    os.environ[_SHARED] = str(folder)  # ranks that this process starts share it
    try:
        _make_folder(folder, composed)
        session = Session(composed, folder, parent, earlier, recorder, continues, {})
        session.note("parent", parent)
        yield session
        status = "FINISHED"
    except Stopped as stopped:
        status = "KILLED"
        stopped.when = stopped.when or f"in stage={cfg.stage}"
        stopped.advice = _advice(cfg, folder)
        raise
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if inherited is None:  # the next run of this process has a folder of its own
            del os.environ[_SHARED]
        tracking.finish_parent(parent, status, cfg.tracking)
        if status == "FINISHED" and tracking.is_main_process():
            finished.write(folder, cfg.stage)
        if dist.is_initialized():  # without this, gloo aborts now and then at exit
            if status == "FINISHED":
                dist.barrier()
            dist.destroy_process_group()


def continued(words: Sequence[str], cfg: RunConfig) -> list[str]:
    """The words of a start that SLURM or torchrun repeats: they go on where the run was.

    Args:
        words: Of the command line, which is the same at every start.
        cfg: What they ask for.
    """
    if cfg.stage in ("label", "evaluate"):  # the label store remembers; episodes are played again
        return list(words)
    folder = run_folder(_name(cfg), cfg.run_dir)
    try:
        newest_checkpoint(folder)
    except CheckpointError:
        return list(words)
    log.info("this job was started again: the run in '%s' goes on", folder)
    # The run's own settings hold what the words of groups have chosen. Single keys count again: an
    # address, for one, may be another than before.
    groups = {path.name for path in conf_folder().iterdir() if path.is_dir()}
    dropped = groups | {"config", "resume"}
    return [*(w for w in words if w.partition("=")[0] not in dropped), f"resume={folder}"]


def run_folder(name: str, given: str = "") -> Path:
    """Choose the folder of this run; the same on every rank, whoever starts the ranks.

    Args:
        name: What to call it where none is given, after the time or the job.
        given: The folder that the user wants.

    Raises:
        ConfigError: The folder cannot be made.

    Returns:
        Its absolute path. A folder that is called after the time is made, because another run may
        start in the same second; any other is not.
    """
    name = re.sub(r"[^\w.+-]+", "-", name)  # a task may be named Package/Task
    folder = given or os.environ.get(_SHARED, "")
    if folder:
        return Path(folder).absolute()
    if started := job.job_name():
        return Path(f"runs/{started}-{name}").absolute()
    base = Path(f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{name}").absolute()
    for number in itertools.count(1):
        path = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise _unwritable(path, error) from error
        return path
    raise AssertionError("counting has no end")


def parameters(composed: Composed[RunConfig]) -> dict[str, Any]:
    """A run's parameters in MLflow, by dotted key.

    Every resume says ``resume`` and ``run_dir`` anew: they would stand among the parameters that it
    changes.
    """
    return {k: v for k, v in composed.flat.items() if k not in ("resume", "run_dir")}


def _tags(cfg: RunConfig, folder: Path) -> dict[str, str]:
    """What tells a run from others in MLflow's list."""
    plays = cfg.stage not in ("pretrain", "label")
    tags = {
        "method": cfg.method,
        "task": str(cfg.about["task"]) if plays else f"videos/{cfg.data.kind}",
        "seed": str(cfg.seed),
        "stage": cfg.stage,
        "run_dir": str(folder),
    }
    return tags | ({"mlflow.parentRunId": cfg.tracking.parent} if cfg.tracking.parent else {})


def _name(cfg: RunConfig) -> str:
    """What a run is called, after the time or the job."""
    about = {"pretrain": "videos", "label": "labels"}.get(cfg.stage, cfg.env.name)
    # One job may run several seeds, one after the other.
    seed = f"-seed{cfg.seed}" if job.job_name() else ""
    return f"{cfg.method}-{about}{seed}"


def _check_job_folder(folder: Path, cfg: RunConfig) -> None:
    """See that no earlier run of the same job lies in the folder that is named after it."""
    if cfg.run_dir or not job.job_name() or not tracking.is_main_process():
        return
    for result in sorted(folder.glob("*/*.ckpt")):
        raise ConfigError(
            f"this job has had a run in '{folder}' already ({result.relative_to(folder)}): give "
            "each run of a job a folder of its own with run_dir=DIR"
        )


def note(folder: Path, name: str, run: str) -> None:
    """Write down an MLflow run in a folder, for later starts."""
    found = noted(folder, True) | {name: run}
    with atomic_write(folder / _TRACKED) as draft:
        draft.write_text(json.dumps(found), encoding="utf-8")


def noted(folder: Path, continues: bool) -> dict[str, str]:
    """MLflow runs that an earlier start has written down.

    Raises:
        ConfigError: The file is damaged.
    """
    path = folder / _TRACKED
    if not continues or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"'{path}' is damaged: delete it, and the run gets new MLflow runs")
    return {str(name): str(run) for name, run in found.items()}


def _advice(cfg: RunConfig, folder: Path) -> str:
    """How to go on after a stop."""
    if cfg.stage == "label":
        return "the same command goes on with the windows that are left"
    if cfg.stage == "evaluate":
        return "the same command plays the episodes again"
    if any(folder.glob("*/*.ckpt")):
        return f"resume={folder} goes on"
    return "there is no checkpoint yet: the same command starts again"


def _settle_process(cfg: RunConfig) -> CudaRecorder | None:
    """Settle memory, threads and random numbers; returns what records updates, if asked for."""
    trainer = cfg.trainer
    if trainer.keep_memory:
        keep_freed_memory()
    if trainer.threads:
        torch.set_num_threads(trainer.threads)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    if not trainer.capture:
        return None
    return cuda_recorder(trainer.accelerator, trainer.processes, trainer.strategy)


def _make_folder(folder: Path, composed: Composed[RunConfig]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if tracking.is_main_process():
            finished.remove(folder)
            composed.save(folder / "config.yaml")
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot write the run's folder '{folder}' ({error.strerror}); give another with "
        "run_dir=DIR"
    )
