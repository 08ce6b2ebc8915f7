"""Data modules: clips of videos with their semantic actions, and chunks from replay."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from mapo_lightning.data.clips import Clip, ClipDataset, Place, Streams
from mapo_lightning.data.decoded_cache import DecodedCache
from mapo_lightning.data.replay import Replay
from mapo_lightning.data.scan import VideoIndex, scan_videos
from mapo_lightning.data.settings import VideoDataConfig
from mapo_lightning.data.window_labels import collate_clips, label_pending
from mapo_lightning.semantics.embed import HashedSlots, WithDirection
from mapo_lightning.semantics.factory import build_labeler
from mapo_lightning.semantics.labeler import Labeler
from mapo_lightning.semantics.settings import VlmConfig
from mapo_lightning.semantics.text_encoder import build_encoder
from mapo_lightning.stopping import leave_to_parent
from mapo_lightning.training.ranks import of_all_ranks
from mapo_lightning.types import Batch
from mapo_lightning.waiting import waiting

log = logging.getLogger(__name__)

_HELD_OUT_CLIPS = 16
_PICTURED = 512  # training videos of which the mean picture is taken, at most
_MEAN_OF, _MEDIAN_OF = 8, 100  # frames of a video that its mean and its median are taken of


class _WatchedLoader(DataLoader[Clip]):
    """A loader that says once a minute that a batch is still being made."""

    def __iter__(self) -> Any:
        batches = super().__iter__()
        while True:
            try:
                with waiting("the next batch: its clips are being decoded and labelled"):
                    batch = next(batches)
            except StopIteration:
                return
            yield batch


def pinned(batch: Batch, device: torch.device) -> Batch:
    """The batch in pinned memory where it goes to a GPU, which then copies it by itself.

    In this thread: the host has nothing else to do while the device works on the update before.
    """
    if device.type != "cuda":
        return batch
    return {key: value.pin_memory() for key, value in batch.items()}


class VideoDataModule(L.LightningDataModule):
    """Decodes clips of video files and labels them during training, in the loader's workers.

    Its entry in a checkpoint says of every rank where its streams of clips stand. What the loader
    has fetched in advance does not count: a resumed run continues with the first clip that no
    update has seen.

    Args:
        data: Which videos, and how clips are cut.
        vlm: Describer and windows.
        batch_size: Clips per batch and rank.
        root: Folder of the scan's results and of the label store.
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
        self._holdout: ClipDataset | None = None
        self._streams = Streams()
        self._places: dict[int, Place] = {}  # of the clips that updates have seen
        self._newest = -1  # stream of the newest batch

    def setup(self, stage: str) -> None:
        """Scan the folder once; unusable files are listed in the quarantine report."""
        if self.index is None:
            self.index = scan_videos(self.data, self.root, self.vlm.caption_file)
            cache = self.clips("train").cache
            if isinstance(cache, DecodedCache):
                cache.check_room(self.index.videos)

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
        quarantine = self.root / "quarantine.jsonl"
        return ClipDataset(
            videos, self.data, self.vlm, self.root, self.seed, rank, world, split, quarantine
        )

    def train_dataloader(self) -> DataLoader[Clip]:
        """Endless batches; the trainer stops after its budget of updates."""
        workers, clips = self.data.workers, self.clips("train")
        clips.streams = self._streams
        return _WatchedLoader(
            clips,
            batch_size=self.batch_size,
            num_workers=workers,
            worker_init_fn=leave_to_parent,
            collate_fn=collate_clips,
            prefetch_factor=2 if workers else None,
            persistent_workers=workers > 0,
            # Not with pin_memory: that starts a thread, which calls CUDA in the middle of a
            # capture. `pinned` does it here, while the device is busy with the update before.
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """The same held-out clips every time."""
        clips = self._held_out().fixed_clips(_HELD_OUT_CLIPS)
        # With a generator of its own the loader draws no seed from the one that training uses.
        generator = torch.Generator()
        return DataLoader(clips, self.batch_size, generator=generator)  # type: ignore[arg-type]

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Note where the clips come from; label windows that were left to this process's model."""
        place: Place | None = batch.pop("place", None)  # type: ignore[assignment]
        if place is not None:
            self._places[place.stream], self._newest = place, place.stream
        if "pending" in batch:
            if self._labeler is None:
                rank = self.trainer.global_rank if self.trainer else 0
                self._labeler = build_labeler(self.vlm, self.root, f"train-rank{rank}-batch")
            batch = label_pending(batch, self._labeler)
        return pinned(batch, self.trainer.strategy.root_device) if self.trainer else batch

    def state_dict(self) -> dict[str, Any]:
        """Where the streams of all ranks stand, for a checkpoint; called on all of them."""
        own = {
            "workers": max(1, self.data.workers),
            "newest": self._newest,
            "places": [[*place[:2], [*place.dropped]] for place in self._places.values()],
        }
        return {"ranks": of_all_ranks(own)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the clips continue where a checkpoint's run was; comes before the loader is made."""
        ranks, trainer = state_dict["ranks"], self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        now = max(1, self.data.workers)
        if (before := (len(ranks), ranks[0]["workers"])) != (world, now):
            # Behind the furthest draw, so that no stream repeats a clip.
            furthest = max((place[1] for own in ranks for place in own["places"]), default=-1)
            self._streams = Streams(fresh=furthest + 1)
            if rank == 0:
                log.info(
                    "the checkpoint is of %d processes with %d loader workers each, and this run "
                    "has %d with %d: every stream of clips goes on at draw %d, behind all draws "
                    "made so far, and clips in between are not seen",
                    *before, world, now, furthest + 1,
                )  # fmt: skip
            return
        own = ranks[rank]
        places = [Place(stream, draw, tuple(dropped)) for stream, draw, dropped in own["places"]]
        self._places = {place.stream: place for place in places}
        self._newest = own["newest"]
        self._streams = Streams((self._newest + 1) % now, tuple(places))

    def rollout_batch(self, count: int) -> Batch:
        """The first ``count`` held-out clips, for pictures."""
        batch = self.held_out_batch(count)
        return {key: value for key, value in batch.items() if value.ndim > 1}  # no counts

    def held_out_batch(self, count: int) -> Batch:
        """At most ``count`` held-out clips, from all held-out videos in turn."""
        batch: Batch = default_collate(self._held_out().fixed_clips(count))
        return batch

    def still_scenes(self, video: Tensor) -> Tensor:
        """The median picture of each of the held-out videos (N,), (N, H, W, 3) in [0, 1]."""
        clips = self._held_out()
        medians = {
            number: _spread_frames(clips, number, _MEDIAN_OF).median(dim=0).values
            for number in set(video.tolist())
        }
        return torch.stack([medians[number] for number in video.tolist()])

    def held_out_frames(self, per_video: int) -> Iterator[tuple[str, Tensor]]:
        """Class and evenly spread frames, (T, H, W, 3) uint8, of every held-out video."""
        clips = self._held_out()
        for number, info in enumerate(clips.videos):
            spread = 255.0 * _spread_frames(clips, number, per_video)
            yield info.label, spread.round().to(torch.uint8)

    def mean_picture(self) -> Tensor:
        """The mean picture of the training videos, (H, W, 3) in [0, 1]."""
        clips = self.clips("train")
        chosen = range(min(len(clips.videos), _PICTURED))
        return torch.stack([_spread_frames(clips, n, _MEAN_OF).mean(dim=0) for n in chosen]).mean(0)

    @property
    def fps(self) -> float:
        """Frames per second of a clip: the median over the held-out videos; 1 where none says."""
        known = [info.fps for info in self._held_out().videos if info.fps > 0]
        return float(np.median(known)) / self.data.frame_stride if known else 1.0

    @property
    def body_width(self) -> int:
        """Leading entries of a semantic vector that name the body; 0 where slots are not apart."""
        encoder = build_encoder(self.vlm)
        return encoder.dim_per_slot if isinstance(encoder, HashedSlots) else 0

    @property
    def direction(self) -> slice | None:
        """Entries of a semantic vector that turn round with its direction; None: not apart."""
        encoder = build_encoder(self.vlm)
        return encoder.direction if isinstance(encoder, HashedSlots | WithDirection) else None

    def _held_out(self) -> ClipDataset:
        """The held-out clips, with one labeler for the whole run."""
        if self._holdout is None:
            self._holdout = self.clips("holdout")
        return self._holdout


def _spread_frames(clips: ClipDataset, video: int, count: int) -> Tensor:
    """At most ``count`` frames of a video, evenly spread, (T, H, W, 3) in [0, 1]."""
    info = clips.videos[video]
    chosen = np.linspace(0, info.frames - 1, min(count, info.frames)).astype(int)
    return torch.from_numpy(clips.cache.read(info, chosen.tolist())) / 255.0


class _Chunks(IterableDataset[Batch]):
    """Endless batches of chunks drawn from replay.

    Args:
        replay: Drawn from.
        batch_size: Chunks of a batch.
        length: Entries of a chunk.
        rng: Source of the draws.
        ahead: The first batch, which an earlier process has drawn; None draws it too.
        joined: Join short episodes to chunks; otherwise only longer ones are drawn from.
    """

    def __init__(
        self,
        replay: Replay,
        batch_size: int,
        length: int,
        rng: np.random.Generator,
        ahead: Batch | None = None,
        joined: bool = True,
    ) -> None:
        self.replay, self.batch_size, self.length = replay, batch_size, length
        self.rng, self.newest, self.joined = rng, ahead, joined

    def __iter__(self) -> Iterator[Batch]:
        if self.newest is not None:
            yield self.newest
        while True:
            self.newest = chunk_batch(
                self.replay, self.rng, self.batch_size, self.length, joined=self.joined
            )
            yield self.newest


def chunk_batch(
    replay: Replay, rng: np.random.Generator, count: int, length: int, *, joined: bool = True
) -> Batch:
    """Draw ``count`` chunks of ``length`` entries; each starts a fresh sequence (facts 6.2).

    Args:
        replay: Drawn from.
        rng: Source of the draws.
        count: Number B of chunks.
        length: Entries T of each.
        joined: Join short episodes to chunks, whose ``episode`` then tells them apart.
    """
    arrays = replay.sample(rng, count, length, joined=joined)
    batch = {key: torch.from_numpy(value) for key, value in arrays.items()}
    batch["semantic"] = batch["semantic"].float()
    batch["is_first"][:, 0] = True
    episode = batch["is_first"].cumsum(dim=1) - 1
    if episode.any():
        batch["episode"] = episode
    return batch


class ReplayDataModule(L.LightningDataModule):
    """Chunks of the agent's own experience.

    The loader has no workers, because the collector writes between batches in this process.

    Lightning fetches one batch ahead. So the chunks of the next update were drawn before the last
    experience was written, from episodes that may be gone since: a checkpoint holds these chunks
    of every rank themselves, beside the state of the generator that draws all later ones.

    Args:
        replay: Drawn from.
        batch_size: Chunks of a batch.
        length: Entries of a chunk.
        seed: Of the draws.
        joined: Join short episodes to chunks; otherwise every chunk lies in one episode.
    """

    def __init__(
        self, replay: Replay, batch_size: int, length: int, seed: int, *, joined: bool = True
    ) -> None:
        super().__init__()
        self.replay, self.batch_size, self.length, self.seed = replay, batch_size, length, seed
        self.joined = joined
        self.rng = np.random.default_rng(seed)
        """Draws the chunks; its state is part of a checkpoint."""
        self._chunks: _Chunks | None = None
        self._ahead: Batch | None = None

    def train_dataloader(self) -> DataLoader[Batch]:
        """Endless batches; the trainer stops after its budget of updates."""
        self._chunks = _Chunks(
            self.replay, self.batch_size, self.length, self.rng, self._ahead, self.joined
        )
        return DataLoader(self._chunks, batch_size=None)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Lay the batch where the device can fetch it by itself."""
        return pinned(batch, self.trainer.strategy.root_device) if self.trainer else batch

    def state_dict(self) -> dict[str, Any]:
        """Generator and next chunks of all ranks, for a checkpoint; called on all of them."""
        own: dict[str, Any] = {"generator": self.rng.bit_generator.state}
        if self._chunks is not None:
            own["ahead"] = self._chunks.newest
        return {"ranks": of_all_ranks(own)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Draw on where a checkpoint's run was; comes before the loader is made."""
        rank = self.trainer.global_rank if self.trainer else 0
        own = state_dict["ranks"][rank]
        self.rng.bit_generator.state, self._ahead = own["generator"], own.get("ahead")

    def rollout_batch(self, count: int) -> Batch:
        """Chunks for pictures; shorter ones where no episode fills a chunk on its own."""
        rng, length = np.random.default_rng(self.seed), min(self.length, self.replay.longest)
        return chunk_batch(self.replay, rng, count, length, joined=False)
