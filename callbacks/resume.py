"""The random numbers of every rank, and what a resumed run takes up first."""

from __future__ import annotations

import logging
import random
from typing import Any

import lightning as L
import numpy as np
import torch

from mapo_lightning.training.ranks import of_all_ranks, seed_of_rank

log = logging.getLogger(__name__)


class Resume(L.Callback):
    """Save the generators of torch, CUDA, numpy and Python; continue them after resuming.

    The networks of all ranks are built with the same random numbers. From the first batch on each
    rank draws its own; those of the first are the ones that a run of one process draws.

    A checkpoint gets an entry ``random`` with the states of every rank. They come back when the
    first batch starts: before that, the data loaders of the resumed run draw seeds, as those of
    the run that wrote the checkpoint did at its own start.

    It belongs in front of all other callbacks. What they draw when training has ended, for a last
    rollout, is then not part of the last checkpoint, and a run that is extended equals one that
    had all of its updates from the start.

    Validation comes after the checkpoint of the same update. A resumed run makes it first: the run
    before may have been killed in it. Curves that were recorded already are not recorded twice.
    """

    def __init__(self) -> None:
        self._resumed: dict[str, Any] | None = None
        self._at_end: dict[str, Any] | None = None
        self._validates, self._begins = False, True

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Gather the states of all ranks; called on all of them."""
        checkpoint["random"] = of_all_ranks(self._at_end or states(pl_module.device))

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember the states of this rank."""
        self._validates = True
        ranks = checkpoint.get("random", [])
        if len(ranks) == trainer.world_size:
            self._resumed = ranks[trainer.global_rank]
        elif trainer.is_global_zero:
            log.info(
                "the checkpoint holds the random numbers of %d processes and the run has %d: "
                "random numbers start anew from the seed",
                len(ranks),
                trainer.world_size,
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the validation that was due after the checkpoint's update."""
        every: Any = trainer.val_check_batch
        if not self._validates or not trainer.enable_validation or trainer.global_step % every:
            return
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False
        trainer.validating = True
        loop.run()
        trainer.training = True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Continue the random numbers of the checkpoint, or begin those of this rank, once."""
        if self._resumed is not None:
            restore(self._resumed, pl_module.device)
            self._resumed = None
        elif self._begins and trainer.global_rank:
            seed = seed_of_rank(torch.initial_seed(), trainer.global_rank)
            torch.manual_seed(seed)  # of a GPU too
            np.random.seed(seed)
            random.seed(seed)
        self._begins = False

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note where the last update left the random numbers."""
        self._at_end = states(pl_module.device)


def states(device: torch.device) -> dict[str, Any]:
    """The states of all global generators, as a checkpoint may hold them."""
    name, keys, *rest = np.random.get_state(legacy=True)
    found: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
        "python": random.getstate(),
    }
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def restore(found: dict[str, Any], device: torch.device) -> None:
    """Continue from what `states` returned; a state of a GPU only where there is one."""
    torch.set_rng_state(found["torch"].cpu())
    name, keys, *rest = found["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, numbers, gauss = found["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in found and device.type == "cuda":
        torch.cuda.set_rng_state(found["cuda"].cpu(), device)
