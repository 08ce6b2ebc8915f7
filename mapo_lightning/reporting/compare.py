"""Which methods can be told apart, and how the rows of the report's tables look as data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

from mapo_lightning.reporting.published import Beside
from mapo_lightning.reporting.runs import Run
from mapo_lightning.reporting.statistics import (
    Difference,
    Estimate,
    difference,
    improvement,
    stratified_iqm,
)
from mapo_lightning.reporting.study import Cell, Study
from mapo_lightning.training.across_seeds import AcrossSeeds, across_seeds

HORIZON = 5
"""Frames ahead at which dreams are shown; of a shorter dream its last frame."""
Line = dict[str, object]
"""A row of a CSV file; numbers in full."""


class Comparison(NamedTuple):
    """Two methods, on one task or on all that both have."""

    task: str
    """Empty: over all common tasks."""
    tasks: int
    first: str
    second: str
    improvement: Estimate
    """Probability that the first is better."""
    difference: Difference | None
    """Of the means; None over several tasks, whose returns have no common scale."""


def comparisons(study: Study) -> list[Comparison]:
    """Every pair of methods on every task, and over all tasks where there are several."""
    return [*_by_task(study), *_over_tasks(study)]


def _by_task(study: Study) -> Iterator[Comparison]:
    for task in study.tasks:
        for one, two in combinations(study.of(task), 2):
            better = improvement([one.values], [two.values])
            apart = difference(one.values, two.values)
            yield Comparison(task, 1, one.label, two.label, better, apart)


def _over_tasks(study: Study) -> Iterator[Comparison]:
    for first, second in combinations(study.labels, 2):
        pairs = [(study.cell(task, first), study.cell(task, second)) for task in study.tasks]
        both = [(one.values, two.values) for one, two in pairs if one and two]
        if len(both) > 1:
            better = improvement([one for one, _ in both], [two for _, two in both])
            yield Comparison("", len(both), first, second, better, None)


def over_tasks(study: Study) -> dict[str, Estimate]:
    """Interquartile mean of the normalised returns of each method that was run on all tasks.

    Empty for a single task.
    """
    if len(study.tasks) < 2:
        return {}
    scores = {label: study.normalised(label) for label in study.labels}
    return {label: stratified_iqm(mine) for label, mine in scores.items() if mine is not None}


def from_view(label: str, found: Sequence[Comparison]) -> list[Comparison]:
    """Comparisons of one method with each other one, turned so that it comes first."""
    mine = []
    for one in found:
        if one.first == label:
            mine.append(one)
        elif one.second == label:
            mine.append(_turned(one))
    return mine


def _turned(one: Comparison) -> Comparison:
    value, interval = one.improvement
    better = Estimate(1 - value, interval and (1 - interval[1], 1 - interval[0]))
    apart = one.difference
    if apart is not None:
        span = apart.interval and (-apart.interval[1], -apart.interval[0])
        apart = apart._replace(mean=-apart.mean, interval=span)
    return one._replace(first=one.second, second=one.first, improvement=better, difference=apart)


def dreams(study: Study) -> dict[str, dict[tuple[str, str], AcrossSeeds]]:
    """What was measured of dreams: measure -> (task, method) -> statistics over the models.

    Dreams of pre-trained models have no task; they stand with the task of their run.
    """
    found: dict[str, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in study.cells:
        for run in cell.runs:
            for measure, value in _at_horizon(run).items():
                found[measure][cell.task, cell.label].append(value)
    mine = {run.folder for cell in study.cells for run in cell.runs}
    used = {study.origins[run.name].folder for cell in study.cells for run in cell.runs}
    for run in study.others:  # pre-training that no run above has for its own
        if run.folder in mine or not run.dreams:
            continue
        task = "videos" if run.stage == "pretrain" else run.task
        name = f"{run.method}, shared" if run.folder in used else run.method
        for measure, value in _at_horizon(run).items():
            found[measure][task, name].append(value)
    return {
        measure: {key: across_seeds(values) for key, values in mine_.items()}
        for measure, mine_ in sorted(found.items())
    }


def _at_horizon(run: Run) -> dict[str, float]:
    """Measure -> value at the horizon, or at the furthest frame before it."""
    best: dict[str, tuple[int, float]] = {}
    for measure, ahead, value in run.dreams:
        if ahead <= HORIZON and ahead >= best.get(measure, (0, 0.0))[0]:
            best[measure] = (ahead, value)
    return {
        measure + (f", {ahead} ahead" if ahead else ""): value
        for measure, (ahead, value) in best.items()
    }


def score_lines(study: Study) -> list[Line]:
    """A row per method and task, per policy that learns nothing, and per method over all tasks."""
    lines: list[Line] = []
    for task in study.tasks:
        lines += [{"task": task, "method": cell.label, **_figures(cell)} for cell in study.of(task)]
        for name, policy in study.baselines(task).items():
            lines.append(
                {"task": task, "method": name, "seeds": 0, "return": policy.mean,
                 "success": policy.success}
            )  # fmt: skip
    for label, (value, interval) in over_tasks(study).items():
        low, high = interval or (None, None)
        lines.append(
            {"task": "all, normalised", "method": label, "return_iqm": value,
             "return_iqm_low": low, "return_iqm_high": high}
        )  # fmt: skip
    return lines


def _figures(cell: Cell) -> Line:
    return {"seeds": len(cell.runs), **_numbers("return", cell.stats), "success": cell.success}


def _numbers(name: str, found: AcrossSeeds) -> Line:
    low, high = found.interval or (None, None)
    iqm_low, iqm_high = found.iqm_interval or (None, None)
    line: Line = {name: found.mean, f"{name}_low": low, f"{name}_high": high}
    return line | {
        f"{name}_iqm": found.iqm,
        f"{name}_iqm_low": iqm_low,
        f"{name}_iqm_high": iqm_high,
    }


def run_lines(study: Study) -> list[Line]:
    """A row per run, those that do not count too."""
    counted = {run.name: cell.label for cell in study.cells for run in cell.runs}
    runs = [run for cell in study.cells for run in cell.runs]
    return [
        _run_line(run, counted.get(run.name, "")) for run in (*runs, *study.others, *study.left)
    ]


def _run_line(run: Run, label: str) -> Line:
    return {
        "run": run.name, "state": run.state, "why": run.why, "stage": run.stage,
        "method": label or run.method, "task": run.task, "seed": run.seed, "frames": run.frames,
        "return": run.agent.mean if run.agent else None,
        "success": run.agent.success if run.agent else None,
        "seconds": run.seconds, "tuning_seconds": run.tuning_seconds,
        "frames_per_second": rate(run), "folder": run.folder, "mlflow_run": run.mlflow,
        "code": run.version,
    }  # fmt: skip


def rate(run: Run) -> float | None:
    """Environment frames per second of fine-tuning; None where its time is not known."""
    return run.frames / run.tuning_seconds if run.tuning_seconds and run.frames else None


def curve_lines(study: Study) -> list[Line]:
    """A row per evaluation of every seed, and per point of the curves over all seeds."""
    lines: list[Line] = []
    for cell in study.cells:
        named = {"task": cell.task, "method": cell.label}
        for run in cell.runs:
            lines += [
                {**named, "seed": run.seed, "frames": frames, "return": value, "run": run.name}
                for frames, value in run.curve
            ]
        if cell.band is not None:
            for frames, point in zip(cell.band.frames, cell.band.points, strict=True):
                lines.append(
                    {**named, "seed": "all", "frames": frames, **_numbers("return", point)}
                )
    return lines


def comparison_lines(found: Sequence[Comparison]) -> list[Line]:
    """A row per pair of methods."""
    lines: list[Line] = []
    for one in found:
        low, high = one.improvement.interval or (None, None)
        line: Line = {
            "task": one.task or "all", "tasks": one.tasks, "first": one.first, "second": one.second,
            "probability_first_better": one.improvement.value, "probability_low": low,
            "probability_high": high,
        }  # fmt: skip
        if one.difference is not None:
            low, high = one.difference.interval or (None, None)
            line |= {"difference": one.difference.mean, "difference_low": low}
            line |= {"difference_high": high, "told_apart": one.difference.apart}
            line |= {"seeds_needed": one.difference.needed}
        lines.append(line)
    return lines


def published_lines(found: Sequence[Beside]) -> list[Line]:
    """A row per published number that has a task here."""
    return [
        {
            "place": one.published.place, "row": one.published.row, "column": one.published.column,
            "experiment": one.published.experiment, "published": one.published.value,
            "method": one.ours.label if one.ours else None,
            **({} if one.ours is None else _figures(one.ours)),
            "not_comparable": "; ".join(one.why_not) or None,
        }
        for one in found
    ]  # fmt: skip


def dream_lines(study: Study) -> list[Line]:
    """A row per measure of dreams and run, at every number of frames ahead."""
    return [
        {"run": run.name, "method": run.method, "task": run.task, "seed": run.seed,
         "measure": measure, "frames_ahead": ahead, "value": value}
        for run in (*(r for c in study.cells for r in c.runs), *study.others)
        for measure, ahead, value in run.dreams
    ]  # fmt: skip
