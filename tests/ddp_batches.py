"""Updates on one batch of sixteen clips, in one process or split over two that train together.

Run as a program, it starts two processes; a test calls `gradients_after` for one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from networks import image
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.codebook import CodebookUpdate
from mapo_lightning.config.compose import compose
from mapo_lightning.run import build
from mapo_lightning.run.config import RunConfig, conf_folder
from mapo_lightning.run.trainer import build_trainer
from mapo_lightning.training.pretrain import PretrainModule
from mapo_lightning.types import Batch

UPDATES, CLIPS, STEPS, WIDTH = 10, 16, 5, 320
WORDS = ("trainer=debug", "env=toy", "stage=pretrain", "vlm=none", image("tiny"))


class SharedDraws:
    """Random numbers for all clips, of which a process takes those of its own clips.

    So that noise is no difference between one process and two: it replaces torch's functions.
    """

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world, self.own = rank, world, CLIPS // world
        self.generator = torch.Generator().manual_seed(3)

    def rand(self, *shape: Any, **_: Any) -> Tensor:
        """Uniform numbers, as torch.rand."""
        return self._share(torch.rand, shape[0] if isinstance(shape[0], tuple) else shape)

    def randint(self, high: int, shape: tuple[int, ...], **_: Any) -> Tensor:
        """Whole numbers, as torch.randint."""
        return self._share(lambda size, generator: _RANDINT(high, size, generator=generator), shape)

    def _share(self, draw: Any, shape: tuple[int, ...]) -> Tensor:
        of_all, axis = list(shape), shape.index(self.own)
        of_all[axis] = CLIPS
        drawn: Tensor = (_RAND if draw is torch.rand else draw)(of_all, generator=self.generator)
        return drawn.narrow(axis, self.rank * self.own, self.own)


_RAND, _RANDINT = torch.rand, torch.randint


def clips(number: int) -> Batch:
    """The batch of one update, (16, 5, ...); the same in every process."""
    generator = torch.Generator().manual_seed(100 + number)
    lead = (CLIPS, STEPS)
    return {
        "obs": torch.randint(256, (*lead, 32, 32, 3), generator=generator, dtype=torch.uint8),
        "semantic": torch.randn(*lead, WIDTH, generator=generator),
        "has_semantic": torch.rand(*lead, generator=generator) < 0.7,
        "position": torch.arange(STEPS).expand(lead).contiguous(),
        "is_first": (torch.arange(STEPS) == 0).expand(lead).contiguous(),
    }


class Shares(L.LightningDataModule):
    """Hands each process its share of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = [clips(number) for number in range(UPDATES)]

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.trainer is not None
        rank, own = self.trainer.global_rank, CLIPS // self.trainer.world_size
        mine = slice(rank * own, (rank + 1) * own)
        shares = [{name: x[mine] for name, x in batch.items()} for batch in self.batches]
        return DataLoader(shares, batch_size=None)  # type: ignore[arg-type]


class Keeper(L.Callback):
    """Keeps the gradients of the last update, and the codes after it."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        if trainer.global_step == UPDATES - 1:
            named = pl_module.named_parameters()
            self.found = {n: p.grad.clone() for n, p in named if p.grad is not None}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        codebook = (".codes", ".ema_count", ".ema_sum")
        buffers = pl_module.named_buffers()
        self.found |= {name: b.clone() for name, b in buffers if name.endswith(codebook)}


def gradients_after(folder: Path, devices: int) -> dict[str, Tensor]:
    """Train; returns the last update's gradients by parameter, and the codebooks."""
    words = [*WORDS, f"trainer.devices={devices}"]
    words += ["trainer.strategy=ddp"] if devices > 1 else []
    cfg = compose(words, RunConfig, conf_folder()).config
    L.seed_everything(0, verbose=False)
    torch.set_num_threads(1)
    module: PretrainModule = build.build_pretrain(cfg)
    for name, buffer in module.named_buffers():
        if name.endswith(".started"):  # codes drawn from the first batch would be other ones
            buffer.fill_(True)
    keeper = Keeper()
    trainer = build_trainer(cfg, UPDATES, folder, [CodebookUpdate(), keeper], [])
    shares, draws = Shares(), SharedDraws(int(os.environ.get("LOCAL_RANK", "0")), devices)
    torch.rand, torch.randint = draws.rand, draws.randint  # type: ignore[assignment]
    try:
        trainer.fit(module, datamodule=shares)
    finally:
        torch.rand, torch.randint = _RAND, _RANDINT
    return keeper.found


if __name__ == "__main__":
    found = gradients_after(Path("checkpoints"), devices=2)
    torch.save(found, f"rank{os.environ.get('LOCAL_RANK', '0')}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.exit()
