"""Training clips: frames of a video and a semantic vector for each, in an endless stream."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from mapo_lightning.data.decoded_cache import FOLDER, DecodedCache
from mapo_lightning.data.frame_cache import FrameCache, MemoryCache
from mapo_lightning.data.prefetch import prefetch
from mapo_lightning.data.reader import numbers_in_file
from mapo_lightning.data.settings import VideoDataConfig
from mapo_lightning.data.video_info import VideoFileError, VideoInfo, printable
from mapo_lightning.data.window_labels import (
    WindowFrames,
    WindowGrid,
    count_labels,
    hold_labels,
    pending_windows,
)
from mapo_lightning.semantics.describer import StreamingDescriber
from mapo_lightning.semantics.factory import build_labeler, semantic_dim
from mapo_lightning.semantics.labeler import Label, Labeler, WindowRequest
from mapo_lightning.semantics.phrase import Phrase, Status
from mapo_lightning.semantics.settings import VlmConfig
from mapo_lightning.types import Frames, VideoError

log = logging.getLogger(__name__)

Clip = dict[str, Any]
"""One clip: the keys of a batch without the axis B; see the tables of ``mapo_lightning.types``."""


class LabelExample(NamedTuple):
    """One window of a video as the describer saw it, with the answer; for people to look at."""

    frames: Frames
    """(window, h, w, 3) uint8."""
    video: str
    """Name of the video's file."""
    start: int
    """First frame of the window in the video's file."""
    text: str
    """The describer's answer."""
    status: Status
    phrase: Phrase | None
    path: Path
    """The video's file."""
    last: int
    """Last frame of the window in the video's file."""
    label: str = ""
    """Class that the data set gives the video; empty where it gives none."""
    answered: bool = True
    """False if the describer gave no answer."""


class Place(NamedTuple):
    """Where a stream of clips stands: all that a resumed run needs to continue it."""

    stream: int
    """Number of the stream; each DataLoader worker draws one."""
    draw: int
    """Number of the last draw, from 0."""
    dropped: tuple[int, ...]
    """Videos that can no longer be read."""


class Streams(NamedTuple):
    """Where the streams of a rank begin."""

    first: int = 0
    """The stream that the first DataLoader worker draws; the others follow in turn."""
    places: tuple[Place, ...] = ()
    """Where the streams stand. Those that are not among them begin at ``fresh``."""
    fresh: int = 0
    """First draw of the streams that have no place."""


class ClipDataset(IterableDataset[Clip]):
    """Endless random clips of a set of videos, labelled on the way.

    A video is drawn uniformly, then a start uniformly. What is drawn depends on seed, rank,
    DataLoader worker and count alone; draws of a video that has failed are passed over. Labels come
    from windows on a grid fixed in each video, so that overlapping clips share them, and the
    describer is queried about each window once.

    Args:
        videos: Videos to draw from.
        data: Clip length, stride and size.
        vlm: Describer and windows; the label store lies in ``root / vlm.store``.
        root: The run's work folder.
        seed: Seed of the run.
        rank: Number of this process among ``world``; every rank draws its own clips.
        world: Number of processes.
        split: Name of the set, for log lines and the store's writer.
        quarantine: JSON lines file to which videos that fail in training are appended.

    Raises:
        VideoError: There is no video.
    """

    def __init__(
        self,
        videos: Sequence[VideoInfo],
        data: VideoDataConfig,
        vlm: VlmConfig,
        root: Path,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        split: str = "train",
        quarantine: Path | None = None,
    ) -> None:
        super().__init__()
        if not videos:
            raise VideoError(f"no videos to draw {split} clips from")
        if not 0 <= rank < world:
            raise ValueError(f"rank must lie in [0, {world}), got {rank}")
        self.videos, self.data, self.vlm = list(videos), data, vlm
        self.root, self.seed, self.rank, self.world = Path(root), seed, rank, world
        self.split, self.quarantine = split, quarantine
        self.streams = Streams()
        """Where `__iter__` begins; set it before the first clip is drawn."""
        window = vlm.window
        self.grid = WindowGrid(window.frames, window.stride, window.offset, data.frame_stride)
        self.semantic_dim = semantic_dim(vlm)
        self._labeler: Labeler | None = None
        self._cache: FrameCache | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is open here: a worker process opens its own."""
        return self.__dict__ | {"_labeler": None, "_cache": None}

    @property
    def cache(self) -> FrameCache:
        """What the frames of clips come from."""
        if self._cache is None:
            size = (self.data.image_size,) * 2
            # Decoded as large as windows need it, in every clip: then it is to the bit the same
            # whether its windows have labels already, or need none.
            beside = self.vlm.window.size
            if self.data.cache == "decoded":
                self._cache = DecodedCache(self.root / FOLDER, size, beside)
            else:
                self._cache = MemoryCache(self.videos, size, self.data.cache_mb, beside)
        return self._cache

    @property
    def labeler(self) -> Labeler:
        """The labeler of this process, built on first use."""
        if self._labeler is None:
            worker = get_worker_info()
            number = "main" if worker is None else f"worker{worker.id}"
            writer = f"{self.split}-rank{self.rank}-{number}"
            workers, server = 1 if worker is None else worker.num_workers, self.vlm.server
            share = replace(server, concurrency=max(1, server.concurrency // workers))
            vlm = replace(self.vlm, server=share)
            self._labeler = build_labeler(vlm, self.root, writer)
        return self._labeler

    def __iter__(self) -> Iterator[Clip]:
        """Yield clips without end; see `clip_at` for their content.

        Each has its `Place` as ``place``.

        Raises:
            VideoError: Every video has failed.
        """
        worker = get_worker_info()
        count, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        stream = (number + self.streams.first) % count
        place = {at.stream: at for at in self.streams.places}.get(
            stream, Place(stream, self.streams.fresh - 1, ())
        )
        dropped = dict.fromkeys(place.dropped)  # in their order
        draws = self._draws(stream, place.draw + 1, dropped)
        for (draw, number), fetch in prefetch(draws, self._clips_in_flight()):
            try:
                clip = fetch()
            except VideoFileError as error:
                if number not in dropped:
                    dropped[number] = None
                    self._report(error)
                continue
            yield clip | {
                "videos_dropped": np.array(len(dropped), np.int64),
                "place": Place(stream, draw, tuple(dropped)),
            }
        raise VideoError(
            f"all {len(self.videos)} {self.split} videos failed while training; the log names "
            "each. Was the folder moved or unmounted?"
        )

    def _draws(
        self, stream: int, draw: int, dropped: Collection[int]
    ) -> Iterator[tuple[tuple[int, int], Callable[[], Clip]]]:
        """Draw videos and starts without end, or until every video is dropped."""
        describer = self.labeler.describer
        defer = not describer.in_worker and not self.vlm.cached_only
        while len(dropped) < len(self.videos):
            # A generator per draw: the n-th draw is the same however the earlier ones went.
            rng = np.random.default_rng((self.seed, self.rank, stream, draw))
            number = int(rng.integers(len(self.videos)))
            starts = self.videos[number].frames - self.data.span + 1
            start = int(rng.integers(starts)) if starts >= 1 else -1
            if number not in dropped:
                yield (draw, number), partial(self.clip_at, number, start, defer)
            draw += 1

    def _clips_in_flight(self) -> int:
        """Clips that wait for labels side by side: enough to keep a server busy."""
        describer = self.labeler.describer
        windows = max(1, self.data.clip_length // self.grid.stride)
        if self.vlm.cached_only or not isinstance(describer, StreamingDescriber):
            return 1
        busy = 2 * describer.concurrency
        return 1 + -(-busy // windows)

    def clip_at(self, video: int, start: int, defer: bool = False) -> Clip:
        """Read one clip.

        Args:
            video: Index into ``videos``.
            start: First frame, from 0 to ``frames - data.span``.
            defer: Leave windows without a label to the training process, which labels those of a
                whole batch at once: here they are null and come along as ``pending``.

        Returns:
            ``obs``, ``semantic``, ``has_semantic``, ``position``, ``is_first``, ``video`` and the
            counts ``vlm_*`` as in the tables of ``mapo_lightning.types``, without the axis B; and
            ``pending``, a list of `PendingWindow`, if ``defer``.

        Raises:
            VideoFileError: The video can no longer be read.
        """
        info, length, stride = self.videos[video], self.data.clip_length, self.data.frame_stride
        frames = [start + t * stride for t in range(length)]
        if not 0 <= start <= info.frames - self.data.span:
            raise VideoFileError(info.path, "too_short", f"it has {info.frames} frames")
        # Index 0 has no past inside the clip: the state starts afresh there.
        ends = [None, *(self.grid.end_for(frame) for frame in frames[1:])]
        wanted = sorted({end for end in ends if end is not None})
        windows = self._windows(video, wanted, None if self.cache.keeps else frames)
        requests = windows.requests()
        lookup = self.labeler.lookup if defer else self.labeler.label
        answers: dict[int, Label | None] = dict(zip(wanted, lookup(requests), strict=True))
        labels = {end: label for end, label in answers.items() if label is not None}
        semantic, known = hold_labels(ends, labels, self.semantic_dim)
        counts = {"vlm_windows": len(wanted), **count_labels(labels.values())}
        if self.vlm.kind == "none":  # its null labels come from no store
            counts["vlm_hits"] = 0
        pending = pending_windows(ends, wanted, requests, labels) if defer else []
        # Where a window was decoded, the clip was too: each frame once, and the file opened once.
        obs = self.cache.read(info, frames) if windows.along is None else windows.along
        return {
            "obs": obs,
            "semantic": semantic,
            "has_semantic": known,
            "position": np.arange(length, dtype=np.int64),
            "is_first": np.arange(length) == 0,
            "video": np.array(video, np.int64),
            **{name: np.array(count, np.int64) for name, count in counts.items()},
            **({"pending": pending} if defer else {}),
        }

    def window_ends(self, video: int) -> range:
        """Ends of all windows of a video that its clips may need a label of."""
        return self.grid.ends(self.videos[video].frames)

    def window_requests(self, video: int, ends: Sequence[int]) -> list[WindowRequest]:
        """Questions about windows of a video; their frames are decoded together."""
        return self._windows(video, ends).requests()

    def _windows(
        self, video: int, ends: Sequence[int], clip: Sequence[int] | None = None
    ) -> WindowFrames:
        """Windows of a video, and the frames of a clip that are decoded along with them."""
        info, side = self.videos[video], self.data.image_size
        along = None if clip is None else (clip, (side, side))
        captioned = self.vlm.kind == "templates"
        return WindowFrames(info, self.grid, ends, self.vlm.window.size, captioned, along)

    def fixed_clips(self, count: int) -> list[Clip]:
        """Return the same clips on every call, spread over the videos; for validation.

        Args:
            count: How many; fewer only if the videos hold fewer distinct starts.

        Raises:
            VideoFileError: A video can no longer be read.
        """
        return [self.clip_at(video, start) for video, start in self._fixed(count, self.data.span)]

    def label_examples(self, count: int) -> list[LabelExample]:
        """Return windows spread over the videos, with their labels.

        Args:
            count: How many, at most.

        Raises:
            VideoFileError: A video can no longer be read.
        """
        examples = []
        for video, start in self._fixed(count, self.grid.reach + 1):
            info, end = self.videos[video], self.grid.end_from(start)
            request = self.window_requests(video, [end])[0]
            own = numbers_in_file(info, self.grid.window(end))
            label = self.labeler.label([request])[0]
            examples.append(
                LabelExample(
                    frames=request.frames(),
                    video=printable(info.path.name),
                    start=own[0],
                    text=label.text,
                    status=label.status,
                    phrase=label.phrase,
                    path=info.path,
                    last=own[-1],
                    label=info.label,
                    answered=label.answered,
                )
            )
        return examples

    def _fixed(self, count: int, span: int) -> list[tuple[int, int]]:
        """(video, start) pairs: all videos in turn, the starts evenly spread in each."""
        rounds = -(-count // len(self.videos))
        pairs: dict[tuple[int, int], None] = {}
        for turn in range(rounds):
            for video, info in enumerate(self.videos):
                starts = max(1, info.frames - span + 1)
                pairs[video, (2 * turn + 1) * starts // (2 * rounds)] = None
        return list(pairs)[:count]

    def _report(self, error: VideoFileError) -> None:
        log.warning("dropped from %s: %s", self.split, error)
        if self.quarantine is not None:
            row = {"path": printable(error.path), "reason": error.reason, "detail": error.detail}
            self.quarantine.parent.mkdir(parents=True, exist_ok=True)
            with self.quarantine.open("a") as file:  # one short line: appended as a whole
                file.write(json.dumps(row) + "\n")
