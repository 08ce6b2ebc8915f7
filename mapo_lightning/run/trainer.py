"""Lightning's Trainer, and how it saves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from callbacks.settings import CallbacksConfig
from mapo_lightning import stopping
from mapo_lightning.run.config import RunConfig
from mapo_lightning.training.checkpoint import (
    write_checkpoint,
)
from mapo_lightning.training.settings import TrainerConfig
from mapo_lightning.types import ConfigError


def best_device(accelerator: str) -> torch.device:
    """Where to run networks outside a Trainer: its choice of hardware, for one process.

    Raises:
        ConfigError: A GPU is asked for and there is none.
    """
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError(f"trainer.accelerator={accelerator}, but there is no GPU")
    wanted = accelerator != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if wanted else "cpu")


def check_hardware(cfg: TrainerConfig) -> None:
    """Refuse what this machine, or Lightning, does not have.

    Raises:
        ConfigError: The accelerator, so many devices, or the strategy cannot be had.
    """
    best_device(cfg.accelerator)
    try:
        L.Trainer(
            **_hardware(cfg),
            plugins=_cluster(),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        asked = ", ".join(f"trainer.{name}={value}" for name, value in _hardware(cfg).items())
        reason = str(error).splitlines()[0]
        raise ConfigError(f"this machine cannot run {asked}: {reason}") from error


def _hardware(cfg: TrainerConfig) -> dict[str, Any]:
    """What Lightning's Trainer is told about the machine."""
    names = ("accelerator", "devices", "num_nodes", "strategy", "precision")
    return {name: getattr(cfg, name) for name in names}


def _cluster() -> list[Any]:
    """SLURM, where srun has started this process, without what Lightning does to a job there.

    Its own requeueing writes a checkpoint into the working folder, and every later job that starts
    in that folder loads it, whatever it was asked to do.
    """
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return []
    return [SLURMEnvironment(auto_requeue=False)]


class _WholeFiles(TorchCheckpointIO):
    """Writes checkpoints at once or not at all, also where the temporary folder is another disk."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write one checkpoint."""
        write_checkpoint(checkpoint, Path(path))


class _Saving(ModelCheckpoint):
    """Saves every few updates and, unlike Lightning's, also at the end and before a stop.

    It comes after all other callbacks: what it saves is the state between two updates. The
    checkpoint of the last update is written when all of them have done what they do at the end. So
    one that has all updates says that nothing of the training is left to do, unless a signal has
    stopped the run right there.

    Args:
        folder: Of the checkpoints.
        every: Updates from one checkpoint to the next.
        keep_all: Keep all of them, not only the newest.
    """

    def __init__(self, folder: Path, every: int, keep_all: bool = False) -> None:
        super().__init__(
            dirpath=folder,
            filename="{step}",
            every_n_train_steps=every,
            save_last=True,
            save_top_k=-1 if keep_all else 1,
            monitor=None,
            save_on_train_epoch_end=True,
            enable_version_counter=False,  # a resumed run replaces its own files
        )
        self.every, self.last = every, folder / "last.ckpt"
        self._ranks: Any = None  # group of processes that agree without their devices

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals back from Lightning, whose handler waits for other ranks."""
        stopping.install()
        if trainer.world_size > 1:
            self._ranks = dist.new_group(backend="gloo")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on, a signal waits for the end of the update."""
        super().on_train_start(trainer, pl_module)
        stopping.signals.hold()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Save when it is due, and where the run is to stop."""
        ended = trainer.global_step >= trainer.max_steps
        if not ended:
            super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        asked = self._agreed(stopping.signals.asked)
        if not asked:
            return
        stopping.signals.release()
        if ended or trainer.global_step % self.every:  # otherwise it was saved just now
            trainer.save_checkpoint(self.last)
        raise stopping.Stopped(asked, f"after update {trainer.global_step}", agreed=True)

    def _agreed(self, asked: int) -> int:
        """The signal that any rank has received, on all of them."""
        if self._ranks is None:
            return asked
        heard = torch.tensor(asked)
        dist.all_reduce(heard, dist.ReduceOp.MAX, self._ranks)
        return int(heard)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Let the processes that Lightning has started for other ranks stop too."""
        stopping.signals.release()
        kill = getattr(trainer.strategy.launcher, "kill", None)
        if isinstance(exception, stopping.Stopped) and not exception.agreed and kill is not None:
            kill(exception.signal)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over which files are ours; Lightning deletes the one that a new one replaces."""
        super().load_state_dict(state_dict)
        for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
            path = str(getattr(self, name))
            if os.path.dirname(path) != str(self.dirpath):  # not Path, which rewrites addresses
                setattr(self, name, "")
        self.best_k_models = {}  # kept only where a metric is watched

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the trained model."""
        trainer.save_checkpoint(self.last)
        self.last_model_path = str(self.last)
        asked = self._agreed(stopping.signals.asked)
        stopping.signals.release()
        if asked:
            raise stopping.Stopped(asked, f"after update {trainer.global_step}", agreed=True)


def _saving(cfg: CallbacksConfig, folder: Path) -> _Saving:
    return _Saving(folder, cfg.checkpoint_every, cfg.checkpoints == "all")


def build_trainer(
    cfg: RunConfig,
    updates: int,
    folder: Path,
    callbacks: Sequence[L.Callback],
    loggers: Sequence[Logger],
    validate_every: int | None = None,
) -> L.Trainer:
    """Lightning's Trainer for one stage of ``updates`` optimiser updates."""
    hardware = _hardware(cfg.trainer)
    if cfg.tokens and cfg.trainer.processes > 1:
        # The tokenizer learns in some updates only, and the agent steps optimisers of its own.
        hardware["strategy"] = "ddp_find_unused_parameters_true"
    return L.Trainer(
        **hardware,
        deterministic=cfg.trainer.deterministic,
        max_steps=updates,
        log_every_n_steps=cfg.trainer.log_every,
        val_check_interval=min(validate_every, updates) if validate_every else None,
        check_val_every_n_epoch=None if validate_every else 1,
        limit_val_batches=None if validate_every else 0,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, _saving(cfg.callbacks, folder)],
        plugins=[_WholeFiles(), *_cluster()],
        # In a job of SLURM, Lightning looks here for a checkpoint and loads it without being told
        # to. No run makes this folder.
        default_root_dir=folder / "lightning",
        logger=list(loggers) or False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
