"""One start of the program: threads, seeds, the run's folder and its MLflow run."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
import torch.distributed as dist

from mapo_lightning.config.compose import Composed
from mapo_lightning.run.config import RunConfig
from mapo_lightning.run.from_checkpoint import Resumed, resumed
from mapo_lightning.tracking import logger as tracking
from mapo_lightning.training.cuda_graph import CudaRecorder, cuda_recorder
from mapo_lightning.training.process import keep_freed_memory
from mapo_lightning.types import ConfigError

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

    @property
    def cfg(self) -> RunConfig:
        """Settings of the run."""
        return self.composed.config

    @property
    def rank(self) -> int:
        """Number of this process among all of a job; known before a Trainer counts them."""
        return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def opened(composed: Composed[RunConfig]) -> Iterator[Session]:
    """Begin a run; however the stage ends, its MLflow run and process group are closed.

    Raises:
        ConfigError: The MLflow store or the run's folder cannot be written.
    """
    cfg = composed.config
    recorder = _settle_process(cfg)
    earlier = resumed(cfg)
    about = {"pretrain": "videos", "label": "labels"}.get(cfg.stage, cfg.env.name)
    folder = run_folder(f"{cfg.method}-{about}", cfg.run_dir)
    tags = {"method": cfg.method, "stage": cfg.stage, "run_dir": str(folder)}
    parent = tracking.start_parent(cfg.tracking, folder.name, tags, earlier.tracked("parent"))
    status: tracking.Status = "FAILED"
    inherited = os.environ.get(_SHARED)
    os.environ[_SHARED] = str(folder)  # ranks that this process starts share it
    try:
        _make_folder(folder, composed)
        yield Session(composed, folder, parent, earlier, recorder)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if inherited is None:  # the next run of this process has a folder of its own
            del os.environ[_SHARED]
        tracking.finish_parent(parent, status, cfg.tracking)
        if dist.is_initialized():  # without this, gloo aborts now and then at exit
            if status == "FINISHED":
                dist.barrier()
            dist.destroy_process_group()


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
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")
    if job and job != "none":
        return Path(f"runs/job{job}-{name}").absolute()
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


def _settle_process(cfg: RunConfig) -> CudaRecorder | None:
    """Settle memory, threads and random numbers; returns what records updates, if asked for."""
    trainer = cfg.trainer
    if trainer.keep_memory:
        keep_freed_memory()
    if trainer.threads:
        torch.set_num_threads(trainer.threads)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    return cuda_recorder(trainer.accelerator, trainer.processes) if trainer.capture else None


def _make_folder(folder: Path, composed: Composed[RunConfig]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if tracking.is_main_process():
            composed.save(folder / "config.yaml")
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot write the run's folder '{folder}' ({error.strerror}); give another with "
        "run_dir=DIR"
    )
