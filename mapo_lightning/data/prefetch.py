"""Work done ahead: clips in flight side by side, and questions kept for the training process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import default_collate

from mapo_lightning.data.reader import read
from mapo_lightning.data.video_info import VideoInfo
from mapo_lightning.semantics.labeler import Label, Labeler, WindowRequest
from mapo_lightning.types import Batch, Frames

K = TypeVar("K")
T = TypeVar("T")


class PendingWindow(NamedTuple):
    """A window that nobody has labelled yet, on its way to the training process."""

    identity: str
    source: str
    frames: Frames
    """(window, h, w, 3) uint8."""
    times: NDArray[np.int64]
    """Frames of the clip that take its label."""
    row: int = 0
    """Number of the clip in its batch."""


class WindowFrames:
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


def run_ahead(
    jobs: Iterable[tuple[K, Callable[[], T]]], ahead: int
) -> Iterator[tuple[K, Callable[[], T]]]:
    """Run jobs side by side and hand them over in their order.

    Args:
        jobs: Name and work; drawn as they are needed.
        ahead: Jobs in flight; 1 runs each in this thread when its result is called for.

    Yields:
        The name, and what returns the job's result or raises its error.
    """
    if ahead <= 1:
        yield from jobs
        return
    pool, waiting, source = ThreadPoolExecutor(ahead, "clip"), deque[Any](), iter(jobs)
    try:
        while True:
            for name, job in source:
                waiting.append((name, pool.submit(job)))
                if len(waiting) >= ahead:
                    break
            if not waiting:
                return
            name, future = waiting.popleft()
            yield name, future.result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def hold_labels(
    ends: Sequence[int | None], labels: Mapping[int, Label], width: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Hold each window's vector until the next: ((T, V), (T,)).

    Args:
        ends: Last frame of the window that labels each frame of a clip; None before the first.
        labels: By the window's last frame; what is not there yet stays null.
        width: Of a vector.
    """
    semantic, known = np.zeros((len(ends), width), np.float32), np.zeros(len(ends), np.bool_)
    for t, end in enumerate(ends):
        if end is not None and end in labels and labels[end].known:
            semantic[t], known[t] = labels[end].vector, True
    return semantic, known


def pend(
    ends: Sequence[int | None],
    wanted: Sequence[int],
    requests: Sequence[WindowRequest],
    labels: Mapping[int, Label],
) -> list[PendingWindow]:
    """Fetch the frames of the windows of a clip that have no label yet."""
    return [
        PendingWindow(r.identity, r.source, r.frames(), np.flatnonzero([e == end for e in ends]))
        for end, r in zip(wanted, requests, strict=True)
        if end not in labels
    ]


def count_labels(windows: int, labels: Collection[Label], stored: bool) -> dict[str, Any]:
    """Count the windows of a clip; the keys are those of a clip."""
    counts = {
        "vlm_windows": windows,
        "vlm_asked": sum(label.asked for label in labels),
        "vlm_hits": sum(x.answered and not x.asked for x in labels) if stored else 0,
        "vlm_null": sum(not label.known for label in labels),
        "vlm_rejected": sum(label.rejected for label in labels),
    }
    return {name: np.array(count, np.int64) for name, count in counts.items()}


def collate_clips(clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack clips to a batch; what is pending becomes one list, under ``pending``."""
    rows = [{k: v for k, v in clip.items() if k != "pending"} for clip in clips]
    batch: dict[str, Any] = default_collate(rows)
    if any("pending" in clip for clip in clips):
        batch["pending"] = [
            window._replace(row=row)
            for row, clip in enumerate(clips)
            for window in clip.get("pending", ())
        ]
    return batch


def settle(batch: dict[str, Any], labeler: Labeler) -> Batch:
    """Label what is pending in a batch, all of it at once, and fill it in.

    Args:
        batch: From `collate_clips`; its tensors are changed in place.
        labeler: Of this process.
    """
    pending: list[PendingWindow] = batch.pop("pending")
    requests = [WindowRequest(p.identity, p.source, lambda p=p: p.frames) for p in pending]  # type: ignore[misc]
    for window, label in zip(pending, labeler.label(requests), strict=True):
        times = torch.from_numpy(window.times)
        batch["semantic"][window.row, times] = torch.from_numpy(label.vector)
        batch["has_semantic"][window.row, times] = label.known
        batch["vlm_asked"][window.row] += label.asked
        batch["vlm_hits"][window.row] += label.answered and not label.asked
        batch["vlm_null"][window.row] += not label.known
        batch["vlm_rejected"][window.row] += label.rejected
    return batch
