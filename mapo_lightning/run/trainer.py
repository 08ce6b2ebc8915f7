"""Lightning's Trainer, and how it saves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO

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


class _WholeFiles(TorchCheckpointIO):
    """Writes checkpoints at once or not at all, also where the temporary folder is another disk."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write one checkpoint."""
        write_checkpoint(checkpoint, Path(path))


class _Saving(ModelCheckpoint):
    """Saves every few updates and, unlike Lightning's, also after the last one.

    Args:
        folder: Of the checkpoints.
        every: Updates from one checkpoint to the next.
    """

    def __init__(self, folder: Path, every: int) -> None:
        super().__init__(
            dirpath=folder,
            filename="{step}",
            every_n_train_steps=every,
            save_last=True,
            save_top_k=1,
            monitor=None,
            save_on_train_epoch_end=True,
            enable_version_counter=False,  # a resumed run replaces its own files
        )
        self.every, self.last = every, folder / "last.ckpt"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over which files are ours; Lightning deletes the one that a new one replaces."""
        super().load_state_dict(state_dict)
        for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
            path = str(getattr(self, name))
            if os.path.dirname(path) != str(self.dirpath):  # not Path, which rewrites addresses
                setattr(self, name, "")
        self.best_k_models = {}  # kept only where a metric is watched

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the trained model, unless the last update was one with a checkpoint."""
        if trainer.global_step % self.every:
            trainer.save_checkpoint(self.last)
            self.last_model_path = str(self.last)


def build_trainer(
    cfg: RunConfig,
    updates: int,
    folder: Path,
    callbacks: Sequence[L.Callback],
    logger: Logger | None,
    validate_every: int | None = None,
) -> L.Trainer:
    """Lightning's Trainer for one stage of ``updates`` optimiser updates."""
    return L.Trainer(
        **_hardware(cfg.trainer),
        deterministic=cfg.trainer.deterministic,
        max_steps=updates,
        log_every_n_steps=cfg.trainer.log_every,
        val_check_interval=min(validate_every, updates) if validate_every else None,
        check_val_every_n_epoch=None if validate_every else 1,
        limit_val_batches=None if validate_every else 0,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, _Saving(folder, cfg.callbacks.checkpoint_every)],
        plugins=[_WholeFiles()],
        logger=logger or False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
