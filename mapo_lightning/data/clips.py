"""Training clips: frames of a video with a semantic vector for each, drawn without end."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from mapo_lightning.data.footage import read
from mapo_lightning.data.source import VideoFileError, VideoInfo
from mapo_lightning.data.windows import VideoDataConfig
from mapo_lightning.semantics.describer import VlmConfig
from mapo_lightning.semantics.labeler import (
    Label,
    Labeler,
    WindowRequest,
    build_labeler,
    semantic_dim,
)
from mapo_lightning.semantics.phrase import Phrase, Status
from mapo_lightning.types import Frames, VideoError

log = logging.getLogger(__name__)

Clip = dict[str, NDArray[Any]]
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
            self._labeler = build_labeler(self.vlm, self.root, writer)
        return self._labeler

    def __iter__(self) -> Iterator[Clip]:
        """Yield clips without end; see `clip_at` for their content.

        Raises:
            VideoError: Every video has failed.
        """
        worker = get_worker_info()
        stream = (self.seed, self.rank, 0 if worker is None else worker.id)
        usable, dropped, draw = list(range(len(self.videos))), 0, 0
        while usable:
            # A generator per draw: the n-th draw is the same however the earlier ones went.
            rng = np.random.default_rng((*stream, draw))
            draw += 1
            number = usable[int(rng.integers(len(usable)))]
            starts = self.videos[number].frames - self.data.span + 1
            try:
                if starts < 1:
                    detail = f"it has fewer than {self.data.span} frames"
                    raise VideoFileError(self.videos[number].path, "too_short", detail)
                clip = self.clip_at(number, int(rng.integers(starts)))
            except VideoFileError as error:
                usable.remove(number)
                dropped += 1
                self._report(error)
                continue
            yield clip | {"videos_dropped": np.array(dropped, np.int64)}
        raise VideoError(
            f"all {len(self.videos)} {self.split} videos failed while training; the log names "
            "each. Was the folder moved or unmounted?"
        )

    def clip_at(self, video: int, start: int) -> Clip:
        """Read one clip.

        Args:
            video: Index into ``videos``.
            start: First frame, from 0 to ``frames - data.span``.

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
        size = self.data.image_size
        obs = read(info, frames, (size, size))
        # Index 0 has no past inside the clip: the state starts afresh there.
        ends = [None, *(self._window_end(frame) for frame in frames[1:])]
        wanted = sorted({end for end in ends if end is not None})
        before = self.labeler.stats
        answers = self.labeler.label(self._requests(info, wanted))
        after = self.labeler.stats
        labels = dict(zip(wanted, answers, strict=True))
        semantic, known = self._per_frame(ends, labels)
        counts = {
            "vlm_windows": len(wanted),
            "vlm_asked": after.asked - before.asked,
            "vlm_hits": after.hits - before.hits,
            "vlm_null": sum(not label.known for label in answers),
            "vlm_rejected": after.rejected - before.rejected,
        }
        return {
            "obs": obs,
            "semantic": semantic,
            "has_semantic": known,
            "position": np.arange(length, dtype=np.int64),
            "is_first": np.arange(length) == 0,
            "video": np.array(video, np.int64),
        } | {name: np.array(count, np.int64) for name, count in counts.items()}

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
        reach = (self.vlm.window - 1) * self.data.frame_stride
        examples = []
        for video, start in self._fixed(count, reach + 1):
            info, grid = self.videos[video], self.vlm.stride * self.data.frame_stride
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
        step, grid = self.data.frame_stride, self.vlm.stride * self.data.frame_stride
        first = (self.vlm.window - 1) * step
        newest = (frame - self.vlm.offset * step - first) // grid
        return first + newest * grid if newest >= 0 else None

    def _requests(self, info: VideoInfo, ends: Sequence[int]) -> list[WindowRequest]:
        step, size = self.data.frame_stride, self.vlm.frame_size
        reach = (self.vlm.window - 1) * step
        fetch = _Windows(info, ends, reach, step, size)
        requests = []
        for end in ends:
            where = f"frames {end - reach}..{end} step {step}"
            identity = f"{info.fingerprint} {where} size {size}"
            requests.append(WindowRequest(identity, f"{info.path.name} {where}", fetch.at(end)))
        return requests

    def _per_frame(
        self, ends: Sequence[int | None], labels: dict[int, Label]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Hold each window's vector until the next: ((T, V), (T,))."""
        semantic = np.zeros((len(ends), self.semantic_dim), np.float32)
        known = np.zeros(len(ends), np.bool_)
        for t, end in enumerate(ends):
            if end is not None and labels[end].known:
                semantic[t], known[t] = labels[end].vector, True
        return semantic, known

    def _report(self, error: VideoFileError) -> None:
        log.warning("dropped from %s: %s", self.split, error)
        if self.quarantine is not None:
            row = {"path": str(error.path), "reason": error.reason, "detail": error.detail}
            self.quarantine.parent.mkdir(parents=True, exist_ok=True)
            with self.quarantine.open("a") as file:  # one short line: appended as a whole
                file.write(json.dumps(row) + "\n")


class _Windows:
    """Decodes all windows of a clip in one go, the first time one of them is needed."""

    def __init__(
        self, info: VideoInfo, ends: Sequence[int], reach: int, step: int, size: int
    ) -> None:
        self.info, self.reach, self.step, self.size = info, reach, step, size
        wanted = {f for end in ends for f in range(end - reach, end + 1, step)}
        self.indices = sorted(wanted)
        self.frames: Frames | None = None

    def at(self, end: int) -> Callable[[], Frames]:
        """Return a function that gives the window ending at a frame."""
        return lambda: self._window(end)

    def _window(self, end: int) -> Frames:
        if self.frames is None:
            self.frames = read(self.info, self.indices, self.size)
        rows = [self.indices.index(f) for f in range(end - self.reach, end + 1, self.step)]
        return self.frames[rows]
