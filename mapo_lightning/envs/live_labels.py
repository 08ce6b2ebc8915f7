"""Labels what environments show while they are played: at once, or whenever the answer arrives.

Late answers never make an environment wait. Acting uses the newest answer so far; a replay entry is
written without a label and completed when the answer about its own window arrives. When the queue
is full, a window is skipped: its label is null, and it is counted.

Shapes: N environments side by side, H W image, V semantic vector.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mapo_lightning.data.replay import EntryId, Replay
from mapo_lightning.data.window_labels import WindowGrid
from mapo_lightning.semantics.labeler import Label, Labeler
from mapo_lightning.semantics.settings import CollectConfig, WindowConfig
from mapo_lightning.types import POSITIONS, DescriberError, Frames

log = logging.getLogger(__name__)

Step = dict[str, NDArray[Any]]
"""One step of N environments; keys as in ``mapo_lightning.types``, leading axis (N,)."""

_BATCH = 16  # windows per call of the describer


@dataclass(eq=False)
class Window:
    """One query about one environment, and the replay entries that get its answer."""

    due: int
    """Index in the episode of the first frame that it labels."""
    label: Label | None = None
    """None until the answer arrives."""
    entries: list[EntryId] = field(default_factory=list)
    """Entries written before the answer arrived."""


class LateAnswers:
    """Queue of windows that a thread labels in the background.

    The thread starts with the first window; from then on only it uses the labeler.

    Args:
        labeler: Labels the windows; closed by the thread.
        source: For people: where the windows come from.
        limit: Largest number of windows without an answer.
    """

    def __init__(self, labeler: Labeler, source: str, limit: int) -> None:
        self.labeler, self.source, self.limit = labeler, source, limit
        self.waiting = 0
        """Windows without an answer."""
        self._change = threading.Condition()
        self._queue: deque[tuple[Window, Frames]] = deque()
        self._answered: list[tuple[Window, Label]] = []
        self._error: Exception | None = None
        self._stopping = False
        self._thread: threading.Thread | None = None

    def put(self, window: Window, frames: Frames) -> bool:
        """Queue a window; returns False if the queue is full."""
        with self._change:
            if self.waiting >= self.limit:
                return False
            if self._thread is None:
                # A daemon, so that a describer that hangs does not keep the program from ending.
                self._thread = threading.Thread(target=self._work, name="labels", daemon=True)
                self._thread.start()
            self.waiting += 1
            self._queue.append((window, frames))
            self._change.notify()
        return True

    def collect(self) -> list[Window]:
        """Return the windows answered since the last call.

        Raises:
            Exception: What the labeler raised in the thread.
        """
        with self._change:
            if self._error is not None:
                raise self._error
            answered, self._answered = self._answered, []
            self.waiting -= len(answered)
        for window, label in answered:
            window.label = label
        return [window for window, _ in answered]

    def stop(self, seconds: float) -> None:
        """Take no more windows, and wait at most this long for the answers still to come."""
        with self._change:
            self._stopping = True
            self._change.notify()
        if self._thread is not None:
            self._thread.join(seconds)

    def _work(self) -> None:
        try:
            while True:
                with self._change:
                    self._change.wait_for(lambda: self._queue or self._stopping)
                    count = min(len(self._queue), _BATCH)
                    batch = [self._queue.popleft() for _ in range(count)]
                if not batch:
                    return
                labels = self.labeler.label_frames([frames for _, frames in batch], self.source)
                with self._change:
                    windows = (window for window, _ in batch)
                    self._answered += zip(windows, labels, strict=True)
        except Exception as error:  # raised again in the main thread, whatever it is
            with self._change:
                self._error = error
        finally:
            self.labeler.close()  # SQLite's connections belong to the thread that made them


class LiveLabeler:
    """Labels the newest frames of N environments and holds each label until the next one.

    Windows lie on a grid that begins with the episode, as in videos: with 4 frames per window and a
    query every 4 steps, windows end at the frames 3, 7, 11, ... Source: facts O2, O4, O6, O7, O9.

    Args:
        labeler: Labels the windows.
        window: How many frames the describer sees, and which frame they label.
        collect: How often it is queried, and how long answers are waited for.
        envs: Number N of environments.
        source: For people: where the windows come from.
        late: Label in a background thread; otherwise every step waits for its labels.
    """

    def __init__(
        self,
        labeler: Labeler,
        window: WindowConfig,
        collect: CollectConfig,
        envs: int,
        source: str,
        late: bool = False,
    ) -> None:
        self.labeler, self.collect, self.source = labeler, collect, source
        self.grid = WindowGrid(window.frames, collect.every, window.offset)
        self.recent: list[deque[Frames]] = [deque(maxlen=self.grid.frames) for _ in range(envs)]
        self.age = np.full(envs, -1, np.int64)
        self.skipped = 0
        """Windows whose label is null because the queue was full or no answer came in time."""
        self._late = LateAnswers(labeler, source, collect.queue) if late else None
        self._nothing = Label(np.zeros(labeler.semantic_dim, np.float32), False, "", "null", None)
        # Windows of the current episode, oldest first, from the newest one that has an answer.
        self._windows: list[list[Window]] = [[] for _ in range(envs)]
        self._to_complete: list[Window] = []

    @property
    def waiting(self) -> int:
        """Windows whose answer has not arrived yet."""
        return 0 if self._late is None else self._late.waiting

    def update(
        self,
        obs: dict[str, NDArray[np.uint8]],
        is_first: NDArray[np.bool_],
        live: NDArray[np.bool_] | None = None,
    ) -> Step:
        """Take in the newest frames, query where a window ends, and return the labels to act on.

        Args:
            obs: ``image`` and perhaps ``label_image``, (N, H, W, 3).
            is_first: Environments whose episode has just begun, (N,).
            live: Environments that still count, (N,); the others keep their labels, and nothing is
                asked about them. None: all count.

        Returns:
            ``semantic`` (N, V), ``has_semantic`` (N,) and ``position`` (N,).

        Raises:
            DescriberError: The describer failed, now or in the thread since the last call.
        """
        frames = obs.get("label_image", obs["image"])
        ended: list[tuple[Window, Frames]] = []
        for n, first in enumerate(is_first):
            if live is not None and not live[n]:
                continue
            if first:
                self.recent[n].clear()
                self._windows[n].clear()
                self.age[n] = -1
            self.age[n] += 1
            self.recent[n].append(frames[n].copy())
            age = int(self.age[n])
            if self.grid.is_end(age):
                window = Window(self.grid.first_labelled(age))
                self._windows[n].append(window)
                ended.append((window, np.stack(self.recent[n])))
        self._query(ended)
        newest = [self._newest_answer(n) or self._nothing for n in range(len(self._windows))]
        return _stacked(newest) | {"position": self.age % POSITIONS}

    def to_store(self) -> Step:
        """Return ``semantic`` and ``has_semantic`` as replay should store them now.

        They are those of each entry's own window: null if its answer has not arrived yet.
        """
        own = [self._own(n) for n in range(len(self._windows))]
        return _stacked([(w and w.label) or self._nothing for w in own])

    def note_entry(self, env: int, entry: EntryId) -> None:
        """Remember the replay entry of an environment's newest frame, to complete it later."""
        own = self._own(env)
        if own is not None and own.label is None:
            own.entries.append(entry)

    def complete(self, replay: Replay) -> None:
        """Write the answers that have arrived since the last call into their replay entries."""
        for window in self._to_complete:
            label = window.label or self._nothing
            for entry in window.entries:
                replay.set_semantic(entry, label.vector, label.known)
        self._to_complete.clear()

    def state(self) -> dict[str, Any]:
        """Frames, ages and labels of the episodes in progress, as a checkpoint may hold them.

        Answers that have not arrived yet are not part of it: after resuming, these windows are
        null.
        """
        return {
            "recent": [torch.from_numpy(np.stack(frames)) for frames in self.recent],
            "age": self.age.tolist(),
            "skipped": self.skipped,
            "windows": [
                [
                    [window.due, torch.from_numpy(label.vector), bool(label.known)]
                    for window in windows
                    if (label := window.label or self._nothing)
                ]
                for windows in self._windows
            ],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state` returned."""
        for frames, stored in zip(self.recent, state["recent"], strict=True):
            frames.clear()
            frames.extend(stored.numpy())
        self.age = np.array(state["age"], np.int64)
        self.skipped = state["skipped"]
        self._windows = [
            [
                Window(due, self._nothing._replace(vector=vector.numpy(), known=known))
                for due, vector, known in windows
            ]
            for windows in state["windows"]
        ]

    def close(self, replay: Replay | None = None) -> None:
        """Wait ``collect.drain`` seconds for the answers still to come, then give up on the rest.

        A describer that fails now costs a warning and these labels; any other error is raised.
        """
        if self._late is None:
            self.labeler.close()
            return
        self._late.stop(self.collect.drain)
        cause = (
            "the describer was slower than the environments. Raise vlm.collect.every or "
            "vlm.collect.queue, or use more servers"
        )
        try:
            self._to_complete += self._late.collect()
        except DescriberError as error:  # costs nothing but these labels
            cause = "the describer failed"
            log.warning("the labels still to come are lost: %s", error)
        if replay is not None:
            self.complete(replay)
        self.skipped += self._late.waiting
        if self.skipped:
            log.warning(
                "%d windows of %s have no label and count as null: %s",
                self.skipped,
                self.source,
                cause,
            )

    def _newest_answer(self, env: int) -> Label | None:
        """Label to act on. Answers may overtake each other, so older windows are dropped."""
        windows = self._windows[env]
        answered = [
            i for i, w in enumerate(windows) if w.due <= self.age[env] and w.label is not None
        ]
        del windows[: answered[-1] if answered else 0]
        return windows[0].label if answered else None

    def _own(self, env: int) -> Window | None:
        """Window that labels the newest frame of an environment."""
        due = [w for w in self._windows[env] if w.due <= self.age[env]]
        return due[-1] if due else None

    def _query(self, ended: list[tuple[Window, Frames]]) -> None:
        if self._late is None:
            windows = [frames for _, frames in ended]
            labels = self.labeler.label_frames(windows, self.source) if windows else []
            for (window, _), label in zip(ended, labels, strict=True):
                window.label = label
            return
        self._to_complete += [window for window in self._late.collect() if window.entries]
        for window, frames in ended:
            if not self._late.put(window, frames):
                window.label = self._nothing
                self.skipped += 1


def _stacked(labels: list[Label]) -> Step:
    return {
        "semantic": np.stack([label.vector for label in labels]),
        "has_semantic": np.array([label.known for label in labels]),
    }
