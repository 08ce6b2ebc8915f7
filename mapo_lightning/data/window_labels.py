"""Which windows of frames label which frames, and how their labels get into clips and batches.

Windows lie on a grid that is fixed in each video or episode, so that overlapping clips share them.
With 4 frames per window, a stride of 4 and no offset::

    frame     0   1   2   3   4   5   6   7   8   9  10  11
    windows   [ . . . . . ]   [ . . . . . ]   [ . . . . . ]
    label     -   -   -   a   a   a   a   b   b   b   b   c
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import default_collate

from mapo_lightning.data.captions import caption_of
from mapo_lightning.data.reader import name_window, read_sizes
from mapo_lightning.data.video import Wanted
from mapo_lightning.data.video_info import VideoInfo
from mapo_lightning.semantics.labeler import Label, Labeler, WindowRequest
from mapo_lightning.types import Batch, Frames


class WindowGrid(NamedTuple):
    """Where windows lie in a sequence of frames; a window is named by its last frame."""

    frames: int
    """Frames in one window."""
    stride: int
    """Steps from the end of one window to the end of the next."""
    offset: int = 0
    """Steps from the end of a window to the first frame that it labels."""
    step: int = 1
    """Frames of the video per step."""

    @property
    def reach(self) -> int:
        """Frames of the video from the first frame of a window to its last."""
        return (self.frames - 1) * self.step

    @property
    def spacing(self) -> int:
        """Frames of the video from the end of one window to the end of the next."""
        return self.stride * self.step

    def window(self, end: int) -> range:
        """Frames of the window that ends at a frame."""
        return range(end - self.reach, end + 1, self.step)

    def ends(self, length: int) -> range:
        """Ends of all windows in ``length`` frames."""
        return range(self.reach, length, self.spacing)

    def is_end(self, frame: int) -> bool:
        """Whether a window ends at a frame."""
        return frame >= self.reach and (frame - self.reach) % self.spacing == 0

    def first_labelled(self, end: int) -> int:
        """First frame that the window ending at ``end`` labels."""
        return end + self.offset * self.step

    def end_for(self, frame: int) -> int | None:
        """End of the newest window that labels a frame; None before the first."""
        newest = (frame - self.offset * self.step - self.reach) // self.spacing
        return self.reach + newest * self.spacing if newest >= 0 else None

    def end_from(self, start: int) -> int:
        """End of the last window that begins at ``start`` or before."""
        return self.reach + start // self.spacing * self.spacing


class PendingWindow(NamedTuple):
    """A window without a label, on its way to the training process."""

    identity: str
    source: str
    frames: Frames
    """(window, h, w, 3) uint8."""
    times: NDArray[np.int64]
    """Frames of the clip that take its label."""
    row: int = 0
    """Number of the clip in its batch."""


class WindowFrames:
    """Decodes several windows of a video in one go, the first time one of them is needed.

    Args:
        info: The video.
        grid: Where windows lie.
        ends: Ends of the windows.
        size: Short side of their frames, in pixels.
        captioned: Windows are named by the sentence about them too: an edited one is a new window.
        clip: Frames, and their size, that are wanted in any case, so that they are decoded along.
    """

    def __init__(
        self,
        info: VideoInfo,
        grid: WindowGrid,
        ends: Sequence[int],
        size: int,
        captioned: bool = False,
        clip: Wanted | None = None,
    ) -> None:
        self.info, self.grid, self.ends, self.size = info, grid, ends, size
        self.captioned, self.clip = captioned, clip
        self.along: Frames | None = None
        """The frames of ``clip``; None as long as no window was needed."""
        self.indices = sorted({frame for end in ends for frame in grid.window(end)})
        self.frames: Frames | None = None

    def requests(self) -> list[WindowRequest]:
        """One question per window."""
        return [self._request(end) for end in self.ends]

    def _request(self, end: int) -> WindowRequest:
        window = self.grid.window(end)
        identity, source = name_window(self.info, window, self.size)
        if not self.captioned:
            return WindowRequest(identity, source, self.at(end))
        caption = caption_of(self.info, window)
        return WindowRequest(f"{identity} caption {caption}", source, self.at(end), caption)

    def at(self, end: int) -> Callable[[], Frames]:
        """Return a function that gives the frames of the window ending at a frame."""
        return lambda: self._window(end)

    def _window(self, end: int) -> Frames:
        if self.frames is None:
            wanted = [(self.indices, self.size), *([self.clip] if self.clip else [])]
            self.frames, *rest = read_sizes(self.info, wanted)
            self.along = rest[0] if rest else None
        rows = [self.indices.index(frame) for frame in self.grid.window(end)]
        return self.frames[rows]


def hold_labels(
    ends: Sequence[int | None], labels: Mapping[int, Label], width: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Hold each window's vector until the next: ((T, V), (T,)).

    Args:
        ends: End of the window that labels each frame of a clip; None before the first.
        labels: By the window's end; a window that is not among them stays null.
        width: Width V of a vector.
    """
    semantic, known = np.zeros((len(ends), width), np.float32), np.zeros(len(ends), np.bool_)
    for t, end in enumerate(ends):
        if end is not None and end in labels and labels[end].known:
            semantic[t], known[t] = labels[end].vector, True
    return semantic, known


def pending_windows(
    ends: Sequence[int | None],
    wanted: Sequence[int],
    requests: Sequence[WindowRequest],
    labels: Mapping[int, Label],
) -> list[PendingWindow]:
    """Fetch the frames of the windows of a clip that have no label yet.

    Args:
        ends: End of the window that labels each frame of the clip; None before the first.
        wanted: Ends of the clip's windows.
        requests: One per window of ``wanted``.
        labels: Those there are, by the window's end.
    """
    return [
        PendingWindow(r.identity, r.source, r.frames(), np.flatnonzero([e == end for e in ends]))
        for end, r in zip(wanted, requests, strict=True)
        if end not in labels
    ]


def count_labels(labels: Iterable[Label]) -> dict[str, int]:
    """Count labels by what became of their windows; keys as in ``mapo_lightning.types``."""
    names = ("asked", "hits", "null", "rejected", "corrected", "unanswered")
    counts = {f"vlm_{name}": 0 for name in names}
    for label in labels:
        counts["vlm_asked"] += label.asked
        counts["vlm_hits"] += label.answered and not label.asked
        counts["vlm_null"] += not label.known
        counts["vlm_rejected"] += label.rejected
        counts["vlm_corrected"] += label.corrected
        counts["vlm_unanswered"] += not label.answered
    return counts


def collate_clips(clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack clips to a batch.

    Their pending windows become one list, under ``pending``. The batch has the ``place`` of its
    last clip.
    """
    kept = ("pending", "place")
    rows = [{k: v for k, v in clip.items() if k not in kept} for clip in clips]
    batch: dict[str, Any] = default_collate(rows)
    if "place" in clips[-1]:
        batch["place"] = clips[-1]["place"]
    if any("pending" in clip for clip in clips):
        batch["pending"] = [
            window._replace(row=row)
            for row, clip in enumerate(clips)
            for window in clip.get("pending", ())
        ]
    return batch


def label_pending(batch: dict[str, Any], labeler: Labeler) -> Batch:
    """Label the pending windows of a batch, all at once, and fill their labels in.

    Args:
        batch: From `collate_clips`; its tensors are changed in place.
        labeler: Of this process.

    Returns:
        The batch without ``pending``.
    """
    pending: list[PendingWindow] = batch.pop("pending")
    requests = [WindowRequest(p.identity, p.source, lambda p=p: p.frames) for p in pending]  # type: ignore[misc]
    for window, label in zip(pending, labeler.label(requests), strict=True):
        times = torch.from_numpy(window.times)
        batch["semantic"][window.row, times] = torch.from_numpy(label.vector)
        batch["has_semantic"][window.row, times] = label.known
        for name, count in count_labels([label]).items():
            batch[name][window.row] += count
    return batch
