"""The table that closes a sweep: a row per setting, over its seeds."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mapo_lightning.files import atomic_write
from mapo_lightning.run.finished import is_finished
from mapo_lightning.run.sweep.plan import Point, Sweep
from mapo_lightning.training.across_seeds import AcrossSeeds, across_seeds

CSV, MARKDOWN = "results.csv", "results.md"
_RESULT, _TOLD = "evaluation.json", "pretrain/told.json"
_HORIZON = 5  # frames ahead at which the errors of dreams are shown
_DREAMS = ("told", "untold - told", "copy")


class Row(NamedTuple):
    """One setting."""

    setting: Mapping[str, str]
    """Its own values, by key, without the seed."""
    finished: tuple[str, ...]
    """Seeds, or names, of its finished points."""
    points: int
    figures: Mapping[str, AcrossSeeds]
    """Name -> statistics over the seeds: of the return, or of the errors of dreams."""
    success: float | None
    """Mean share of successful episodes; None where the task does not say."""
    floors: Mapping[str, float]
    """Name of a policy that learns nothing -> its mean return."""


def rows_of(sweep: Sweep, folder: Path) -> list[Row]:
    """Read what the points have left behind.

    Args:
        sweep: The sweep.
        folder: Its folder.
    """
    return [_row(points, folder) for points in sweep.settings().values()]


def _row(points: Sequence[Point], folder: Path) -> Row:
    done = [point for point in points if is_finished(folder / point.name)]
    values: dict[str, list[float]] = {}
    floors: dict[str, list[float]] = {}
    for point in done:
        for name, value in _figures(folder / point.name):
            values.setdefault(name, []).append(value)
        for name, value in _floors(folder / point.name):
            floors.setdefault(name, []).append(value)
    played = [_policies(folder / p.name) for p in done if (folder / p.name / _RESULT).is_file()]
    success = [float(one["agent"]["success"]) for one in played if "success" in one["agent"]]
    setting = {key: value for key, value in points[0].choice.items() if key != "seed"}
    return Row(
        setting,
        tuple(point.choice.get("seed", str(point.composed.config.seed)) for point in done),
        len(points),
        {name: across_seeds(found) for name, found in values.items()},
        sum(success) / len(success) if success else None,
        {name: sum(found) / len(found) for name, found in floors.items()},
    )


def _figures(run: Path) -> Iterator[tuple[str, float]]:
    """What a run has reached: return and success of its agent, or errors of its dreams."""
    if (run / _RESULT).is_file():
        agent = _policies(run)["agent"]
        yield "return", float(agent["return"])
    elif (run / _TOLD).is_file():
        for row in json.loads((run / _TOLD).read_text(encoding="utf-8")):
            if row["dream"] in _DREAMS and row["frames_ahead"] == _HORIZON:
                yield f"error of dreams, {row['dream']}", float(row["mean"])


def _floors(run: Path) -> Iterator[tuple[str, float]]:
    if (run / _RESULT).is_file():
        for name, found in _policies(run).items():
            if name != "agent":
                yield name, float(found["return"])


def _policies(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / _RESULT).read_text(encoding="utf-8"))["policies"]
    return found


def flat(row: Row) -> dict[str, object]:
    """One line of the CSV file; what is not there is empty."""
    line: dict[str, object] = {**row.setting, "finished": len(row.finished), "runs": row.points}
    for name, found in row.figures.items():
        low, high = found.interval or ("", "")
        iqm_low, iqm_high = found.iqm_interval or ("", "")
        line |= {name: found.mean, f"{name}_low": low, f"{name}_high": high}
        line |= {f"{name}_iqm": found.iqm, f"{name}_iqm_low": iqm_low, f"{name}_iqm_high": iqm_high}
    line["success"] = "" if row.success is None else row.success
    return line | {f"return_{name}": value for name, value in row.floors.items()}


def as_csv(rows: Sequence[Row]) -> str:
    """All rows, numbers in full."""
    lines = [flat(row) for row in rows]
    columns = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def as_markdown(rows: Sequence[Row]) -> str:
    """All rows for people, and how to read them."""
    keys = list(rows[0].setting)
    figures = list(dict.fromkeys(name for row in rows for name in row.figures))
    floors = list(dict.fromkeys(name for row in rows for name in row.floors))
    head = [*(f"`{key}`" for key in keys), "finished runs"]
    for name in figures:
        head += [name, f"{name}, interquartile mean"]
    succeeds = any(row.success is not None for row in rows)
    head += ["success"] * succeeds
    lines = [_line([*head, *floors]), "|---" * (len(head) + len(floors)) + "|"]
    for row in rows:
        cells = [*(f"`{_in_cell(row.setting[key])}`" for key in keys)]
        cells.append(f"{len(row.finished)} of {row.points}")
        for name in figures:
            found = row.figures.get(name)
            cells.append(_with(found and found.mean, found and found.interval))
            cells.append(_with(found and found.iqm, found and found.iqm_interval))
        if succeeds:
            cells.append("-" if row.success is None else f"{row.success:.0%}")
        cells += [f"{row.floors[name]:.1f}" if name in row.floors else "-" for name in floors]
        lines.append(_line(cells))
    if not any(row.finished for row in rows):
        return "\n".join([*lines, "", "No run is finished."]) + "\n"
    return "\n".join([*lines, "", *_about(figures, floors)]) + "\n"


def _about(figures: Sequence[str], floors: Sequence[str]) -> Iterator[str]:
    if not figures:
        yield "These runs leave no figure to compare; the table says which of them are finished."
        return
    yield (
        "One number per seed. Mean: in brackets the 95 % interval by Student's t. Interquartile "
        "mean: the percentile bootstrap over the seeds; up to three seeds it is the mean."
    )
    if floors:
        yield f"{', '.join(floors)}: mean returns of policies that learn nothing."
    if any(name.startswith("error") for name in figures):
        yield f"Errors: thousandths, moving pixels of held-out videos, {_HORIZON} frames ahead."


def _with(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None:
        return "-"
    if interval is None:
        return f"{value:.1f}"
    return f"{value:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _in_cell(text: str) -> str:
    return text.replace("|", "\\|")


def metrics(rows: Sequence[Row]) -> dict[str, float]:
    """What the tracker is told: statistics of every setting."""
    found: dict[str, float] = {}
    for row in rows:
        name = " ".join(f"{k.rpartition('.')[2]} {v}" for k, v in row.setting.items()) or "all"
        for figure, value in row.figures.items():
            found |= {f"{name}/{figure}": value.mean, f"{name}/{figure}_iqm": value.iqm}
            found[f"{name}/{figure}_seeds"] = float(value.seeds)
            if value.interval is not None:
                low, high = value.interval
                found |= {f"{name}/{figure}_low": low, f"{name}/{figure}_high": high}
        if row.success is not None:
            found[f"{name}/success"] = row.success
        found |= {f"{name}/return_{floor}": mean for floor, mean in row.floors.items()}
    return found


def save(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the table as CSV and Markdown; returns the files."""
    written = {folder / CSV: as_csv(rows), folder / MARKDOWN: as_markdown(rows)}
    for path, text in written.items():
        with atomic_write(path) as draft:
            draft.write_text(text, encoding="utf-8")
    return list(written)
