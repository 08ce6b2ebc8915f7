"""What a run has left behind in its folder, and whether it counts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mapo_lightning.config.compose import load_yaml
from mapo_lightning.config.redact import redact_text
from mapo_lightning.config.schema import flatten
from mapo_lightning.envs.settings import SUITE_REPEAT
from mapo_lightning.tracking.histories import Curve
from mapo_lightning.types import ConfigError

CONFIG, RESULT, MARK = "config.yaml", "evaluation.json", "finished.json"
"""Files in the folder of a run."""
_TOLD = "pretrain/told.json"
_JUDGED = ("dreams.json", "dreams/dreams.json")
_FORESIGHT = "foresight.json"
_TAIL = 65536  # bytes at the end of a log in which an error is looked for

State = Literal["finished", "unfinished", "failed", "damaged", "missing", "left out"]


class Dream(NamedTuple):
    """Something that was measured of a model's dreams."""

    measure: str
    ahead: int
    """Frames ahead; 0 where that has no meaning."""
    value: float


class Policy(NamedTuple):
    """What a policy has reached in the test episodes."""

    mean: float
    """Mean return."""
    success: float | None
    """Share of successful episodes; None where the task does not say."""


@dataclass(frozen=True)
class Run:
    """One run, whichever way it has ended."""

    name: str
    """By which it is shown: its folder, as seen from where the command was typed."""
    folder: Path | None
    """Absolute; None where only MLflow knows it."""
    state: State
    why: str = ""
    """What is wrong with it; empty for a finished one."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """By dotted key."""
    method: str = ""
    task: str = ""
    """Kind and name, such as ``dmc/cheetah_run``."""
    seed: int = 0
    frames: int = 0
    """Environment frames of its training, where it was evaluated."""
    agent: Policy | None = None
    """None where it was not evaluated."""
    baselines: Mapping[str, Policy] = field(default_factory=dict)
    """Name -> what a policy that learns nothing reaches on the same episodes."""
    curve: Curve = ()
    """Environment frames and mean return of every evaluation."""
    seconds: float | None = None
    """From its first start to its end, pauses included; None where it is not known."""
    tuning_seconds: float | None = None
    """Those of fine-tuning alone."""
    dreams: tuple[Dream, ...] = ()
    checkpoint: str = ""
    """The agent that was evaluated, where the evaluation names it."""
    mlflow: str = ""
    """Id of its MLflow run, of fine-tuning where there is one."""
    page: str = ""
    """Address of that run's page on a server; empty for a file."""
    version: str = ""
    """Commit, or version, of the code that made it; empty where it is not known."""

    @property
    def counts(self) -> bool:
        """Whether its return stands for its seed."""
        return self.state == "finished" and self.agent is not None

    @property
    def stage(self) -> str:
        """What it was to do."""
        return str(self.settings.get("stage", "all"))

    @property
    def score(self) -> float:
        """Mean return; only of a run that counts."""
        assert self.agent is not None
        return self.agent.mean


def is_of(key: str, sections: Sequence[str]) -> bool:
    """Whether a dotted key is one of some keys, or lies in one of some sections."""
    return any(key == section or key.startswith(f"{section}.") for section in sections)


class _DamagedError(Exception):
    """A file of a run cannot be read: which, and why."""


def read_run(folder: Path, name: str) -> Run:
    """Read the folder of a run.

    Args:
        folder: Holds ``config.yaml``.
        name: By which it is shown.

    Returns:
        The run without what only MLflow knows; ``damaged`` where a file cannot be read.
    """
    folder = folder.absolute()
    run = Run(name, folder, "unfinished")
    try:
        settings = dict(flatten(load_yaml(folder / CONFIG)))
        run = Run(name, folder, "unfinished", settings=settings, **_identity(settings))
        return _with_results(run, folder)
    except (ConfigError, _DamagedError) as error:
        return Run(name, folder, "damaged", str(error), run.settings, run.method, run.task)


def _identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {
            "method": str(settings["method"]),
            "task": f"{settings['env.kind']}/{settings['env.name']}",
            "seed": int(settings["seed"]),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise _DamagedError(f"{CONFIG} holds no settings of a run ({error})") from error


def _with_results(run: Run, folder: Path) -> Run:
    dreams = tuple(_dreams(folder))
    if run.stage in ("pretrain", "label"):
        done = (folder / MARK).is_file() or (folder / "pretrain" / "last.ckpt").is_file()
        if done:
            return replace(run, state="finished", dreams=dreams)
        return replace(run, **_unfinished(folder))
    if not (folder / RESULT).is_file():
        return replace(run, dreams=dreams, **_unfinished(folder))
    tree = _json(folder / RESULT, dict)
    try:
        policies = {
            str(who): Policy(_number(found["return"]), _optional(found.get("success")))
            for who, found in tree["policies"].items()
        }
        agent = policies.pop("agent")
        frames = int(tree["env_frames"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _DamagedError(f"{RESULT} holds no evaluation ({error!r})") from error
    extra = [Dream(str(k), 0, float(v)) for k, v in dict(tree.get("dream", {})).items()]
    run = replace(
        run, frames=frames, agent=agent, baselines=policies, dreams=(*dreams, *extra),
        checkpoint=str(tree.get("checkpoint", "")),
    )  # fmt: skip
    budget = _budget(run.settings)
    kept = bool(run.settings.get("evaluate.keep_best"))  # of an agent before the end, then
    if (folder / MARK).is_file() or kept or run.stage == "evaluate" or frames >= budget:
        return replace(run, state="finished")
    return replace(run, why=f"evaluated after {frames:,} of {budget:,} frames")


def _budget(settings: Mapping[str, Any]) -> int:
    """Environment frames that a run is to see."""
    repeat = settings.get("env.action_repeat") or SUITE_REPEAT.get(settings.get("env.kind", ""), 1)
    return int(settings.get("finetune.agent_steps", 0)) * int(repeat)


def _unfinished(folder: Path) -> dict[str, Any]:
    error = last_error(folder / "log.txt")
    if error:
        return {"state": "failed", "why": error}
    saved = sorted(folder.glob("*/*.ckpt"), key=lambda path: path.stat().st_mtime)
    where = f"newest checkpoint {saved[-1].relative_to(folder)}" if saved else "no checkpoint yet"
    return {"state": "unfinished", "why": where}


def last_error(log: Path, since: int = 0) -> str:
    """The error that a run has told last in its log; empty if it told none.

    Args:
        log: The file; it may be missing.
        since: Bytes of it that are older.
    """
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(since, os.fstat(file.fileno()).st_size - _TAIL))
        lines = file.read().decode("utf-8", "replace").splitlines()
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return redact_text(told[-1]) if told else ""


def _dreams(folder: Path) -> Iterator[Dream]:
    """Everything that was measured of dreams: by the run, ``mapo-dreams``, or the benchmark."""
    if (folder / _TOLD).is_file():
        for row in _rows(_json(folder / _TOLD, list), _TOLD, "dream"):
            yield Dream(f"error, {row['dream']}", int(row["frames_ahead"]), _number(row["mean"]))
    for name in _JUDGED:
        if not (folder / name).is_file():
            continue
        found = _json(folder / name, (list, dict))
        if isinstance(found, dict):
            yield from _measured(found, name)
            continue
        for row in _rows(found, name, "aspect", "dream", "measure"):
            if row["mean"] is not None:
                whose = "" if row["dream"] == "dream" else f", {row['dream']}"
                measure = f"{row['aspect']}: {row['measure']}{whose}"
                yield Dream(measure, int(row["frames_ahead"]), _number(row["mean"]))
    if (folder / _FORESIGHT).is_file():
        found = _json(folder / _FORESIGHT, list)
        for name, value in zip(("now", "sum of ten steps ahead"), found, strict=False):
            yield Dream(f"reward foreseen, correlation: {name}", 0, _number(value))


def _measured(found: Mapping[str, Any], name: str) -> Iterator[Dream]:
    """Errors by name and frames ahead, such as ``{"told 5": 21.0}``."""
    for key, value in found.items():
        what, _, ahead = key.rpartition(" ")
        if what and not ahead.isdecimal():
            raise _DamagedError(f"{name} names no number of frames: '{key}'")
        if what:
            yield Dream(f"error, {what}", int(ahead), _number(value))


def _rows(found: Sequence[Any], name: str, *keys: str) -> Iterator[Mapping[str, Any]]:
    for row in found:
        lacks = [
            k for k in (*keys, "frames_ahead", "mean") if not isinstance(row, dict) or k not in row
        ]
        if lacks:
            raise _DamagedError(f"{name} has a row without {', '.join(lacks)}")
        yield row


def _json(path: Path, kind: type | tuple[type, ...]) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _DamagedError(f"{path.name} cannot be read ({error})") from error
    if not isinstance(found, kind):
        raise _DamagedError(f"{path.name} is not what a run writes: {type(found).__name__}")
    return found


def _number(value: Any) -> float:
    found = float(value)
    if not math.isfinite(found):
        raise _DamagedError(f"a result is {found}, which is no number to compare")
    return found


def _optional(value: Any) -> float | None:
    return None if value is None else _number(value)
