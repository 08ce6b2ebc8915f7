"""Measures how good a describer's labels are: against motion, and for altered windows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from mapo_lightning.data.clips import ClipDataset, LabelExample
from mapo_lightning.data.ground_truth import GroundTruth
from mapo_lightning.semantics.agreement import (
    Agreement,
    Judged,
    agreement,
    clear_shift,
    frozen,
    jittered,
    same_direction,
    sentence_shift,
)
from mapo_lightning.semantics.describer import (
    CaptionReader,
    Describer,
    Metered,
    NoAnswer,
    NullDescriber,
    Reply,
    Usage,
)
from mapo_lightning.semantics.labeler import Label, Labeler
from mapo_lightning.semantics.point_tracking import dominant_motion
from mapo_lightning.semantics.templates import direction_on_screen
from mapo_lightning.types import ConfigError, DescriberError, Frames

_AT_ONCE = 16  # windows queried at once
_WORST = 40  # videos listed by name


class Cost(NamedTuple):
    """What the windows cost that the describer was queried about just now."""

    windows: int
    """Number of these windows, copies included, but for the first, which waits for models to load;
    0 if all answers were known before."""
    seconds: float
    """Median time of a query about one window alone, in seconds; NaN if there was none."""
    seconds_90: float
    """Time within which 90 % of these are answered, in seconds."""
    per_second: float
    """Windows answered per second if they are queried together; NaN if none were."""
    usage: Usage
    """Queries and tokens; all zero for a describer without tokens."""

    def row(self) -> dict[str, object]:
        """Return the cost as rows of the table of measures."""
        tokens = "-"
        if self.usage.counted:
            each = (self.usage.tokens_in, self.usage.tokens_out)
            tokens = " in, ".join(f"{count / self.usage.counted:,.0f}" for count in each) + " out"
        return {
            "windows queried now": self.windows,
            "seconds per window": _number(self.seconds, ".3g"),
            "seconds per window, 90 %": _number(self.seconds_90, ".3g"),
            f"windows per second, {_AT_ONCE} together": _number(self.per_second, ".3g"),
            "tokens per query": tokens,
        }


@dataclass(frozen=True)
class Quality:
    """Quality of one describer's labels of one set of videos."""

    describer: str
    """Its name, as in the key of every label."""
    windows: int
    """Number of windows measured."""
    unanswered: int
    """Windows and copies of them that the describer gave no answer about; they count nowhere."""
    null: float
    """Share of windows with the label null, in [0, 1]."""
    unreadable: float
    """Share of windows whose answer could not be read, in [0, 1]."""
    flow: Agreement
    """Agreement with the motion of tracked points."""
    truth: Agreement
    """Agreement with the simulator; rendered videos only."""
    sentence: Agreement
    """Agreement with the direction that the video's class names; Something-Something V2 only."""
    still_null: float
    """Share of frozen windows (one frame repeated, with sensor noise) with the label null."""
    words_kept: dict[str, float]
    """Share of windows whose phrase stays the same, word for word, by kind of jitter."""
    direction_kept: dict[str, float]
    """Share of windows whose direction stays the same, by kind of jitter."""
    by_video: dict[str, Agreement]
    """Agreement with the simulator, or else with the class, or else with tracked points, by name of
    video."""
    cost: Cost | None = None
    """Time and tokens; None if they were not measured."""

    def row(self) -> dict[str, object]:
        """Return the measures as one row of a table."""
        row: dict[str, object] = {
            "describer": self.describer,
            "windows": self.windows,
            "without an answer": self.unanswered,
            "null": _percent(self.null),
            "unreadable": _percent(self.unreadable),
        }
        references = {"points": self.flow, "simulator": self.truth, "class": self.sentence}
        for name, found in references.items():
            low, high = found.interval
            right = f"{_percent(found.share)} of {found.told}"
            row[f"direction as {name}"] = f"{right} [{100 * low:.0f}, {100 * high:.0f}]"
            row[f"by chance ({name})"] = _percent(found.chance)
            row[f"direction named ({name})"] = f"{found.told} of {found.clear}"
            row[f"moving, called null ({name})"] = f"{found.null} of {found.clear}"
            row[f"distance as {name}"] = _number(found.magnitude)
        row["still clips called null"] = _percent(self.still_null)
        for kind in self.words_kept:
            row[f"same words ({kind})"] = _percent(self.words_kept[kind])
            row[f"same direction ({kind})"] = _percent(self.direction_kept[kind])
        return row if self.cost is None else row | self.cost.row()


def measure(
    labeler: Labeler,
    examples: Sequence[LabelExample],
    progress: Callable[[int, int], None] | None = None,
) -> Quality:
    """Judge labels, and query the describer about frozen and jittered copies of their windows.

    Args:
        labeler: Labels the copies; four further queries per window, and none where it reads
            sentences and no frames.
        examples: Labelled windows; the true motion beside their videos is used if there is any.
        progress: Told how many copies are labelled, of how many.

    Raises:
        ConfigError: There are no windows.
        DescriberError: The describer failed.
    """
    if not examples:
        raise ConfigError("there is no window to judge labels by: callbacks.quality must be > 0")
    asked = len(examples)
    examples = [example for example in examples if example.answered]
    if not examples:
        raise DescriberError(
            f"'{labeler.describer.name}' has answered about none of {asked} windows"
        )
    ground_truth = GroundTruth({example.path.parent for example in examples})
    judged = [_judge(example, ground_truth) for example in examples]
    count = len(judged)
    shown = [] if isinstance(labeler.describer, CaptionReader) else examples
    copies = [{"frozen": frozen(one.frames)} | jittered(one.frames) for one in shown]
    ask = _Asked(labeler, copies, progress)
    still = ask("frozen")
    words, directions, lost = _kept(judged, ask, list(copies[0])[1:] if copies else [])
    return Quality(
        describer=labeler.describer.name,
        windows=count,
        unanswered=asked - count + lost + sum(not label.answered for label in still),
        null=_share(one.status == "null" for one in judged),
        unreadable=_share(one.status == "unreadable" for one in judged),
        flow=agreement(judged, [one.by_points for one in judged]),
        truth=agreement(judged, [one.by_simulator for one in judged]),
        sentence=agreement(judged, [one.by_sentence for one in judged]),
        still_null=_share(not label.known for label in still if label.answered),
        words_kept=words,
        direction_kept=directions,
        by_video=_by_video(examples, judged),
    )


def measure_clips(
    clips: ClipDataset,
    windows: int,
    *,
    timed: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Quality:
    """Measure the describer of a set of videos on windows spread over them.

    Args:
        clips: The videos, and who labels them.
        windows: How many, at most.
        timed: Measure time and tokens as well.
        progress: See `measure`.
    """
    labeler, describer = clips.labeler, clips.labeler.describer
    watch = _Stopwatch(describer)
    used = describer.usage if isinstance(describer, Metered) else Usage()
    if timed and not isinstance(describer, NullDescriber | CaptionReader):
        labeler.describer = watch
    try:
        # If the videos hold fewer windows than requested, some come twice.
        found = {(one.path, one.start, one.last): one for one in clips.label_examples(windows)}
        quality = measure(labeler, list(found.values()), progress)
    finally:
        labeler.describer = describer
    spent = describer.usage.since(used) if isinstance(describer, Metered) else Usage()
    return replace(quality, cost=watch.cost(spent) if timed else None)


class _Stopwatch:
    """A describer that notes how long another one takes."""

    def __init__(
        self, describer: Describer, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.describer, self.name, self.in_worker = describer, describer.name, describer.in_worker
        self._clock = clock
        self.calls: list[tuple[int, float]] = []

    def describe(self, clips: Sequence[Frames]) -> Sequence[Reply | NoAnswer]:
        began = self._clock()
        replies = self.describer.describe(clips)
        self.calls.append((len(clips), self._clock() - began))
        return replies

    def cost(self, usage: Usage) -> Cost:
        """The cost of all calls but the first."""
        alone = [seconds for windows, seconds in self.calls[1:] if windows == 1]
        together = [call for call in self.calls[1:] if call[0] > 1]
        busy = sum(seconds for _, seconds in together)
        return Cost(
            windows=len(alone) + sum(windows for windows, _ in together),
            seconds=float(np.median(alone or [math.nan])),
            seconds_90=float(np.quantile(alone or [math.nan], 0.9)),
            per_second=sum(windows for windows, _ in together) / busy if busy else math.nan,
            usage=usage,
        )


def markdown(found: Sequence[Quality]) -> str:
    """Return a table with a row per measure and a column per describer, and the worst videos."""
    rows = [quality.row() for quality in found]
    head = "| |" + "".join(f" `{_cell(row['describer'])}` |" for row in rows)
    lines = [head, "|---|" + "---|" * len(rows)]
    for name in list(rows[0])[1:]:
        lines.append(f"| {name} |" + "".join(f" {_cell(row.get(name, '-'))} |" for row in rows))
    for quality in found:
        told = {video: one for video, one in quality.by_video.items() if one.told}
        worst = sorted(told.items(), key=lambda pair: (pair[1].share, pair[0]))[:_WORST]
        lines += ["", "| video | direction right |", "|---|---|"]
        lines += [f"| {_cell(video)} | {one.agree} of {one.told} |" for video, one in worst]
    return "\n".join(lines) + "\n"


def _by_video(examples: Sequence[LabelExample], judged: Sequence[Judged]) -> dict[str, Agreement]:
    groups: dict[str, list[Judged]] = {}
    for example, one in zip(examples, judged, strict=True):
        groups.setdefault(example.video, []).append(one)
    known = [[one.by_simulator for one in judged], [one.by_sentence for one in judged]]
    best = next((i for i, shifts in enumerate(known) if any(x is not None for x in shifts)), 2)
    return {
        video: agreement(ones, [(x.by_simulator, x.by_sentence, x.by_points)[best] for x in ones])
        for video, ones in sorted(groups.items())
    }


def _judge(example: LabelExample, ground_truth: GroundTruth) -> Judged:
    moved = ground_truth.moved(example.path, example.start, example.last)
    by_points = dominant_motion(example.frames)
    return Judged(
        example.status,
        example.phrase,
        by_points,
        None if moved is None else clear_shift(moved.shifts),
        sentence_shift(direction_on_screen(example.label), by_points),
    )


def _kept(
    judged: Sequence[Judged], ask: _Asked, kinds: Sequence[str]
) -> tuple[dict[str, float], dict[str, float], int]:
    """Shares of phrases and directions that stay, by kind of jitter; copies without an answer."""
    words: dict[str, float] = {}
    directions: dict[str, float] = {}
    lost = 0
    for kind in kinds:
        again = ask(kind)
        pairs = [(one, two) for one, two in zip(judged, again, strict=True) if two.answered]
        lost += len(judged) - len(pairs)
        words[kind] = _share(one.phrase == two.phrase for one, two in pairs)
        directions[kind] = _share(same_direction(one.phrase, two.phrase) for one, two in pairs)
    return words, directions, lost


class _Asked:
    """Has copies of windows labelled, one kind after the other, and says how far it has come."""

    def __init__(
        self,
        labeler: Labeler,
        copies: Sequence[Mapping[str, Frames]],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.labeler, self.copies, self.progress = labeler, copies, progress
        self.done, self.total = 0, sum(map(len, copies))

    def __call__(self, kind: str) -> list[Label]:
        labels: list[Label] = []
        what = f"quality: {kind if kind == 'frozen' else f'jitter {kind}'}"
        for first in range(0, len(self.copies), _AT_ONCE):
            windows = [copy[kind] for copy in self.copies[first : first + _AT_ONCE]]
            labels += self.labeler.label_frames(windows, what)
            self.done += len(windows)
            if self.progress is not None:
                self.progress(self.done, self.total)
        return labels


def _share(cases: Iterable[bool]) -> float:
    """Share of true cases, in [0, 1]; NaN where there are none."""
    found = list(cases)
    return sum(found) / len(found) if found else math.nan


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"


def _number(value: float, form: str = ".2f") -> str:
    return "-" if math.isnan(value) else format(value, form)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("`", "'")
