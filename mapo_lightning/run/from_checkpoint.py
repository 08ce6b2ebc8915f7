"""Reads the settings of a run from the checkpoint that it plays or resumes.

All settings are taken from a run of this user's own, and few from anybody else's (`foreign.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from mapo_lightning.config.command_line import CommandLine
from mapo_lightning.config.compose import Base, Composed, compose, load_yaml
from mapo_lightning.config.redact import HIDDEN
from mapo_lightning.ownership import is_own, own_text
from mapo_lightning.run.config import RunConfig
from mapo_lightning.run.foreign import describer_is_off, settings_of, taken
from mapo_lightning.run.renamed import RENAMED
from mapo_lightning.training.settings import seed_after
from mapo_lightning.types import ConfigError

log = logging.getLogger(__name__)

_OF_THE_START = ("stage", "run_dir", "init_from", "checkpoint", "resume")
_OF_THE_MACHINE = ("accelerator", "devices", "num_nodes", "strategy", "capture")


class Resumed(NamedTuple):
    """The checkpoint that a run goes on from; empty for a run that starts."""

    path: Path = Path()
    phase: str = ""
    """tokenizer, pretrain, finetune, or empty."""
    updates: int = 0
    """Optimiser updates made so far."""
    metadata: Mapping[str, Any] = MappingProxyType({})
    """What the checkpoint tells about itself."""

    @property
    def at(self) -> int:
        """Position on the x-axis of the curves: updates, or simulator frames in fine-tuning."""
        return int(self.metadata.get("env_frames") or self.updates)

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
    of the command line win over them, and ``config=FILE`` replaces them.

    Raises:
        MapoError: As `compose` and `read_checkpoint`.
    """
    words = _by_key(argv)
    given, played = words.get("resume", "null"), words.get("checkpoint", "null")
    if given != "null":
        from mapo_lightning.training.export import check_resumable

        path = Path(given)
        check_resumable(path)
        if path.is_dir():
            from mapo_lightning.training.checkpoint import newest_checkpoint

            path = newest_checkpoint(path)
        argv = [f"resume={path}" if word.startswith("resume=") else word for word in argv]
        base = None if "config" in words else _run_of(path, words)
        return compose(argv, RunConfig, conf_dir, base, RENAMED)
    if words.get("stage") == "evaluate" and played != "null":
        return compose(argv, RunConfig, conf_dir, agent_settings(Path(played), argv), RENAMED)
    return compose(argv, RunConfig, conf_dir, renamed=RENAMED)


def agent_settings(path: Path, words: Sequence[str] = (), videos: bool = False) -> Base:
    """What a checkpoint's agent needs in order to act, without what belonged to its training.

    Args:
        path: The checkpoint.
        words: What the user has typed, ``key=value``; wins over what is returned here.
            With ``config=FILE`` nothing is.
        videos: Whether videos will be read.

    Raises:
        CheckpointError: The file is no checkpoint, or does not hold its settings.
        ConfigError: The checkpoint is somebody else's, and names what only the user may choose.
    """
    content, typed = _read(path), _by_key(words)
    if "config" in typed:
        return "", {}
    base = _settings(path, content["mapo"], typed, videos)
    for name in _OF_THE_START:
        base.pop(name, None)
    for name in _OF_THE_MACHINE:
        base.get("trainer", {}).pop(name, None)
    base.get("tracking", {}).pop("parent", None)  # of the sweep that it was trained in
    played = base.get("evaluate", {})
    numbers = all(isinstance(played.get(name), int) for name in ("seed", "episodes"))
    if played.get("keep_best") and numbers:  # these seeds have chosen the agent
        played["seed"] = seed_after(played["seed"], played["episodes"])
    _fit_silence(base, content, typed)
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
    stage = _stage_of(phase)
    if cfg.stage not in ("all", stage):
        advice = "init_from= starts fine-tuning from it" if phase == "pretrain" else "leave it out"
        raise ConfigError(
            f"'{path}' is a checkpoint of stage={stage}, which stage={cfg.stage} cannot resume; "
            f"{advice if cfg.stage == 'finetune' else 'leave out stage='}"
        )
    # The MLflow runs of somebody else's checkpoint are not ours to go on with.
    metadata = content["mapo"] if _is_own(content["mapo"]) else {}
    return Resumed(path, phase, content.get("global_step", 0), metadata)


def _run_of(path: Path, words: Mapping[str, str]) -> Base:
    """Settings of the run that wrote a checkpoint, and its folder where that is the user's own."""
    content = _read(path)
    metadata = content["mapo"]
    folder = path.absolute().parent.parent
    saved = folder / "config.yaml"
    start: dict[str, Any] = {"checkpoint": None, "resume": None, "run_dir": ""}
    if own_text(saved) is not None:
        # The file holds secrets that the checkpoint hides.
        base, start["run_dir"] = _current(load_yaml(saved)), str(folder)
    else:
        base = _settings(path, metadata, words, metadata["stage"] != "finetune")
        if saved.is_file():
            log.info("'%s' is not as your run has saved it, and is not read", saved)
        if not _is_own(metadata):
            start["stage"] = _stage_of(metadata["stage"])
    _fit_silence(base, content, words)
    return f"the settings of '{path}'", base | start


def _stage_of(phase: str) -> str:
    """The value of stage= that a phase belongs to."""
    return "pretrain" if phase == "tokenizer" else phase


def _fit_silence(
    base: dict[str, Any], content: Mapping[str, Any], words: Mapping[str, str]
) -> None:
    """Where no describer is queried, give its vectors, all zero, the width of the networks."""
    vlm = base.get("vlm", {})
    if describer_is_off(words) or vlm.get("kind") == "none":
        from mapo_lightning.training.checkpoint import semantic_dim_of

        shown = {name: vlm[name] for name in ("window", "collect") if name in vlm}
        base["vlm"] = {"kind": "none", "hidden_dim": semantic_dim_of(content), **shown}


def _by_key(words: Sequence[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in CommandLine.parse(words).overrides)


def _is_own(metadata: Mapping[str, Any]) -> bool:
    """Whether this user has made the checkpoint."""
    from mapo_lightning.training.metadata import signed_part

    return is_own(signed_part(metadata), metadata.get("config_signature") or "")


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint whose tensors stay on disk."""
    # Torch takes seconds to import: a command line that names no checkpoint does without.
    from mapo_lightning.training.checkpoint import read_checkpoint

    return read_checkpoint(path, mapped=True)


def _settings(
    path: Path, metadata: Mapping[str, Any], words: Mapping[str, str], videos: bool
) -> dict[str, Any]:
    content = settings_of(metadata.get("config") or "", path)
    shown: dict[str, Any] = _without_hidden(content)
    current = _current(shown)
    return current if _is_own(metadata) else taken(current, path, words, videos)


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
