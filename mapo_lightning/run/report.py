"""Reports on runs: learning curves, returns, comparisons: ``mapo-report``.

Usage: mapo-report FOLDER... [experiment=NAME] [tracking.uri=URI] [words]

A FOLDER is that of a run, of a sweep, or one that holds several of them. With experiment=NAME the
runs of an experiment in the MLflow store tracking.uri are read (sqlite:///runs/mlflow.db if none
is given), with or without folders beside. Runs that differ in their seed only are repetitions.
Curves come from curves.csv in a run's folder, or from the MLflow store that its settings name, or
mlflow.db beside them.

Writes one page of HTML that loads nothing from anywhere, its figures as PNG and PDF, and its tables
as CSV:

  curves        mean with 95 % Student's t, and interquartile mean with 95 % bootstrap, over seeds
  scores        last returns of every seed, beside policies that learn nothing
  comparisons   probability of improvement; which methods are told apart, and how many seeds would
  profiles      performance profiles, from three tasks on
  paper         the published numbers beside ours, and why they may not be compared
  dreams, runs  what was measured of dreams; every run, time, and where its agent comes from

Runs that are missing, failed, unfinished or damaged are listed, and count in no statistic.

words:
  out=DIR         folder of the report (runs/report if none is given)
  against=METHOD  method that is compared with each other one (mapo if none is given)
  title=TEXT      title of the page
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mapo_lightning.config.command_line import small_program
from mapo_lightning.types import ConfigError

if TYPE_CHECKING:
    from mapo_lightning.reporting.runs import Run
    from mapo_lightning.reporting.study import Study

log = logging.getLogger("mapo")

_KEYS = ("experiment", "tracking.uri", "out", "against", "title")


class _Asked(NamedTuple):
    folders: list[Path]
    given: dict[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Read the runs, print the table and write the report; returns the exit code."""
    return small_program(argv, __doc__ or "", _run)


def _run(words: Sequence[str]) -> None:
    asked = _parse(words)
    from mapo_lightning.reporting.report import make, view_of
    from mapo_lightning.reporting.study import study

    runs = _read(asked)
    found = study(runs)
    if not found.cells:
        raise ConfigError(f"no run counts, so there is nothing to report on: {_states(runs)}")
    view_of(found, asked.given.get("against", ""))
    out = Path(asked.given.get("out", "runs/report"))
    given = asked.given.get("against", ""), asked.given.get("title", "")
    report = make(found, protocol, out, *given)
    page, *others = report.save(out)
    sys.stdout.write(_summary(found))
    sys.stdout.write(f"\n{page} and {len(others)} figures and tables beside it\n")


def _parse(words: Sequence[str]) -> _Asked:
    """Tell folders from words; the folder of a run may have a ``=`` in its name.

    Raises:
        ConfigError: A word is neither.
    """
    asked = _Asked([], {})
    for word in words:
        key, equals, value = word.partition("=")
        if Path(word).exists() or not equals:
            asked.folders.append(Path(word))
        elif key in _KEYS and value:
            asked.given[key] = value
        else:
            raise ConfigError(
                f"cannot read '{word}': it is no folder, and the words of mapo-report are "
                f"{', '.join(f'{known}=' for known in _KEYS)}"
            )
    if not asked.folders and not {"experiment", "tracking.uri"} & set(asked.given):
        raise ConfigError(
            "mapo-report needs folders of runs or of sweeps, or experiment=NAME of an MLflow store"
        )
    return asked


def _read(asked: _Asked) -> list[Run]:
    from mapo_lightning.reporting.gather import (
        Stores,
        absolute,
        from_folders,
        from_store,
        unique,
    )
    from mapo_lightning.tracking.settings import TrackingConfig

    uri = asked.given.get("tracking.uri")
    name = asked.given.get("experiment")
    checked = TrackingConfig(uri=uri) if uri else TrackingConfig()
    stores = Stores(absolute(checked.uri) if uri else None)
    runs = from_folders(asked.folders, stores) if asked.folders else []
    if name or not asked.folders:
        known = {run.folder for run in runs if run.folder is not None}
        stored = from_store(absolute(checked.uri), name, stores)
        runs += [run for run in stored if run.folder not in known]
    return unique(runs)


@cache
def protocol(experiment: str) -> Mapping[str, Any]:
    """Settings of an experiment by dotted key.

    Raises:
        ConfigError: There is no such experiment.
    """
    from mapo_lightning.config.compose import compose
    from mapo_lightning.run.config import RunConfig, conf_folder

    # What a user gives, and the width that only the hub's file of the describer tells.
    words = [f"experiment={experiment}", "data.root=videos", "vlm.hidden_dim=3584"]
    return compose([*words, "token_world.vgg=vgg16.pth"], RunConfig, conf_folder()).flat


def _states(runs: Sequence[Run]) -> str:
    told = [f"{run.name} is {run.state}" + (f" ({run.why})" if run.why else "") for run in runs]
    more = f"; and {len(told) - 5} more" if len(told) > 5 else ""
    return "; ".join(told[:5]) + more


def _summary(found: Study) -> str:
    """The table of returns as Markdown, what does not count, and what has to be known."""
    lines = [
        "| task | method | seeds | return | interquartile mean | success |",
        "|---|---|---|---|---|---|",
    ]
    for cell in found.cells:
        stats = cell.stats
        lines.append(
            f"| {cell.task} | `{cell.label}` | {stats.seeds} | {_with(stats.mean, stats.interval)} "
            f"| {_with(stats.iqm, stats.iqm_interval)} | {_share(cell.success)} |"
        )
    for task in found.tasks:
        for name, policy in found.baselines(task).items():
            share = _share(policy.success)
            lines.append(f"| {task} | {name} | | {policy.mean:.1f} | | {share} |")
    lines += [""] * bool(found.left)
    lines += [f"does not count: {run.name} is {run.state}: {run.why}" for run in found.left]
    lines += [f"note: {note}" for note in found.notes]
    return "\n".join(lines) + "\n"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _with(value: float, interval: tuple[float, float] | None) -> str:
    return f"{value:.1f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")
