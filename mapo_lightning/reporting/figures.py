"""The figures of a report. Colours and markers belong to methods, and are the same in all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mapo_lightning.reporting.compare import Comparison
from mapo_lightning.reporting.published import Beside
from mapo_lightning.reporting.statistics import profile
from mapo_lightning.reporting.study import Cell, Study
from mapo_lightning.reporting.style import sheet, spaced

_COLUMNS = 3  # of panels
_DASHES: Mapping[str, Any] = {
    "random": "--",
    "random_held": (0, (1, 1.5)),
    "still": (0, (5, 1.5, 1, 1.5)),
}
_LEVELS = 101  # of a performance profile
LEAST_TASKS = 3
"""Tasks that a performance profile needs."""


def curves(study: Study, robust: bool) -> Figure:
    """Learning curves, a panel per task.

    Args:
        study: The runs.
        robust: Interquartile mean with its bootstrap interval; False: mean with Student's t.
    """
    tasks = study.tasks
    columns = 2 if len(tasks) == 4 else min(_COLUMNS, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure, panels = sheet(
        rows, columns, 3.5 if columns > 1 else 4.2, 4.0 * columns + 2.4 * (columns == 1)
    )
    for axes, task in zip(panels, tasks, strict=False):
        for cell in study.of(task):
            _curve(axes, cell, robust)
        _floors(axes.axhline, study, task)
        axes.set_title(task, fontsize=11)
        axes.set_xlim(left=0)
        _from_zero(axes.set_ylim, axes.dataLim.intervaly, axes.get_ylim())
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    for axes in panels[len(tasks) :]:
        axes.axis("off")
    for axes in panels[max(0, len(tasks) - columns) : len(tasks)]:
        axes.set_xlabel("environment frames", fontsize=10)
    for axes in panels[::columns]:
        axes.set_ylabel(
            "interquartile mean of the return" if robust else "mean return", fontsize=10
        )
    _legend(figure, study)
    return figure


def _curve(axes: Axes, cell: Cell, robust: bool) -> None:
    for run in cell.runs:
        frames, values = zip(*run.curve, strict=True) if run.curve else ((), ())
        axes.plot(frames, values, color=cell.colour, lw=0.8, alpha=0.28, zorder=2)
    if cell.band is None:
        return
    frames, points = cell.band.frames, cell.band.points
    middle = [point.iqm if robust else point.mean for point in points]
    spans = [point.iqm_interval if robust else point.interval for point in points]
    few = len(frames) <= 30
    axes.plot(
        frames, middle, color=cell.colour, lw=2, marker=cell.marker if few else None, ms=4, zorder=4
    )
    if all(spans):
        low, high = zip(*(span for span in spans if span), strict=True)
        axes.fill_between(frames, low, high, color=cell.colour, alpha=0.11, lw=0, zorder=1)


def scores(study: Study) -> Figure:
    """Last returns, a panel per task: every seed, mean and interquartile mean with intervals."""
    tasks = study.tasks
    columns = min(2, len(tasks))
    most = max(len(study.of(task)) for task in tasks)
    height = (1.9 if len(tasks) == 1 else 1.2) + 0.42 * most
    width = 4.6 * columns + 2.4 * (columns == 1)
    figure, panels = sheet(math.ceil(len(tasks) / columns), columns, height, width)
    for axes, task in zip(panels, tasks, strict=False):
        cells = study.of(task)
        for place, cell in enumerate(cells):
            _score(axes, cell, place)
        _floors(axes.axvline, study, task)
        axes.set(yticks=range(len(cells)), yticklabels=[cell.label for cell in cells])
        axes.set_ylim(len(cells) - 0.4, -0.6)
        axes.set_title(task, fontsize=11)
        _from_zero(axes.set_xlim, axes.dataLim.intervalx, axes.get_xlim())
        axes.set_xlabel("return of the test episodes", fontsize=9)
    for axes in panels[len(tasks) :]:
        axes.axis("off")
    handles = [
        Line2D(
            [], [], color="0.3", lw=5, alpha=0.45, label="95 %, bootstrap of the interquartile mean"
        ),
        Line2D([], [], color="0.3", lw=1.2, label="95 %, Student's t of the mean"),
        Line2D([], [], color="0.3", marker="|", ms=10, mew=2, ls="", label="interquartile mean"),
        Line2D([], [], color="0.3", marker="o", ms=6, mfc="white", ls="", label="mean"),
        Line2D([], [], color="0.3", marker=".", ms=6, alpha=0.6, ls="", label="a seed"),
        *_floor_handles(study),
    ]
    _below(figure, handles, 3)
    return figure


def _score(axes: Axes, cell: Cell, place: int) -> None:
    found, colour = cell.stats, cell.colour
    if found.iqm_interval:
        axes.plot(
            found.iqm_interval, [place] * 2, color=colour, lw=7, alpha=0.35, solid_capstyle="butt"
        )
    if found.interval:
        axes.plot(found.interval, [place] * 2, color=colour, lw=1.3)
    axes.plot(found.iqm, place, marker="|", ms=13, mew=2.2, color=colour)
    axes.plot(found.mean, place, marker="o", ms=6, mfc="white", mec=colour, mew=1.5)
    below = np.full(len(cell.values), place + 0.3)
    axes.plot(cell.values, below, ls="", marker=".", ms=6, color=colour, alpha=0.6, mew=0)


def improvements(study: Study, found: Sequence[Comparison]) -> Figure:
    """Probability that a method is better than each other one, with bootstrap intervals.

    Args:
        study: For colours.
        found: All with the same first method, on one task or over all.
    """
    colours = {cell.label: cell for cell in study.cells}
    figure, (axes,) = sheet(1, 1, 1.2 + 0.4 * len(found), 6.4)
    for place, one in enumerate(found):
        cell = colours[one.second]
        if one.improvement.interval:
            axes.plot(one.improvement.interval, [place] * 2, color=cell.colour, lw=6, alpha=0.35,
                      solid_capstyle="butt")  # fmt: skip
        axes.plot(one.improvement.value, place, marker="|", ms=13, mew=2.4, color=cell.colour)
    axes.axvline(0.5, color="0.35", ls="--", lw=1, zorder=0)
    names = [one.second for one in found]
    axes.set(yticks=range(len(found)), yticklabels=names, xlim=(-0.02, 1.02))
    axes.set_ylim(len(found) - 0.4, -0.6)
    where = found[0].task or f"{found[0].tasks} tasks"
    axes.set_xlabel(f"probability that {found[0].first} is better ({where})", fontsize=10)
    return figure


def profiles(study: Study) -> Figure | None:
    """Performance profiles of the methods that were run on all tasks; None for too few tasks."""
    if len(study.tasks) < LEAST_TASKS:
        return None
    levels = list(np.linspace(0.0, 1.2, _LEVELS))
    figure, (axes,) = sheet(1, 1, 4.2, 6.4)
    drawn = []
    for cell in {cell.label: cell for cell in study.cells}.values():
        values = study.normalised(cell.label)
        if values is None:
            continue
        found = profile(values, levels)
        axes.step(levels, [x.value for x in found], where="post", color=cell.colour, lw=2)
        spans = [x.interval for x in found]
        if all(spans):
            low, high = zip(*(span for span in spans if span), strict=True)
            axes.fill_between(levels, low, high, step="post", color=cell.colour, alpha=0.13, lw=0)
        drawn.append(Line2D([], [], color=cell.colour, lw=2, label=cell.label))
    axes.set(xlim=(0, 1.2), ylim=(0, 1.02), ylabel="share of runs above")
    axes.set_xlabel("normalised return (0: random actions, 1: best mean of the task)", fontsize=10)
    _below(figure, drawn, 3)
    return figure if drawn else None


def against_paper(found: Sequence[Beside]) -> Figure | None:
    """Published numbers and ours, where both exist, a panel per suite; None without a pair."""
    pairs = [one for one in found if one.ours is not None and one.published.value is not None]
    pairs = [one for one in pairs if not one.published.taken_from]
    suites = list(dict.fromkeys(one.published.task.partition("/")[0] for one in pairs))
    if not pairs:
        return None
    figure, panels = sheet(
        1, len(suites), 1.3 + 0.4 * _most(pairs, suites), 3.2 + 3.4 * len(suites)
    )
    for axes, suite in zip(panels, suites, strict=True):
        _suite(axes, [one for one in pairs if one.published.task.startswith(f"{suite}/")])
    handles = [
        Line2D([], [], color="0.1", marker="D", ms=7, mfc="none", mew=1.5, ls="",
               label="published, 3 seeds"),
        Line2D([], [], color="0.3", marker="o", ms=6, mfc="white", ls="", label="ours, mean"),
    ]  # fmt: skip
    if any(one.why_not for one in pairs):
        handles.append(Line2D([], [], ls="", label="* another protocol: not comparable"))
    _below(figure, handles, 3)
    return figure


def _most(pairs: Sequence[Beside], suites: Sequence[str]) -> int:
    return max(sum(one.published.task.startswith(f"{s}/") for one in pairs) for s in suites)


def _suite(axes: Axes, pairs: Sequence[Beside]) -> None:
    """Rows of one suite, whose returns have one scale."""
    for place, one in enumerate(pairs):
        assert one.ours is not None
        assert one.published.value is not None
        _score(axes, one.ours, place)
        axes.plot(one.published.value, place, marker="D", ms=7, color="0.1", mfc="none", mew=1.5)
    names = [f"{', '.join(_task_first(one))}{' *' if one.why_not else ''}" for one in pairs]
    axes.set(yticks=range(len(pairs)), yticklabels=names, xlabel="return of the test episodes")
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    _from_zero(axes.set_xlim, axes.dataLim.intervalx, axes.get_xlim())


def _task_first(one: Beside) -> tuple[str, str]:
    """The two names of a cell; table 1 has its tasks in columns."""
    cell = one.published
    return (cell.column, cell.row) if cell.place == "table1" else (cell.row, cell.column)


def _floors(line: Callable[..., object], study: Study, task: str) -> None:
    for name, policy in study.baselines(task).items():
        line(policy.mean, color="0.45", lw=1.1, ls=_DASHES.get(name, "--"), zorder=0)


def _floor_handles(study: Study) -> list[Line2D]:
    names = dict.fromkeys(name for task in study.tasks for name in study.baselines(task))
    return [
        Line2D([], [], color="0.45", lw=1.1, ls=_DASHES.get(name, "--"), label=spaced(name))
        for name in names
    ]


def _legend(figure: Figure, study: Study) -> None:
    """Methods with their numbers of seeds, and policies that learn nothing."""
    seeds: dict[str, set[int]] = {}
    for cell in study.cells:
        seeds.setdefault(cell.label, set()).add(len(cell.runs))
    first = {cell.label: cell for cell in reversed(study.cells)}
    handles = []
    for label in study.labels:
        low, high = min(seeds[label]), max(seeds[label])
        count = f"{low}" if low == high else f"{low} to {high}"
        handles.append(
            Line2D([], [], color=first[label].colour, lw=2, marker=first[label].marker, ms=4,
                   label=f"{label} ({count} {'seed' if count == '1' else 'seeds'})")
        )  # fmt: skip
    _below(figure, handles + _floor_handles(study), 3)


def _below(figure: Figure, handles: Sequence[Line2D], columns: int) -> None:
    figure.legend(
        handles=list(handles), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )


def _from_zero(
    set_limits: Callable[[float, float], object], data: Sequence[float], limits: tuple[float, float]
) -> None:
    """Let an axis begin at zero, unless something lies below it."""
    set_limits(0.0 if data[0] >= 0.0 else limits[0], limits[1])


def _thousands(value: float, _: object = None) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
