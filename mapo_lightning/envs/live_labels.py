"""Labels of what environments show while they play: at once, or whenever the answer comes.

Late answers never make an environment wait. Acting uses the newest answer there is; a replay entry
is written without a label and completed when the answer about its own window arrives. A window that
finds the queue full is skipped: it counts as null and is counted.

Shapes: N environments side by side, H W image, V semantic vector.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mapo_lightning.data.replay import EntryId, Replay
from mapo_lightning.semantics.labeler import Label, Labeler
from mapo_lightning.semantics.settings import CollectConfig, WindowConfig
from mapo_lightning.types import POSITIONS, Frames

log = logging.getLogger(__name__)

Step = dict[str, NDArray[Any]]
"""One step of N environments; keys as in ``mapo_lightning.types``, leading axis (N,)."""

_BATCH = 16  # windows that one call of a describer is given


@dataclass(eq=False)
class Window:
    """One question about one environment, and the replay entries that its answer belongs to."""

    due: int
    """Index in the episode of the first frame that it labels."""
    label: Label | None = None
    """None until the answer is there."""
    entries: list[EntryId] = field(default_factory=list)
    """Written before the answer came."""


class LateAnswers:
    """Asks in a thread of its own; whoever asks never waits.

    The thread starts with the first question and alone uses the labeler from then on.

    Args:
        labeler: Who is asked; closed by the thread.
        source: For people: where the windows come from.
        limit: Windows that may wait for an answer at once.
    """

    def __init__(self, labeler: Labeler, source: str, limit: int) -> None:
        self.labeler, self.source, self.limit = labeler, source, limit
        self.waiting = 0
        """Windows without an answer so far."""
        self._change = threading.Condition()
        self._asked: deque[tuple[Window, Frames]] = deque()
        self._answered: list[tuple[Window, Label]] = []
        self._error: Exception | None = None
        self._stopping = False
        self._thread: threading.Thread | None = None

    def ask(self, window: Window, frames: Frames) -> bool:
        """Put a window into the queue; returns False where the queue is full."""
        with self._change:
            if self.waiting >= self.limit:
                return False
            if self._thread is None:
                # A daemon: a describer that hangs must not keep the program from ending.
                self._thread = threading.Thread(target=self._work, name="labels", daemon=True)
                self._thread.start()
            self.waiting += 1
            self._asked.append((window, frames))
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
        """Take no more questions, and wait at most so long for the answers under way."""
        with self._change:
            self._stopping = True
            self._change.notify()
        if self._thread is not None:
            self._thread.join(seconds)

    def _work(self) -> None:
        try:
            while True:
                with self._change:
                    self._change.wait_for(lambda: self._asked or self._stopping)
                    count = min(len(self._asked), _BATCH)
                    batch = [self._asked.popleft() for _ in range(count)]
                if not batch:
                    return
                labels = self.labeler.label_frames([frames for _, frames in batch], self.source)
                with self._change:
                    windows = (window for window, _ in batch)
                    self._answered += zip(windows, labels, strict=True)
        except Exception as error:  # whatever it is, the main thread raises it
            with self._change:
                self._error = error
        finally:
            self.labeler.close()  # SQLite's connections belong to the thread that made them


class SemanticTracker:
    """Labels the newest frames of N environments and holds each label until the next one.

    Windows lie on a grid from the start of an episode, as in videos: with a window and a grid of 4,
    the frames 3, 7, 11, ... end one. Source: facts O2, O4, O6, O7, O9.

    Args:
        labeler: Who is asked.
        window: How many frames the describer sees, and which frame they label.
        collect: How often it is asked, and how long answers are waited for.
        envs: Number N of environments.
        source: For people: where the windows come from.
        late: Ask in a thread of its own; otherwise every label is there at once.
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
        self.labeler, self.window, self.collect = labeler, window, collect
        self.source = source
        self.recent: list[deque[Frames]] = [deque(maxlen=window.frames) for _ in range(envs)]
        self.age = np.full(envs, -1, np.int64)
        self.skipped = 0
        """Windows that count as null because nobody could be asked, or answered, in time."""
        self._late = LateAnswers(labeler, source, collect.queue) if late else None
        self._nothing = Label(np.zeros(labeler.semantic_dim, np.float32), False, "", "null", None)
        # Of this episode, oldest first, from the newest one that has an answer.
        self._windows: list[list[Window]] = [[] for _ in range(envs)]
        self._to_complete: list[Window] = []

    @property
    def waiting(self) -> int:
        """Windows whose answer has not come yet."""
        return 0 if self._late is None else self._late.waiting

    def update(self, obs: dict[str, NDArray[np.uint8]], is_first: NDArray[np.bool_]) -> Step:
        """Take in the newest frames, ask where a window ends, and return the labels to act on.

        Args:
            obs: ``image`` and perhaps ``label_image``, (N, H, W, 3).
            is_first: Environments whose episode has just begun, (N,).

        Returns:
            ``semantic`` (N, V), ``has_semantic`` (N,) and ``position`` (N,).

        Raises:
            DescriberError: The describer failed, now or in the thread since the last call.
        """
        frames = obs.get("label_image", obs["image"])
        ended: list[tuple[Window, Frames]] = []
        for n, first in enumerate(is_first):
            if first:
                self.recent[n].clear()
                self._windows[n].clear()
                self.age[n] = -1
            self.age[n] += 1
            self.recent[n].append(frames[n].copy())
            grid_age = self.age[n] - (self.window.frames - 1)
            if grid_age >= 0 and grid_age % self.collect.every == 0:
                window = Window(int(self.age[n]) + self.window.offset)
                self._windows[n].append(window)
                ended.append((window, np.stack(self.recent[n])))
        self._ask(ended)
        in_force = [self._newest_answer(n) or self._nothing for n in range(len(self._windows))]
        return _stacked(in_force) | {"position": self.age % POSITIONS}

    def to_store(self) -> Step:
        """Return ``semantic`` and ``has_semantic`` as replay is to hold them so far.

        They are those of each entry's own window: null where its answer has not come yet.
        """
        own = [self._own(n) for n in range(len(self._windows))]
        return _stacked([(w and w.label) or self._nothing for w in own])

    def stored(self, env: int, entry: EntryId) -> None:
        """Note where the newest entry of an environment went, to complete it later."""
        own = self._own(env)
        if own is not None and own.label is None:
            own.entries.append(entry)

    def complete(self, replay: Replay) -> None:
        """Write the answers that have come since into the entries they belong to."""
        for window in self._to_complete:
            label = window.label or self._nothing
            for entry in window.entries:
                replay.set_semantic(entry, label.vector, label.known)
        self._to_complete.clear()

    def close(self, replay: Replay | None = None) -> None:
        """Wait ``drain`` seconds for the answers under way, then give up on the rest."""
        if self._late is None:
            self.labeler.close()
            return
        self._late.stop(self.collect.drain)
        try:
            self._to_complete += self._late.collect()
        except Exception as error:  # nothing is lost by it but these labels
            log.warning("labels under way are lost: %s", error)
        if replay is not None:
            self.complete(replay)
        self.skipped += self._late.waiting
        if self.skipped:
            log.warning(
                "%d windows of %s have no label and count as null: the describer was slower than "
                "the environments. Raise vlm.collect.every or vlm.collect.queue, or use more "
                "servers",
                self.skipped,
                self.source,
            )

    def _newest_answer(self, env: int) -> Label | None:
        """Label to act on; answers may overtake each other, so older windows are forgotten."""
        windows = self._windows[env]
        answered = [
            i for i, w in enumerate(windows) if w.due <= self.age[env] and w.label is not None
        ]
        del windows[: answered[-1] if answered else 0]
        return windows[0].label if answered else None

    def _own(self, env: int) -> Window | None:
        """Window that the newest frame of an environment belongs to."""
        due = [w for w in self._windows[env] if w.due <= self.age[env]]
        return due[-1] if due else None

    def _ask(self, ended: list[tuple[Window, Frames]]) -> None:
        if self._late is None:
            windows = [frames for _, frames in ended]
            labels = self.labeler.label_frames(windows, self.source) if windows else []
            for (window, _), label in zip(ended, labels, strict=True):
                window.label = label
            return
        self._to_complete += [window for window in self._late.collect() if window.entries]
        for window, frames in ended:
            if not self._late.ask(window, frames):
                window.label = self._nothing
                self.skipped += 1


def _stacked(labels: list[Label]) -> Step:
    return {
        "semantic": np.stack([label.vector for label in labels]),
        "has_semantic": np.array([label.known for label in labels]),
    }
