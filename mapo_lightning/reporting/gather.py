"""Finds runs: in folders, in those of sweeps, and in MLflow; adds what only MLflow knows."""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from mapo_lightning.ownership import own_text
from mapo_lightning.reporting.curve_files import RETURN, kept_in
from mapo_lightning.reporting.runs import CONFIG, Policy, Run, read_run
from mapo_lightning.tracking.histories import Store, StoredRun
from mapo_lightning.types import ConfigError

log = logging.getLogger("mapo")

SWEEP = "sweep.yaml"
_TRACKED = "mlflow.json"
_DEPTH = 4  # folders below the one that is given in which runs are looked for
_SUCCESS = "eval/success"
_STATISTICS = ("std", "se", "iqm", "iqm_low", "iqm_high")  # of the agent, not of another policy
_SQLITE = "sqlite:///"
_MLFLOW_ID = re.compile("[0-9a-f]{32}")


class Stores:
    """The MLflow stores that runs are recorded in, each opened once.

    Args:
        given: Address of the store of all runs; None: each run's own.
    """

    def __init__(self, given: str | None = None) -> None:
        self.given = given
        self._opened: dict[str, tuple[Store, dict[str, StoredRun]] | str] = {}

    def of(self, run: Run) -> tuple[Store, dict[str, StoredRun]] | str:
        """The store of a run and everything in it; or why there is none."""
        assert run.folder is not None
        places = [self.given] if self.given else [*_own_stores(run)]
        found: tuple[Store, dict[str, StoredRun]] | str = "it was not recorded in MLflow"
        for uri in places:
            found = self.open(uri)
            if not isinstance(found, str):
                return found
        return found

    def open(self, uri: str) -> tuple[Store, dict[str, StoredRun]] | str:
        """One store and everything in it; or why it cannot be read."""
        if uri not in self._opened:
            try:
                store = Store(uri)
                self._opened[uri] = store, {run.identity: run for run in store.runs()}
            except ConfigError as error:
                self._opened[uri] = str(error)
        return self._opened[uri]


def _own_stores(run: Run) -> Iterator[str]:
    """Where a run's settings say that it was recorded, and the file in its folder."""
    assert run.folder is not None
    beside = run.folder / "mlflow.db"
    uri = str(run.settings.get("tracking.uri", ""))
    # Settings that somebody else has made may not choose which address is asked.
    if run.settings.get("tracking.enabled") and own_text(run.folder / CONFIG) is not None:
        yield absolute(uri)
    if beside.is_file():
        yield f"{_SQLITE}{beside}"


def absolute(uri: str) -> str:
    """The address of a store with an absolute path."""
    path = uri.removeprefix(_SQLITE)
    return uri if path == uri else f"{_SQLITE}{Path(path).expanduser().absolute()}"


def from_folders(roots: Sequence[Path], stores: Stores) -> list[Run]:
    """Read all runs in some folders.

    Args:
        roots: Folders of runs, of sweeps, or of several of them.
        stores: Where their curves are, if no file in their folders holds them.

    Raises:
        ConfigError: A folder is missing, or holds no run.
    """
    found: dict[Path, Run] = {}
    for root in roots:
        if not root.is_dir():
            raise ConfigError(f"there is no folder '{root}': give folders of runs or of sweeps")
        mine = list(_runs_in(root, _DEPTH))
        if not mine:
            raise ConfigError(
                f"there is no run in '{root}': the folder of a run holds {CONFIG}, and that of a "
                f"sweep {SWEEP}"
            )
        for run in mine:
            assert run.folder is not None
            found.setdefault(run.folder.resolve(), run)
    names = _short({str(key): run.name for key, run in found.items()})
    return [with_tracking(replace(run, name=names[str(key)]), stores) for key, run in found.items()]


def unique(runs: Sequence[Run]) -> list[Run]:
    """The same runs, where two have one name with the beginning of their MLflow ids behind it."""
    counts = Counter(run.name for run in runs)
    return [
        replace(run, name=f"{run.name} {run.mlflow[:8] or number}") if counts[run.name] > 1 else run
        for number, run in enumerate(runs)
    ]


def _runs_in(folder: Path, depth: int) -> Iterator[Run]:
    if (folder / CONFIG).is_file():
        yield read_run(folder, str(folder))
        return
    points = list(_points(folder)) if (folder / SWEEP).is_file() else []
    for name, choice in points:
        place = folder / name
        if not (place / CONFIG).is_file():
            seed = choice.get("seed", "")
            why = "it has not begun" if not place.exists() else "it holds no settings yet"
            yield Run(
                str(place), place.absolute(), "missing", why, method=choice.get("method", ""),
                task=choice.get("env", ""), seed=int(seed) if seed.isdecimal() else 0,
            )  # fmt: skip
    if depth:
        for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
            if inner.name == "artifacts" and _MLFLOW_ID.fullmatch(folder.name):
                continue  # MLflow's copies of a run's settings and checkpoints
            yield from _runs_in(inner, depth - 1)


def _points(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Names of the runs of a sweep, and their own values.

    Raises:
        ConfigError: Its file is damaged.
    """
    path = folder / SWEEP
    try:
        points = yaml.safe_load(path.read_text(encoding="utf-8"))["points"]
        found = {str(n): {str(k): str(v) for k, v in own.items()} for n, own in points.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"'{path}' is damaged ({' '.join(str(error).split())}): give the folders of the runs"
        ) from error
    yield from ((name, own) for name, own in found.items() if Path(name).name == name)


def _short(names: Mapping[str, str]) -> dict[str, str]:
    """Names without the folders that all have in common."""
    paths = {key: Path(name).absolute() for key, name in names.items()}
    top = Path(os.path.commonpath([path.parent for path in paths.values()]))
    return {key: path.relative_to(top).as_posix() for key, path in paths.items()}


def with_tracking(run: Run, stores: Stores) -> Run:
    """Add curve, times and the id of the MLflow run.

    The curve comes from the file in the run's folder, and where there is none from MLflow.
    """
    if run.folder is None or run.state in ("missing", "damaged"):
        return run
    folder = run.folder
    kept = kept_in(folder / "finetune")
    seconds = [kept_in(path).seconds for path in folder.iterdir() if path.is_dir()]
    all_seconds = sum(known for known in seconds if known is not None)
    run = replace(run, curve=kept.curve, tuning_seconds=kept.seconds, seconds=all_seconds or None)
    found = stores.of(run)
    if isinstance(found, str):
        if not kept.curve and run.counts and run.stage != "evaluate":
            log.warning("%s has no curve: %s", run.name, found)
        return run
    store, held = found
    parent, tuned = _recorded(folder, held)
    main = tuned or parent
    if main is None:
        return run
    run = replace(
        run, mlflow=main.identity, page=store.page(main), version=_version(main),
        seconds=_seconds(parent) or run.seconds,
        tuning_seconds=_seconds(tuned) or run.tuning_seconds,
        why=run.why if run.counts else _with_status(run.why, parent),
    )  # fmt: skip
    if tuned is None or kept.curve:
        return run
    return replace(run, curve=store.curve(tuned.identity, RETURN))


def _with_status(why: str, parent: StoredRun | None) -> str:
    return why if parent is None else f"{why} (MLflow: {parent.status})".strip()


def _recorded(
    folder: Path, held: Mapping[str, StoredRun]
) -> tuple[StoredRun | None, StoredRun | None]:
    """A run's parent and its fine-tuning in a store; None for what is not there."""
    noted: Any = {}
    if (folder / _TRACKED).is_file():
        try:
            noted = json.loads((folder / _TRACKED).read_text(encoding="utf-8"))
        except ValueError:
            log.warning("'%s' is damaged: MLflow is searched for the run", folder / _TRACKED)
    noted = noted if isinstance(noted, dict) else {}
    parent = held.get(str(noted.get("parent")))
    tuned = held.get(str(noted.get("finetune")))
    if parent is None:
        mine = [run for run in held.values() if _is_parent(run, held)]
        here = [run for run in mine if run.tags.get("run_dir") == str(folder)]
        parent = here[-1] if here else None
    if tuned is None and parent is not None:
        tuned = _phase(parent, "finetune", held)
    return parent, tuned


def _phase(parent: StoredRun, phase: str, held: Mapping[str, StoredRun]) -> StoredRun | None:
    """Newest run of a phase."""
    mine = [r for r in held.values() if r.parent == parent.identity and r.phase == phase]
    return mine[-1] if mine else None


def _is_parent(run: StoredRun, held: Mapping[str, StoredRun]) -> bool:
    """Whether it is the run of a folder, neither one of its phases nor a sweep."""
    above = held.get(run.parent)
    return "run_dir" in run.tags and "sweep" not in run.tags and (
        above is None or above.tags.get("run_dir") != run.tags["run_dir"]
    )  # fmt: skip


def _version(run: StoredRun) -> str:
    commit = run.tags.get("git.commit", run.tags.get("mlflow.source.git.commit", ""))[:7]
    changed = " with changes" if run.tags.get("git.dirty") == "true" else ""
    return f"{commit}{changed}" if commit else run.tags.get("version.mapo-lightning", "")


def _seconds(run: StoredRun | None) -> float | None:
    return None if run is None or run.ended is None else run.ended - run.started


def from_store(uri: str, experiment: str | None, stores: Stores) -> list[Run]:
    """Read all runs of an MLflow experiment; their folders too, where they are on this machine.

    Args:
        uri: Address of the store, with an absolute path.
        experiment: Name of the experiment; None: all.
        stores: Where curves are looked up.

    Raises:
        ConfigError: The store cannot be read, or holds no run of this package.
    """
    store = Store(uri)
    held = {run.identity: run for run in store.runs(experiment)}
    parents = [run for run in held.values() if _is_parent(run, held)]
    if not parents:
        raise ConfigError(
            f"experiment={experiment} of the MLflow store '{uri}' holds no run of mapo-train "
            f"({len(held)} runs of something else)"
        )
    found = []
    for parent in parents:
        folder = Path(parent.tags["run_dir"])
        # A server may name any folder; a file of this machine names those of its own runs.
        if uri.startswith(_SQLITE) and (folder / CONFIG).is_file():
            found.append(with_tracking(read_run(folder, parent.name), stores))
        else:
            found.append(_stored(parent, held, store))
    return found


def _stored(parent: StoredRun, held: Mapping[str, StoredRun], store: Store) -> Run:
    """A run of which only MLflow knows."""
    tuned, played = (_phase(parent, phase, held) for phase in ("finetune", "evaluate"))
    trained = tuned or _phase(parent, "pretrain", held)
    settings: dict[str, Any] = dict(trained.params) if trained else {}
    settings |= {"stage": parent.tags.get("stage", settings.get("stage", "all"))}
    method = str(settings.get("method", parent.tags.get("method", "")))
    run = Run(
        parent.name, None, "unfinished", f"MLflow: {parent.status}", settings, method,
        f"{settings.get('env.kind', '')}/{settings.get('env.name', '')}",
        int(settings.get("seed", 0)), mlflow=(tuned or parent).identity,
        page=store.page(tuned or parent), version=_version(tuned or parent),
        seconds=_seconds(parent), tuning_seconds=_seconds(tuned),
    )  # fmt: skip
    kept = settings.get("evaluate.keep_best") == "True"
    scores = next(
        (r.metrics for r in (parent, played if kept else tuned) if r and RETURN in r.metrics), None
    )
    if parent.status in ("FAILED", "KILLED"):
        run = replace(run, state="failed" if parent.status == "FAILED" else "unfinished")
    if tuned is None or scores is None:
        done = parent.status == "FINISHED" and run.stage in ("pretrain", "label")
        return replace(run, state="finished", why="") if done else run
    curve = store.curve(tuned.identity, RETURN)
    run = replace(
        run, curve=curve, frames=curve[-1][0] if curve else 0,
        agent=Policy(scores[RETURN], scores.get(_SUCCESS)), baselines=dict(_floors(scores)),
    )  # fmt: skip
    return replace(run, state="finished", why="") if parent.status == "FINISHED" else run


def _floors(metrics: Mapping[str, float]) -> Iterable[tuple[str, Policy]]:
    for name, value in metrics.items():
        floor = name.removeprefix(f"{RETURN}_")
        if floor != name and floor not in _STATISTICS:
            yield floor, Policy(value, None)
