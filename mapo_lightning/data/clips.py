"""Training clips: frames of a video with a semantic vector for each, drawn without end."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from mapo_lightning.data.prefetch import (
    WindowFrames,
    count_labels,
    hold_labels,
    pend,
    run_ahead,
)
from mapo_lightning.data.reader import name_window, read
from mapo_lightning.data.settings import VideoDataConfig
from mapo_lightning.data.video_info import VideoFileError, VideoInfo
from mapo_lightning.semantics.describer import StreamingDescriber
from mapo_lightning.semantics.factory import build_labeler, semantic_dim
from mapo_lightning.semantics.labeler import Label, Labeler, WindowRequest
from mapo_lightning.semantics.phrase import Phrase, Status
from mapo_lightning.semantics.settings import VlmConfig
from mapo_lightning.types import Frames, VideoError

log = logging.getLogger(__name__)

Clip = dict[str, Any]
"""One clip: the batch keys of `types` without B, ``video``, and the counts ``vlm_*``."""


class LabelExample(NamedTuple):
    """One window as the describer saw it, with its answer; for galleries."""

    frames: Frames
    """(window, h, w, 3) uint8."""
    video: str
    start: int
    """First frame of the window in the video."""
    text: str
    status: Status
    phrase: Phrase | None
    path: Path
    """Where the video lies."""
    last: int
    """Last frame of the window in the video."""
    label: str = ""
    """Class that the data set gives the video; empty where it gives none."""


class ClipDataset(IterableDataset[Clip]):
    """Endless random clips of a set of videos, labelled on the way.

    A video is drawn uniformly, then a start uniformly. What is drawn depends on seed, rank,
    DataLoader worker and count alone. Labels come from windows on a grid fixed in each video, so
    that overlapping clips share them, and each window is asked about once.

    Args:
        videos: What to draw from.
        data: Clip length, stride and size.
        vlm: Who labels; the store lies in ``root / vlm.store``.
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
        self.semantic_dim = semantic_dim(vlm)
        self._labeler: Labeler | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Travel to a worker process without what is open here."""
        return self.__dict__ | {"_labeler": None}

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

        Raises:
            VideoError: Every video has failed.
        """
        usable, dropped = list(range(len(self.videos))), 0
        for number, fetch in run_ahead(self._draws(usable), self._clips_in_flight()):
            try:
                clip = fetch()
            except VideoFileError as error:
                if number in usable:
                    usable.remove(number)
                    dropped += 1
                    self._report(error)
                continue
            yield clip | {"videos_dropped": np.array(dropped, np.int64)}
        raise VideoError(
            f"all {len(self.videos)} {self.split} videos failed while training; the log names "
            "each. Was the folder moved or unmounted?"
        )

    def _draws(self, usable: list[int]) -> Iterator[tuple[int, Callable[[], Clip]]]:
        """Draw videos and starts without end, or until no video is usable."""
        worker = get_worker_info()
        stream = (self.seed, self.rank, 0 if worker is None else worker.id)
        describer, draw = self.labeler.describer, 0
        defer = not describer.in_worker and not self.vlm.cached_only
        while usable:
            # A generator per draw: the n-th draw is the same however the earlier ones went.
            rng = np.random.default_rng((*stream, draw))
            draw += 1
            number = usable[int(rng.integers(len(usable)))]
            starts = self.videos[number].frames - self.data.span + 1
            start = int(rng.integers(starts)) if starts >= 1 else -1
            yield number, partial(self.clip_at, number, start, defer)

    def _clips_in_flight(self) -> int:
        """Clips that wait for labels side by side: enough to keep a server busy."""
        describer, windows = (
            self.labeler.describer,
            max(1, self.data.clip_length // self.vlm.window.stride),
        )
        if self.vlm.cached_only or not isinstance(describer, StreamingDescriber):
            return 1
        busy = 2 * describer.concurrency
        return 1 + -(-busy // windows)

    def clip_at(self, video: int, start: int, defer: bool = False) -> Clip:
        """Read one clip.

        Args:
            video: Index into ``videos``.
            start: First frame, from 0 to ``frames - data.span``.
            defer: Leave questions to the training process, which asks for a batch at once: windows
                that nobody has labelled are null and come along as ``pending``.

        Returns:
            ``obs`` (T, S, S, 3) uint8; ``semantic`` (T, V) float32, zero where unknown;
            ``has_semantic`` (T,) bool; ``position`` (T,) int64, 0..T-1; ``is_first`` (T,) bool,
            true at 0; ``video`` int64, its index in ``videos``, where its label stands; and int64
            counts of this clip's windows: ``vlm_windows`` all of them,
            ``vlm_asked`` those the describer was asked about, ``vlm_hits`` those known before,
            ``vlm_null`` those in which nothing significant happens, that cannot be read or are
            rejected, and ``vlm_rejected`` those whose label a person has rejected.

        Raises:
            VideoFileError: The video cannot be read any more.
        """
        info, length, stride = self.videos[video], self.data.clip_length, self.data.frame_stride
        frames = [start + t * stride for t in range(length)]
        if not 0 <= start <= info.frames - self.data.span:
            raise VideoFileError(info.path, "too_short", f"it has {info.frames} frames")
        size = self.data.image_size
        obs = read(info, frames, (size, size))
        # Index 0 has no past inside the clip: the state starts afresh there.
        ends = [None, *(self._window_end(frame) for frame in frames[1:])]
        wanted = sorted({end for end in ends if end is not None})
        requests = self._requests(info, wanted)
        lookup = self.labeler.lookup if defer else self.labeler.label
        answers: dict[int, Label | None] = dict(zip(wanted, lookup(requests), strict=True))
        labels = {end: label for end, label in answers.items() if label is not None}
        semantic, known = hold_labels(ends, labels, self.semantic_dim)
        counts = count_labels(len(wanted), labels.values(), self.vlm.kind != "none")
        return {
            "obs": obs,
            "semantic": semantic,
            "has_semantic": known,
            "position": np.arange(length, dtype=np.int64),
            "is_first": np.arange(length) == 0,
            "video": np.array(video, np.int64),
            **counts,
            **({"pending": pend(ends, wanted, requests, labels)} if defer else {}),
        }

    def window_ends(self, video: int) -> range:
        """Last frames of all windows of a video that clips may ask about."""
        step = self.data.frame_stride
        first, grid = (self.vlm.window.frames - 1) * step, self.vlm.window.stride * step
        return range(first, self.videos[video].frames, grid)

    def window_requests(self, video: int, ends: Sequence[int]) -> list[WindowRequest]:
        """Questions about windows of a video, which are decoded together."""
        return self._requests(self.videos[video], ends)

    def fixed_clips(self, count: int) -> list[Clip]:
        """Return the same clips on every call, spread over the videos; for validation.

        Args:
            count: How many; fewer only if the videos hold fewer distinct starts.

        Raises:
            VideoFileError: A video cannot be read any more.
        """
        return [self.clip_at(video, start) for video, start in self._fixed(count, self.data.span)]

    def label_examples(self, count: int) -> list[LabelExample]:
        """Return windows spread over the videos, with their labels.

        Args:
            count: How many, at most.

        Raises:
            VideoFileError: A video cannot be read any more.
        """
        reach = (self.vlm.window.frames - 1) * self.data.frame_stride
        examples = []
        for video, start in self._fixed(count, reach + 1):
            info, grid = self.videos[video], self.vlm.window.stride * self.data.frame_stride
            request = self._requests(info, [reach + start // grid * grid])[0]
            label = self.labeler.label([request])[0]
            first = start // grid * grid
            examples.append(
                LabelExample(
                    frames=request.frames(),
                    video=info.path.name,
                    start=first,
                    text=label.text,
                    status=label.status,
                    phrase=label.phrase,
                    path=info.path,
                    last=first + reach,
                    label=info.label,
                )
            )
        return examples

    def _fixed(self, count: int, span: int) -> list[tuple[int, int]]:
        """(video, start) pairs: every video once, evenly spread starts, then once more ..."""
        rounds = -(-count // len(self.videos))
        pairs: dict[tuple[int, int], None] = {}
        for turn in range(rounds):
            for video, info in enumerate(self.videos):
                starts = max(1, info.frames - span + 1)
                pairs[video, (2 * turn + 1) * starts // (2 * rounds)] = None
        return list(pairs)[:count]

    def _window_end(self, frame: int) -> int | None:
        """Last frame of the newest window that may label a frame; None before the first."""
        step, grid = self.data.frame_stride, self.vlm.window.stride * self.data.frame_stride
        first = (self.vlm.window.frames - 1) * step
        newest = (frame - self.vlm.window.offset * step - first) // grid
        return first + newest * grid if newest >= 0 else None

    def _requests(self, info: VideoInfo, ends: Sequence[int]) -> list[WindowRequest]:
        step, size = self.data.frame_stride, self.vlm.window.size
        reach = (self.vlm.window.frames - 1) * step
        fetch = WindowFrames(info, ends, reach, step, size)
        requests = []
        for end in ends:
            names = name_window(info, range(end - reach, end + 1, step), size)
            requests.append(WindowRequest(*names, fetch.at(end)))
        return requests

    def _report(self, error: VideoFileError) -> None:
        log.warning("dropped from %s: %s", self.split, error)
        if self.quarantine is not None:
            row = {"path": str(error.path), "reason": error.reason, "detail": error.detail}
            self.quarantine.parent.mkdir(parents=True, exist_ok=True)
            with self.quarantine.open("a") as file:  # one short line: appended as a whole
                file.write(json.dumps(row) + "\n")
