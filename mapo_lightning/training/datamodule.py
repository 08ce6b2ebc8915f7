"""LightningDataModules: clips from videos with their semantic actions, and chunks from replay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from mapo_lightning.data.clips import Clip, ClipDataset
from mapo_lightning.data.prefetch import collate_clips, settle
from mapo_lightning.data.replay import Replay
from mapo_lightning.data.scan import VideoIndex, scan_videos
from mapo_lightning.data.settings import VideoDataConfig
from mapo_lightning.semantics.factory import build_labeler
from mapo_lightning.semantics.labeler import Labeler
from mapo_lightning.semantics.settings import VlmConfig
from mapo_lightning.types import Batch

_HELD_OUT_CLIPS = 16


class VideoDataModule(L.LightningDataModule):
    """Decodes clips from video files and labels them online, inside the loader's workers.

    Args:
        data: Which videos, and how clips are cut.
        vlm: Who describes them.
        batch_size: Clips per batch and rank.
        root: Folder that keeps the scan's results and the label store.
        seed: Of the clip sampler.
    """

    def __init__(
        self, data: VideoDataConfig, vlm: VlmConfig, batch_size: int, root: Path, seed: int
    ) -> None:
        super().__init__()
        self.data, self.vlm, self.batch_size = data, vlm, batch_size
        self.root, self.seed = root, seed
        self.index: VideoIndex | None = None
        self._labeler: Labeler | None = None

    def setup(self, stage: str) -> None:
        """Scan the folder once; bad files go to the quarantine report."""
        if self.index is None:
            self.index = scan_videos(self.data, self.root)

    def clips(self, split: str) -> ClipDataset:
        """Endless random clips of the ``train`` videos, of the ``holdout`` ones, or of ``all``."""
        self.setup("fit")
        assert self.index is not None
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        index = self.index
        videos = {
            "train": index.train,
            "holdout": index.holdout or index.train,
            "all": index.videos,
        }[split]
        aside = self.root / "quarantine.jsonl"
        return ClipDataset(
            videos, self.data, self.vlm, self.root, self.seed, rank, world, split, aside
        )

    def train_dataloader(self) -> DataLoader[Clip]:
        """Batches without end; the trainer's budget of updates stops them."""
        workers = self.data.workers
        return DataLoader(
            self.clips("train"),
            batch_size=self.batch_size,
            num_workers=workers,
            collate_fn=collate_clips,
            prefetch_factor=2 if workers else None,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """The same held-out clips every time."""
        clips = self.clips("holdout").fixed_clips(_HELD_OUT_CLIPS)
        return DataLoader(clips, batch_size=self.batch_size)  # type: ignore[arg-type]

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Label what the loader's workers could not: a model in this process answers in batches."""
        if "pending" not in batch:
            return batch
        if self._labeler is None:
            rank = self.trainer.global_rank if self.trainer else 0
            self._labeler = build_labeler(self.vlm, self.root, f"train-rank{rank}-batch")
        return settle(batch, self._labeler)

    def rollout_batch(self, count: int) -> Batch:
        """The first ``count`` held-out clips, for pictures."""
        batch: Batch = default_collate(self.clips("holdout").fixed_clips(count))
        return {key: value for key, value in batch.items() if value.ndim > 1}  # no counts


class _Chunks(IterableDataset[Batch]):
    """Chunks drawn from replay, batch after batch without end."""

    def __init__(
        self, replay: Replay, batch_size: int, length: int, rng: np.random.Generator
    ) -> None:
        self.replay, self.batch_size, self.length = replay, batch_size, length
        self.rng = rng

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield chunk_batch(self.replay, self.rng, self.batch_size, self.length)


def chunk_batch(replay: Replay, rng: np.random.Generator, count: int, length: int) -> Batch:
    """Draw ``count`` chunks of ``length`` entries; each starts a fresh sequence (facts 6.2)."""
    arrays = replay.sample(rng, count, length)
    batch = {key: torch.from_numpy(value) for key, value in arrays.items()}
    batch["semantic"] = batch["semantic"].float()
    batch["is_first"][:, 0] = True
    return batch


class ReplayDataModule(L.LightningDataModule):
    """Chunks of the agent's own experience.

    The loader has no workers: the collector writes between batches in the same process.
    """

    def __init__(self, replay: Replay, batch_size: int, length: int, seed: int) -> None:
        super().__init__()
        self.replay, self.batch_size, self.length, self.seed = replay, batch_size, length, seed
        self.rng = np.random.default_rng(seed)
        """Draws the chunks; its state belongs into a checkpoint."""

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches without end; the trainer's budget of updates stops them."""
        chunks = _Chunks(self.replay, self.batch_size, self.length, self.rng)
        return DataLoader(chunks, batch_size=None, pin_memory=torch.cuda.is_available())

    def rollout_batch(self, count: int) -> Batch:
        """Chunks of the newest experience, for pictures."""
        rng = np.random.default_rng(self.seed)
        return chunk_batch(self.replay, rng, count, self.length)
