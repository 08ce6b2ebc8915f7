"""The report as one page of HTML, which loads nothing from anywhere."""

from __future__ import annotations

import html
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from mapo_lightning.reporting.compare import Comparison, dreams, from_view, over_tasks, rate
from mapo_lightning.reporting.lineage import played
from mapo_lightning.reporting.published import Beside, published
from mapo_lightning.reporting.runs import Run
from mapo_lightning.reporting.study import Study
from mapo_lightning.reporting.style import Cell, Link, image, spaced, table
from mapo_lightning.tracking.artifacts import html_page
from mapo_lightning.training.across_seeds import AcrossSeeds

_STYLE = (
    "body{max-width:62em;margin:2em auto;padding:0 1em;line-height:1.45;color:#222}"
    "h1{font-size:1.6em}h2{font-size:1.2em;margin-top:2em;border-bottom:2px solid #0072B2}"
    "h3{font-size:1em}table{margin:.8em 0;font-size:.93em;display:block;overflow-x:auto}"
    "td,th{vertical-align:top;white-space:nowrap}"
    ".wrap td:last-child{white-space:normal;min-width:16em}a{color:#0072B2}"
    ".warn{border-left:4px solid #D55E00;background:#fdf1e8;padding:.6em 1em}"
    ".notes{font-size:.9em}.notes p{margin:.2em 0}"
    ".warn p{margin:.3em 0}.pair{display:flex;gap:1em;flex-wrap:wrap}"
    ".pair img{flex:1 1 24em;min-width:0}nav{margin:1em 0}nav a{margin-right:1.2em}"
)
_CURVES = (
    "Thick: over the seeds. Faint: single seeds. Dashed, dotted: policies that learn nothing, on "
    "the same test episodes. Bands are 95 % intervals."
)
_HELD = (
    "Seeds of {} were evaluated at different frames. Points are the evaluations of the seed that "
    "has the fewest; each other seed stands at its last evaluation not after them, and nothing is "
    "interpolated. Curves over seeds are drawn only where all of them have values."
)
_TABLE = (
    "One number per seed: the mean return of its last test episodes. Mean: in brackets the 95 % "
    "interval by Student's t. Interquartile mean: without the lowest and the highest quarter of "
    "the seeds, with the 95 % percentile bootstrap interval over the seeds; up to three seeds it "
    "is the mean, and the bootstrap is too narrow. A seed's return leads to its run."
)
_COMPARED = (
    "Probability that a run of the first method is better than one of the second: share of all "
    "pairs of runs, a tie counts half, with the 95 % stratified bootstrap interval. Difference of "
    "the means with Welch's 95 % interval. Two methods count as told apart only where Welch's "
    "interval leaves out zero; the bootstrap is too narrow for few seeds. The seeds that would do "
    "are those of power 0.8 if difference and spread are what they seem."
)
_DREAMS = (
    "Of each measure the value five frames ahead, or at the last frame before, as mean over the "
    "runs with the 95 % interval by Student's t. Errors are squared errors in thousandths, on "
    "pixels that move, of videos that were held out; other measures are those of mapo-dreams. "
    "Every number of frames is in dreams.csv."
)


class Page(NamedTuple):
    """What the page is made of."""

    title: str
    study: Study
    compared: Sequence[Comparison]
    beside: Sequence[Beside]
    view: str
    """Method that is compared with each other one."""
    figures: Mapping[str, bytes]
    """Name -> the drawing, as SVG."""
    folder: Path
    """Where the page will lie: links start there."""

    def html(self) -> str:
        """The whole page."""
        sections = [
            section
            for section in (
                self._curves(), self._scores(), self._compared(), self._profiles(), self._paper(),
                self._time(), self._dreams(), self._lineage(), self._left(),
            )
            if section
        ]  # fmt: skip
        titles = [section[0] for section in sections]
        nav = "".join(f'<a href="#s{n}">{html.escape(t)}</a>' for n, t in enumerate(titles))
        body = "".join(
            f'<h2 id="s{n}">{html.escape(title)}</h2>{"".join(parts)}'
            for n, (title, parts) in enumerate(sections)
        )
        head = f"<style>{_STYLE}</style><h1>{html.escape(self.title)}</h1>{_p(self._summary())}"
        return html_page(f"{head}{self._warnings()}<nav>{nav}</nav>{body}", self.title)

    def _summary(self) -> str:
        cells, tasks = self.study.cells, self.study.tasks
        count = sum(len(cell.runs) for cell in cells)
        text = f"{count} finished runs, {len(self.study.labels)} methods, {len(tasks)} tasks"
        text = text.replace(" 1 methods", " 1 method").replace(" 1 tasks", " 1 task")
        left = len(self.study.left)
        return f"{text}." + (
            f" {left} more do not count and are listed at the end." if left else ""
        )

    def _warnings(self) -> str:
        notes = "".join(_p(note) for note in self.study.notes)
        return f'<div class="warn">{notes}</div>' if notes else ""

    def _curves(self) -> tuple[str, list[str]] | None:
        if "curves" not in self.figures:
            return None
        moved = [f"{c.label} on {c.task}" for c in self.study.cells if c.band and c.band.aligned]
        text = _CURVES + (" " + _HELD.format(", ".join(moved)) if moved else "")
        drawn = [self._figure("curves", "learning curves: means over seeds")]
        drawn.append(self._figure("curves_iqm", "learning curves: interquartile means over seeds"))
        return "Learning curves", [_p(text), *_side_by_side(drawn, len(self.study.tasks))]

    def _scores(self) -> tuple[str, list[str]]:
        parts = [_p(_TABLE), self._figure("scores", "last returns with their intervals")]
        for task in self.study.tasks:
            parts += [f"<h3>{html.escape(task)}</h3>", self._score_table(task)]
        return "Returns", parts

    def _score_table(self, task: str) -> str:
        head = ["method", "seeds", "mean", "interquartile mean", "success", "return of each seed"]
        body: list[list[Cell]] = [
            [cell.label, str(len(cell.runs)), *_both(cell.stats), _share(cell.success),
             [self._link(run, f"{run.score:.1f}", f"seed {run.seed}: ") for run in cell.runs]]
            for cell in self.study.of(task)
        ]  # fmt: skip
        body += [
            [
                f"{spaced(name)} (learns nothing)",
                "",
                f"{policy.mean:.1f}",
                "",
                _share(policy.success),
                "",
            ]
            for name, policy in self.study.baselines(task).items()
        ]
        return table(head, body)

    def _compared(self) -> tuple[str, list[str]] | None:
        if not self.compared:
            return None
        parts = [
            _p(_COMPARED),
            self._figure("improvement", f"probability that {self.view} is better"),
        ]
        for task in (*self.study.tasks, ""):
            mine = [c for c in from_view(self.view, self.compared) if c.task == task]
            if not mine:
                continue
            where = task or "over all tasks that both have; every task counts alike"
            head = ["", f"probability that {self.view} is better"]
            head += ["difference", "told apart"] if task else ["tasks"]
            body = [[one.second, *_comparison(one)] for one in mine]
            parts += [f"<h3>{html.escape(where)}</h3>", table(head, body)]
        others = len(self.study.labels) > 2
        parts += [_p("All other pairs are in comparisons.csv.")] if others else []
        return "Which methods can be told apart", parts

    def _profiles(self) -> tuple[str, list[str]] | None:
        if "profiles" not in self.figures:
            return None
        text = (
            "Share of runs whose normalised return is above a level, tasks counted alike, with 95 "
            "% stratified bootstrap bands. 0 is random actions and 1 the best mean of a method on "
            "the task in this report: with other methods in the report the scale is another one."
        )
        head = ["method", "interquartile mean of the normalised returns of all tasks"]
        body = [[name, _with(*found, 2)] for name, found in over_tasks(self.study).items()]
        figure = self._figure("profiles", "performance profiles")
        return "Performance profiles", [_p(text), figure, table(head, body)]

    def _paper(self) -> tuple[str, list[str]]:
        known = published()
        title = "Beside the paper"
        if not self.beside:
            return title, [_p("No run here is of a task that the paper has numbers of.")]
        text = (
            f"Published: {known.source}; {known.seeds} seeds each. Ours are comparable only where "
            "videos, size, budget and evaluation are those of the published protocol, as the "
            "last column says. The notes below each table name the settings that differ."
        )
        parts = [_p(text), self._figure("paper", "published returns and ours")]
        for place, about in known.titles.items():
            mine = [one for one in self.beside if one.published.place == place]
            if any(one.ours for one in mine):
                parts += [f"<h3>{html.escape(about)}</h3>", self._paper_table(mine)]
        return title, parts

    def _paper_table(self, found: Sequence[Beside]) -> str:
        """One of the paper's tables, and below it why ours may not be compared, each once."""
        head = ["row", "column", "published", "ours: mean", "ours: interquartile mean", "seeds"]
        reasons = list(dict.fromkeys(one.why_not for one in found if one.why_not))
        body: list[list[Cell]] = []
        for value, ours, why in ((one.published, one.ours, one.why_not) for one in found):
            number = "a plot only" if value.value is None else f"{value.value:.1f}"
            if value.taken_from:
                number += f" ({value.taken_from.replace('table', 'table ')})"
            line: list[Cell] = [value.row, value.column, number]
            if ours is None:
                line += ["", "", "0", "not run"]
            else:
                number = f"not comparable ({reasons.index(why) + 1})" if why else "the same"
                line += [*_both(ours.stats), str(len(ours.runs)), number]
            body.append(line)
        notes = [_p(f"({n}) {'; '.join(why)}.") for n, why in enumerate(reasons, 1)]
        return table([*head, "protocol"], body) + f'<div class="notes">{"".join(notes)}</div>'

    def _time(self) -> tuple[str, list[str]]:
        head = ["task", "method", "minutes per run", "of fine-tuning", "frames per second"]
        body: list[list[Cell]] = []
        for cell in self.study.cells:
            columns = (
                [run.seconds and run.seconds / 60 for run in cell.runs],
                [run.tuning_seconds and run.tuning_seconds / 60 for run in cell.runs],
                [rate(run) for run in cell.runs],
            )
            body.append([cell.task, cell.label, *(_range(column) for column in columns)])
        text = (
            "Wall clock: mean over the runs, the smallest and the largest. Frames are those "
            "of the environment, per second of fine-tuning, evaluations included. Pauses, and "
            "other programs on the same machine, count as time."
        )
        return "Time", [_p(text), table(head, body)]

    def _dreams(self) -> tuple[str, list[str]] | None:
        found = dreams(self.study)
        if not found:
            return None
        columns = list(dict.fromkeys(key for mine in found.values() for key in mine))
        several = len({task for task, _ in columns}) > 1
        head = ["measure", *(f"{label} ({task})" if several else label for task, label in columns)]
        body = [
            [measure, *(_measured(mine[key]) if key in mine else "" for key in columns)]
            for measure, mine in found.items()
        ]
        return "Dreams", [_p(_DREAMS), table(head, body)]

    def _lineage(self) -> tuple[str, list[str]]:
        head = [
            "run",
            "videos",
            "pre-training",
            "agent that played",
            "frames",
            "return",
            "code",
            "MLflow run",
        ]
        body: list[list[Cell]] = []
        for run in (run for cell in self.study.cells for run in cell.runs):
            before = self.study.origins[run.name]
            start = Link(before.pretraining, self._to(before.folder), before.checkpoint)
            body.append([
                self._link(run, run.name), before.videos or "none", start, played(run),
                f"{run.frames:,}", self._link(run, f"{run.score:.1f}"), run.version,
                Link(run.mlflow[:8], run.page, run.mlflow),
            ])  # fmt: skip
        text = "From the videos to the return, run by run. Names lead to the folders."
        parts = [_p(text), table(head, body)]
        if self.study.others:
            rows: list[list[Cell]] = [[self._link(run, run.name), run.stage, run.method, run.task,
                     f"{run.score:.1f}" if run.agent else "", run.checkpoint]
                    for run in self.study.others]  # fmt: skip
            parts.append(
                _p("Runs that are no seed of their own: pre-training, evaluations of other runs.")
            )
            parts.append(table(["run", "stage", "method", "task", "return", "agent"], rows))
        return "From videos to return", parts

    def _left(self) -> tuple[str, list[str]]:
        if not self.study.left:
            return "Runs that do not count", [
                _p("None: every run that was found is in the tables.")
            ]
        body: list[list[Cell]] = [
            [self._link(run, run.name), run.state, run.method, run.task, str(run.seed), run.why]
            for run in self.study.left
        ]  # fmt: skip
        text = _p("These are in no figure and in no statistic.")
        return "Runs that do not count", [
            text,
            table(["run", "state", "method", "task", "seed", "why"], body, "wrap"),
        ]

    def _figure(self, name: str, alt: str) -> str:
        return image(self.figures[name], "svg+xml", alt) if name in self.figures else ""

    def _link(self, run: Run, text: str, note: str = "") -> Link:
        about = f"{note}{run.name}" + (f", MLflow run {run.mlflow}" if run.mlflow else "")
        return Link(text, self._to(run.folder) or run.page, about)

    def _to(self, folder: Path | None) -> str:
        if folder is None or not folder.is_dir():
            return ""
        return quote(os.path.relpath(folder, self.folder.absolute())) + "/"


def _side_by_side(drawn: Sequence[str], panels: int) -> list[str]:
    """Two small figures beside each other; larger ones below each other."""
    return [f'<div class="pair">{"".join(drawn)}</div>'] if panels == 1 else list(drawn)


def _p(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _mean(found: AcrossSeeds) -> str:
    return _with(found.mean, found.interval)


def _measured(found: AcrossSeeds) -> str:
    """Without an interval where all are the same, as of what needs no model."""
    same = found.interval is not None and found.interval[0] == found.interval[1]
    return _with(found.mean, None if same else found.interval)


def _both(found: AcrossSeeds) -> Iterator[str]:
    yield _mean(found)
    yield _with(found.iqm, found.iqm_interval)


def _with(value: float, interval: tuple[float, float] | None, places: int = 1) -> str:
    places = places if abs(value) >= 1 else 2
    text, ends = f"{value:.{places}f}", [f"{end:.{places}f}" for end in interval or ()]
    return f"{text} [{', '.join(ends)}]" if ends else text


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _range(values: Sequence[float | None]) -> str:
    known = [value for value in values if value]
    if not known:
        return "not known"
    return f"{sum(known) / len(known):.1f} ({min(known):.1f} to {max(known):.1f})"


def _comparison(one: Comparison) -> list[str]:
    better = _with(one.improvement.value, one.improvement.interval, 2)
    if one.difference is None:
        return [better, str(one.tasks)]
    mean, interval, _ = one.difference
    shown = f"{mean:+.1f}" + (f" [{interval[0]:+.1f}, {interval[1]:+.1f}]" if interval else "")
    return [better, shown, one.difference.verdict()]
