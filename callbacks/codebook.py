"""Moves the codebook: once per optimiser step, over all ranks together."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from mapo_lightning.models.interfaces import Codebook
from mapo_lightning.training.log_due import log_due, log_now
from mapo_lightning.types import ConfigError


class CodebookUpdate(L.Callback):
    """Apply the codebook's moving averages once per optimiser step (Algorithm 1, line 13).

    Kept out of ``forward`` so that evaluation, gradient accumulation and a second forward pass of
    the same batch cannot move the codes. Logs perplexity, share of living codes and revivals.
    """

    def __init__(self) -> None:
        self._done_step = 0
        self._books: dict[str, Codebook] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the codebooks."""
        self._books = {
            name.rpartition(".")[2]: module
            for name, module in pl_module.named_modules()
            if isinstance(module, Codebook) and not module.frozen
        }
        if not any(isinstance(module, Codebook) for module in pl_module.modules()):
            raise ConfigError(
                "CodebookUpdate found no codebook in the model. Switch it off "
                "(callbacks.codebook=false) or choose a method with one (method=mapo)."
            )
        self._done_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Move the codes, unless gradients are still being accumulated."""
        if trainer.global_step == self._done_step:
            return
        self._done_step = trainer.global_step
        due = log_due(trainer)
        for name, book in self._books.items():
            count_M, sum_MZ, places_MZ = book.batch_count, book.batch_sum, book.candidates
            if trainer.world_size > 1:
                dist.all_reduce(count_M)
                dist.all_reduce(sum_MZ)
                dist.broadcast(places_MZ, src=0)
            use = book.update(count_M, sum_MZ, places_MZ)
            if due:
                values: dict[str, torch.Tensor] = use._asdict()
                log_now(pl_module, {f"codebook/{key}_{name}": x for key, x in values.items()})
