"""Puts runs side by side: which of them are repetitions, which methods, which do not compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from mapo_lightning.reporting.lineage import Origin, origin
from mapo_lightning.reporting.runs import Policy, Run, is_of
from mapo_lightning.reporting.statistics import Scores, Values
from mapo_lightning.reporting.style import METHODS, colour_of, marker_of
from mapo_lightning.tracking.histories import Curve
from mapo_lightning.training.across_seeds import AcrossSeeds, across_seeds

_NO_METHOD = (
    "seed", "stage", "run_dir", "work_dir", "init_from", "checkpoint", "resume", "data.root",
    "data.workers", "data.cache_mb", "label", "callbacks", "play", "trainer", "tracking", "launch",
    "vlm.server", "vlm.device", "vlm.batch_size", "vlm.store", "vlm.cached_only", "vlm.reviews",
    "evaluate", "env.kind", "env.name", "env.num_envs", "env.deaths_per_hour",
    "finetune.collect_ahead", "world_model.recurrence",
    "world_model.image.recompute",
)  # fmt: skip
"""Settings that make no other method of a run: seeds, places, machines, and what is watched."""
_SAME = ("env", "evaluate.episodes", "evaluate.seed", "evaluate.keep_best", "finetune.agent_steps")
"""Settings in which runs must agree if their returns are to be compared."""
_OF_MACHINE = ("env.num_envs", "env.deaths_per_hour", "env.label_size")
_GRID = 120  # points of a curve at which statistics are taken
_LISTED = 6  # names in a note


class Cell:
    """The runs of one method on one task: repetitions, that differ in their seed only.

    Args:
        task: Kind and name.
        label: By which it is shown: the method, with the settings that vary.
        method: Which one.
        runs: At least one, all of which count; by seed.
        variant: Number among those of the same method.
    """

    def __init__(
        self, task: str, label: str, method: str, runs: Sequence[Run], variant: int
    ) -> None:
        self.task, self.label, self.method, self.runs = task, label, method, tuple(runs)
        self.colour, self.marker = colour_of(method), marker_of(variant)

    @cached_property
    def values(self) -> Values:
        """Return of every seed, (N,)."""
        return np.array([run.score for run in self.runs], np.float64)

    @cached_property
    def stats(self) -> AcrossSeeds:
        """Their statistics."""
        return across_seeds(self.values.tolist())

    @property
    def success(self) -> float | None:
        """Mean share of successful episodes; None where the task does not say."""
        told = [run.agent.success for run in self.runs if run.agent]
        known = [value for value in told if value is not None]
        return float(np.mean(known)) if known else None

    @cached_property
    def band(self) -> Band | None:
        """Its learning curve; None where no seed has one."""
        return band([run.curve for run in self.runs])


class Band(NamedTuple):
    """Learning curves of several seeds on common frames."""

    frames: tuple[int, ...]
    points: tuple[AcrossSeeds, ...]
    """Statistics at these frames."""
    aligned: bool
    """Whether seeds were evaluated at different frames, so that they had to be aligned."""


def band(curves: Sequence[Curve]) -> Band | None:
    """Statistics of curves over their seeds.

    Where seeds were evaluated at different frames, the points are the evaluations of the seed that
    has the fewest, and each other seed stands at its last evaluation not after them, which invents
    nothing. There are points only where all seeds have been evaluated and none has ended.

    Args:
        curves: One per seed; empty ones count as none.
    """
    curves = [curve for curve in curves if curve]
    if not curves:
        return None
    first, last = max(c[0][0] for c in curves), min(c[-1][0] for c in curves)
    fewest = min(curves, key=len)
    grid = [frame for frame, _ in fewest if first <= frame <= last]
    if not grid and first <= last:
        grid = [last]
    if not grid:
        return None
    if len(grid) > _GRID:
        chosen = np.linspace(0, len(grid) - 1, _GRID).round().astype(int)
        grid = [grid[number] for number in chosen]
    columns = [[_held(curve, frame) for curve in curves] for frame in grid]
    same = len({tuple(frame for frame, _ in curve) for curve in curves}) == 1
    return Band(tuple(grid), tuple(map(across_seeds, columns)), not same)


def _held(curve: Curve, frame: int) -> float:
    """Value of the last evaluation not after a frame."""
    return next(value for at, value in reversed(curve) if at <= frame)


class Study(NamedTuple):
    """Everything that a report is about."""

    cells: tuple[Cell, ...]
    """By task and method, in the order in which they are shown."""
    left: tuple[Run, ...]
    """Runs that do not count: missing, failed, unfinished, damaged, or left out."""
    others: tuple[Run, ...]
    """Finished runs of other stages: pre-training, and evaluations of agents of other runs."""
    notes: tuple[str, ...]
    """What a reader has to know before comparing."""
    origins: Mapping[str, Origin]
    """Name of a run -> where its agent comes from."""

    @property
    def tasks(self) -> list[str]:
        """All tasks."""
        return list(dict.fromkeys(cell.task for cell in self.cells))

    @property
    def labels(self) -> list[str]:
        """All methods and variants."""
        found = {cell.label: METHOD_ORDER.get(cell.method, 99) for cell in self.cells}
        return sorted(found, key=lambda label: (found[label], label))

    def of(self, task: str) -> list[Cell]:
        """Methods on one task."""
        mine = {cell.label: cell for cell in self.cells if cell.task == task}
        return [mine[label] for label in self.labels if label in mine]

    def cell(self, task: str, label: str) -> Cell | None:
        """One method on one task."""
        return next((c for c in self.cells if (c.task, c.label) == (task, label)), None)

    def baselines(self, task: str) -> dict[str, Policy]:
        """Name -> mean over all runs of a task of what a policy that learns nothing reaches."""
        found: dict[str, list[Policy]] = {}
        for cell in self.of(task):
            for run in cell.runs:
                for name, policy in run.baselines.items():
                    found.setdefault(name, []).append(policy)
        return {name: _mean(policies) for name, policies in found.items()}

    def normalised(self, label: str) -> Scores | None:
        """Returns of a method on every task, with random actions as 0 and the best mean as 1.

        None where it was not run on all tasks, or a task has no such scale.
        """
        found = []
        for task in self.tasks:
            cell, floors = self.cell(task, label), self.baselines(task)
            low = floors["random"].mean if "random" in floors else 0.0
            high = max(other.stats.mean for other in self.of(task))
            if cell is None or high <= low:
                return None
            found.append((cell.values - low) / (high - low))
        return found


METHOD_ORDER = {method: number for number, method in enumerate(METHODS)}


def _mean(policies: Sequence[Policy]) -> Policy:
    told = [policy.success for policy in policies if policy.success is not None]
    mean = float(np.mean([policy.mean for policy in policies]))
    return Policy(mean, float(np.mean(told)) if told else None)


def study(runs: Sequence[Run]) -> Study:
    """Sort runs into methods and tasks.

    Args:
        runs: All that were found.
    """
    agents = [run for run in runs if run.counts and run.stage != "evaluate"]
    others = tuple(run for run in runs if run.state == "finished" and run not in agents)
    origins = {run.name: origin(run, runs) for run in agents}
    traits = {name: _traits(found) for name, found in origins.items()}
    kept, doubled = _newest(agents, traits)
    left = [run for run in runs if run.state != "finished"] + doubled
    notes: list[str] = []
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for task, method in dict.fromkeys((run.task, run.method) for run in kept):
        mine = [run for run in kept if (run.task, run.method) == (task, method)]
        several = [traits[run.name] for run in mine]
        vary = _varying(several)
        telling = _telling(several, vary)
        notes += _variants(task, method, vary, telling)
        for run in mine:
            label = _label(method, traits[run.name], telling)
            groups.setdefault((task, method, label), []).append(run)
    names = {m: sorted({label for _, method, label in groups if method == m}) for _, m, _ in groups}
    cells = [
        Cell(
            task, label, method, sorted(same, key=lambda run: run.seed), names[method].index(label)
        )
        for (task, method, label), same in groups.items()
    ]
    cells.sort(key=lambda c: (c.task, METHOD_ORDER.get(c.method, 99), c.label))
    notes += _notes(kept, cells)
    return Study(tuple(cells), tuple(left), others, tuple(notes), origins)


Traits = Mapping[str, str]
"""All settings that make a method of a run."""


def _newest(runs: Sequence[Run], traits: Mapping[str, Traits]) -> tuple[list[Run], list[Run]]:
    """Of runs that are the same but for their place the newest; and the others, as left out."""
    found: dict[tuple[object, ...], Run] = {}
    doubled = []
    for run in sorted(runs, key=_written):
        key = (run.task, run.method, run.seed, tuple(sorted(traits[run.name].items())))
        if key in found:
            why = f"the same method, task and seed as {run.name}, which is newer"
            doubled.append(replace(found.pop(key), state="left out", why=why))
        found[key] = run
    order = {run.name: number for number, run in enumerate(runs)}
    return sorted(found.values(), key=lambda run: order[run.name]), doubled


def _written(run: Run) -> float:
    result = run.folder and run.folder / "evaluation.json"
    return result.stat().st_mtime if result and result.is_file() else 0.0


def _traits(found: Origin) -> Traits:
    mine = {k: str(v) for k, v in found.settings.items() if not is_of(k, _NO_METHOD)}
    return mine | {"pre-training": "no" if found.pretraining == "none" else "yes"}


def _varying(several: Sequence[Traits]) -> list[str]:
    """Settings in which runs of one method on one task differ."""
    keys = sorted({key for one in several for key in one})
    return [key for key in keys if len({one.get(key) for one in several} - {None}) > 1]


def _telling(several: Sequence[Traits], vary: Sequence[str]) -> list[str]:
    """As few of the settings that vary as tell all variants apart; often one tells for many."""

    def groups(keys: Sequence[str]) -> int:
        return len({tuple(one.get(key) for key in keys) for one in several})

    chosen: list[str] = []
    while groups(chosen) < groups(vary):
        chosen.append(max(vary, key=lambda key: groups([*chosen, key])))
    return chosen


def _label(method: str, traits: Traits, telling: Sequence[str]) -> str:
    """A method's name, with the settings that tell it from its variants."""
    words = [f"{key.rpartition('.')[2]}={traits[key]}" for key in telling if key in traits]
    return ", ".join([method, *words])


def _variants(task: str, method: str, vary: Sequence[str], told: Sequence[str]) -> Iterator[str]:
    more = [key for key in vary if key not in told]
    if more:
        yield (
            f"The variants of {method} on {task} differ in more settings than their names tell: "
            f"{', '.join(more)}."
        )


def _notes(runs: Sequence[Run], cells: Sequence[Cell]) -> Iterator[str]:
    for task in dict.fromkeys(run.task for run in runs):
        yield from _unlike(task, [run for run in runs if run.task == task])
    versions = Counter(run.version for run in runs if run.version)
    if len(versions) > 1:
        named = ", ".join(f"{name} ({count} runs)" for name, count in versions.most_common())
        yield f"The runs were made by {len(versions)} versions of the code: {named}."
    for method in dict.fromkeys(run.method for run in runs):
        keys = [frozenset(r.settings) for r in runs if r.method == method and r.folder is not None]
        some = sorted(frozenset.union(*keys) - frozenset.intersection(*keys)) if keys else []
        if some:
            yield (
                f"Only some of the runs of {method} know the settings {_listed(some)}: they were "
                "made by different versions of the package, and may differ in more than is shown."
            )
    counts = sorted({len(cell.runs) for cell in cells})
    if len(counts) > 1:
        yield f"Methods have between {counts[0]} and {counts[-1]} seeds: the tables say which."
    bare = [run.name for run in runs if not run.curve]
    if bare:
        yield f"No curve was found of {_listed(bare)}; the tables have their last return."


def _unlike(task: str, runs: Sequence[Run]) -> Iterator[str]:
    """Settings that runs of one task must have in common, and do not."""
    keys = sorted({key for run in runs for key in run.settings if is_of(key, _SAME)})
    for key in (key for key in keys if key not in _OF_MACHINE):
        values: dict[str, list[str]] = {}
        for run in runs:
            if key in run.settings:
                values.setdefault(str(run.settings[key]), []).append(run.name)
        if len(values) > 1:
            which = "; ".join(f"{value}: {_listed(names)}" for value, names in values.items())
            yield (
                f"The runs on {task} differ in {key} ({which}): their returns are not of the same "
                "task or budget, and do not compare."
            )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
