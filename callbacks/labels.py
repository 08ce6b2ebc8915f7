"""Watches the labels: how many were asked for, how many said nothing, and what they look like."""

from __future__ import annotations

from typing import Any, Protocol

import lightning as L
import torch

from callbacks.recorder import recorder_of
from mapo_lightning.data.clips import LabelExample
from mapo_lightning.types import Batch

COUNTS = ("asked", "hits", "null", "windows")


class _HasExamples(Protocol):
    def label_examples(self, count: int) -> list[LabelExample]: ...


class RecordLabels(L.Callback):
    """Log ``vlm/...`` counts while training, and phrases next to their frames at the end.

    Args:
        examples: Windows in the picture; 0 draws none.
    """

    def __init__(self, examples: int) -> None:
        self.examples = examples
        self.total = dict.fromkeys(COUNTS, torch.zeros((), dtype=torch.long))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Add up what the loader's workers counted; nothing is read back until a point is due."""
        for name in COUNTS:
            self.total[name] = self.total[name].to(pl_module.device) + batch[f"vlm_{name}"].sum()
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            windows = self.total["windows"].clamp(min=1)
            pl_module.log_dict(
                {
                    "vlm/asked": self.total["asked"].float(),
                    "vlm/hit_rate": self.total["hits"] / windows,
                    "vlm/null_rate": self.total["null"] / windows,
                }
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the picture."""
        recorder = recorder_of(trainer)
        if recorder is not None and trainer.is_global_zero and self.examples:
            data: _HasExamples = trainer.datamodule  # type: ignore[attr-defined]
            recorder.log_phrases(trainer, data.label_examples(self.examples), trainer.global_step)
