"""Labels every window of a set of videos; can be stopped at any time and continued later."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import NamedTuple

from mapo_lightning.data.clips import ClipDataset
from mapo_lightning.data.prefetch import prefetch
from mapo_lightning.data.video import VideoFileError
from mapo_lightning.semantics.describer import StreamingDescriber
from mapo_lightning.semantics.labeler import LabelStats, WindowRequest

log = logging.getLogger(__name__)


class LabelProgress(NamedTuple):
    """How far a labelling has come."""

    windows: int
    """Windows of this part of the corpus."""
    missing: int
    """Windows without a label when it began."""
    done: int
    """Windows processed, including those that had a label before."""
    stats: LabelStats
    seconds: float
    """Since it began."""
    lost: int
    """Windows whose video could not be read."""

    @property
    def rate(self) -> float:
        """Windows per second that the describer was queried about."""
        return self.stats.asked / max(self.seconds, 1e-9)

    @property
    def null_rate(self) -> float:
        """Share of the processed windows whose label is null or unreadable, in [0, 1]."""
        return (self.stats.null + self.stats.unreadable) / max(self.done, 1)

    @property
    def eta_seconds(self) -> float | None:
        """Time for what is missing at the rate so far; None before the first answer."""
        left = max(0, self.missing - self.stats.asked)
        return left / self.rate if self.stats.asked else (0.0 if not left else None)

    @property
    def brief(self) -> str:
        """Text that a progress bar shows beside its count."""
        eta = self.eta_seconds
        left = max(0, self.missing - self.stats.asked)
        return (
            f"{self.rate:.1f} queried/s, known {self.stats.hits}, null {self.null_rate:.0%}, left "
            f"{left} in {'?' if eta is None else timedelta(seconds=round(eta))}"
        )

    def __str__(self) -> str:
        """One line for people."""
        stats = self.stats
        return (
            f"{self.done} of {self.windows} windows: {stats.asked} queried, {stats.hits} known "
            f"before, {stats.null} null, {stats.unreadable} unreadable, {stats.unanswered} without "
            f"an answer, {self.lost} lost with their video; {self.rate:.2f} queries/s"
        )


class Estimate(NamedTuple):
    """How long a labelling would take."""

    windows: int
    missing: int
    rate: float | None
    """Windows per second that got a label, measured; None if none did."""

    def __str__(self) -> str:
        """One line for people."""
        text = f"{self.windows} windows, {self.missing} without a label"
        if not self.missing:
            return f"{text}: nothing to do"
        if self.rate is None:
            return f"{text}; label.probe=N queries N of them to measure the rate"
        hours = self.missing / self.rate / 3600.0
        return f"{text}: {hours:.2f} hours at {self.rate:.2f} windows/s (measured)"


class CorpusLabelling:
    """Labels every window of all videos that has no label yet.

    Args:
        clips: The videos, their grid of windows, and the labeler.
        shard: (number, count): which part to label, of how many; a part holds stretches of videos.
    """

    def __init__(self, clips: ClipDataset, shard: tuple[int, int] = (0, 1)) -> None:
        self.clips, self.labeler = clips, clips.labeler
        describer = self.labeler.describer
        self.stretch = clips.vlm.batch_size
        # While one stretch is being answered, the frames of the next are decoded. A server gets
        # more of them, so that it never runs out of queries; flow runs in this thread.
        self.in_flight = 1 if describer.in_worker else 2
        if isinstance(describer, StreamingDescriber):
            self.stretch, self.in_flight = max(8, describer.concurrency), 4
        stretches = [
            (video, ends[first : first + self.stretch])
            for video in range(len(clips.videos))
            for ends in [clips.window_ends(video)]
            for first in range(0, len(ends), self.stretch)
        ]
        self.stretches: list[tuple[int, range]] = stretches[shard[0] :: shard[1]]
        self.windows = sum(len(ends) for _, ends in self.stretches)

    def missing(self) -> int:
        """Number of windows without a label."""
        requests = self.clips.window_requests
        return sum(len(self.labeler.unknown(requests(*stretch))) for stretch in self.stretches)

    def run(self, report: Callable[[LabelProgress], None]) -> LabelProgress:
        """Label the windows that have no label.

        Args:
            report: Called with the progress, after each stretch.

        Returns:
            The final progress; windows without an answer are queried again by the next run.

        Raises:
            DescriberError: The describer or the store failed.
        """
        missing, before = self.missing(), self.labeler.stats
        started, done, lost = time.monotonic(), 0, 0
        now = LabelProgress(self.windows, missing, 0, LabelStats(), 0.0, 0)
        report(now)
        broken: set[int] = set()
        for (video, ends), finish in prefetch(self._jobs(), self.in_flight):
            try:
                finish()
                done += len(ends)
            except VideoFileError as error:
                lost += len(ends)
                if video not in broken:
                    log.warning("windows without a label: %s", error)
                broken.add(video)
            counts = (b - a for a, b in zip(before, self.labeler.stats, strict=True))
            took = time.monotonic() - started
            now = LabelProgress(self.windows, missing, done, LabelStats(*counts), took, lost)
            report(now)
        return now

    def estimate(self, probe: int) -> Estimate:
        """Count the windows without a label, and measure how fast they could be labelled.

        Args:
            probe: Windows to label for the measurement, decoding included. One more comes first,
                unmeasured, in which models load and connections open. All answers are stored.
        """
        missing, rate = self.missing(), None
        if probe and missing:
            wanted = self._unknown()
            self.labeler.label([next(wanted)])
            requests = [r for r, _ in zip(wanted, range(probe), strict=False)]
            started = time.monotonic()
            answered = sum(label.answered for label in self.labeler.label(requests))
            rate = answered / (time.monotonic() - started) if answered else None
            missing = self.missing()
        return Estimate(self.windows, missing, rate)

    def _unknown(self) -> Iterator[WindowRequest]:
        for video, ends in self.stretches:
            yield from self.labeler.unknown(self.clips.window_requests(video, ends))

    def _jobs(self) -> Iterator[tuple[tuple[int, range], Callable[[], object]]]:
        for video, ends in self.stretches:
            yield (video, ends), partial(self._label, video, ends)

    def _label(self, video: int, ends: range) -> None:
        self.labeler.label(self.clips.window_requests(video, ends))
