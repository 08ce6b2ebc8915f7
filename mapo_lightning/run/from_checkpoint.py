"""Reads the settings of a run from the checkpoint that it plays or resumes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from mapo_lightning.config.command_line import CommandLine
from mapo_lightning.config.compose import Base, Composed, compose, load_yaml
from mapo_lightning.config.redact import HIDDEN
from mapo_lightning.run.config import RunConfig
from mapo_lightning.run.renamed import RENAMED
from mapo_lightning.types import CheckpointError, ConfigError

log = logging.getLogger(__name__)

_OF_THE_START = ("stage", "run_dir", "init_from", "checkpoint", "resume")
_OF_THE_MACHINE = ("accelerator", "devices", "num_nodes", "strategy", "capture")


class Resumed(NamedTuple):
    """The checkpoint that a run goes on from; empty for a run that starts."""

    path: Path = Path()
    phase: str = ""
    """pretrain, finetune, or empty."""
    updates: int = 0
    """Optimiser updates made so far."""
    metadata: Mapping[str, Any] = MappingProxyType({})
    """What the checkpoint tells about itself."""

    def finished(self, phase: str, updates: int) -> bool:
        """Whether ``phase`` has had all of its updates before."""
        if self.phase != phase or self.updates < updates:
            return False
        log.info("'%s' has all of its %d updates: nothing is left to do", self.path, updates)
        return True

    def tracked(self, phase: str) -> str | None:
        """The MLflow run that ``phase``, or the ``parent`` of all, goes on with."""
        if phase == "parent":
            return self.metadata.get("mlflow_parent") or None
        return (self.metadata.get("mlflow_run") or None) if phase == self.phase else None


def configure(argv: Sequence[str], conf_dir: Path) -> Composed[RunConfig]:
    """Compose a run; ``resume=`` and ``stage=evaluate checkpoint=`` need no other word.

    The settings of the checkpoint's own run take the place of ``conf/config.yaml``. Groups and keys
    of the command line win over them.

    Raises:
        MapoError: As `compose` and `read_checkpoint`.
    """
    words = dict(word.split("=", 1) for word in CommandLine.parse(argv).overrides)
    given, played = words.get("resume", "null"), words.get("checkpoint", "null")
    if given != "null":
        from mapo_lightning.training.export import check_resumable

        path = Path(given)
        check_resumable(path)
        if path.is_dir():
            from mapo_lightning.training.checkpoint import newest_checkpoint

            path = newest_checkpoint(path)
        argv = [f"resume={path}" if word.startswith("resume=") else word for word in argv]
        return compose(argv, RunConfig, conf_dir, _run_of(path), RENAMED)
    if words.get("stage") == "evaluate" and played != "null":
        return compose(argv, RunConfig, conf_dir, agent_settings(Path(played)), RENAMED)
    return compose(argv, RunConfig, conf_dir, renamed=RENAMED)


def agent_settings(path: Path) -> Base:
    """What a checkpoint's agent needs in order to act, without what belonged to its training.

    Raises:
        CheckpointError: The file is no checkpoint, or does not hold its settings.
    """
    base = _settings(path, _read(path)["mapo"])
    for name in _OF_THE_START:
        base.pop(name, None)
    for name in _OF_THE_MACHINE:
        base.get("trainer", {}).pop(name, None)
    played = base.get("evaluate", {})
    if played.get("keep_best"):  # these seeds have chosen the agent: they say too much of it
        played["seed"] += played["episodes"]
    return f"the settings in '{path}'", base


def resumed(cfg: RunConfig) -> Resumed:
    """The checkpoint that ``resume=`` names, if it names one.

    Raises:
        ConfigError: It belongs to another stage than the one that is asked for.
        CheckpointError: The file is no checkpoint.
    """
    if cfg.resume is None:
        return Resumed()
    path = Path(cfg.resume)
    content = _read(path)
    phase = content["mapo"]["stage"]
    if cfg.stage not in ("all", phase):
        advice = "init_from= starts fine-tuning from it" if phase == "pretrain" else "leave it out"
        raise ConfigError(
            f"'{path}' is a checkpoint of stage={phase}, which stage={cfg.stage} cannot resume; "
            f"{advice if cfg.stage == 'finetune' else 'leave out stage='}"
        )
    return Resumed(path, phase, int(content["global_step"]), content["mapo"])


def _run_of(path: Path) -> Base:
    """Settings of the run that wrote a checkpoint, and its folder where that is still there."""
    metadata = _read(path)["mapo"]
    folder = path.absolute().parent.parent
    saved = folder / "config.yaml"
    # The file holds secrets that the checkpoint hides.
    base = _current(load_yaml(saved)) if saved.is_file() else _settings(path, metadata)
    base["run_dir"] = str(folder) if saved.is_file() else ""
    return f"the settings of '{path}'", base | {"checkpoint": None, "resume": None}


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint whose tensors stay on disk."""
    # Torch takes seconds to import: a command line that names no checkpoint does without.
    from mapo_lightning.training.checkpoint import read_checkpoint

    return read_checkpoint(path, mapped=True)


def _settings(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    content = yaml.safe_load(metadata.get("config") or "")
    if not isinstance(content, dict):
        raise CheckpointError(
            f"'{path}' does not hold the settings it was made with; give them with config=FILE, "
            "the config.yaml of its run"
        )
    shown: dict[str, Any] = _without_hidden(content)
    return _current(shown)


def _current(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that an earlier version saved, under the names of this one."""
    return RENAMED.translate(settings)


def _without_hidden(tree: Any) -> Any:
    """Leave out what redaction has hidden: the default, or the command line, stands in."""
    if isinstance(tree, dict):
        kept = {name: _without_hidden(item) for name, item in tree.items()}
        return {name: item for name, item in kept.items() if not _is_hidden(item)}
    return tree


def _is_hidden(value: Any) -> bool:
    return isinstance(value, str) and HIDDEN in value
