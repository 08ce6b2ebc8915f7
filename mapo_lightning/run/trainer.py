"""Lightning's Trainer, and how it saves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mapo_lightning.run.config import RunConfig
from mapo_lightning.training.checkpoint import (
    write_checkpoint,
)
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


class _WholeFiles(TorchCheckpointIO):
    """Writes checkpoints at once or not at all, also where the temporary folder is another disk."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write one checkpoint."""
        write_checkpoint(checkpoint, Path(path))


class _Saving(ModelCheckpoint):
    """Lightning saves nothing at the end of training if a checkpoint was due before: this does."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the trained model, unless the last update was one with a checkpoint."""
        super().on_train_end(trainer, pl_module)
        if trainer.global_step != self._last_global_step_saved:
            trainer.save_checkpoint(self.last_model_path)


def build_trainer(
    cfg: RunConfig,
    updates: int,
    folder: Path,
    callbacks: Sequence[L.Callback],
    logger: Logger | None,
    validate_every: int | None = None,
) -> L.Trainer:
    """Lightning's Trainer for one stage of ``updates`` optimiser updates."""
    saving = _Saving(
        dirpath=folder,
        filename="{step}",
        every_n_train_steps=cfg.callbacks.checkpoint_every,
        save_last=True,
        save_top_k=1,
        monitor=None,
        save_on_train_epoch_end=True,
        enable_version_counter=False,  # a resumed run replaces its own files
    )
    return L.Trainer(
        accelerator=cfg.trainer.accelerator,
        devices=cfg.trainer.devices,
        num_nodes=cfg.trainer.num_nodes,
        strategy=cfg.trainer.strategy,
        precision=cfg.trainer.precision,
        deterministic=cfg.trainer.deterministic,
        max_steps=updates,
        log_every_n_steps=cfg.trainer.log_every,
        val_check_interval=min(validate_every, updates) if validate_every else None,
        check_val_every_n_epoch=None if validate_every else 1,
        limit_val_batches=None if validate_every else 0,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, saving],
        plugins=[_WholeFiles()],
        logger=logger or False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
