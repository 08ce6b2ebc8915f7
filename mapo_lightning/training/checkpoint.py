"""Reads checkpoints: plain tensors, strings and numbers only, never code.

Checkpoints are Lightning's, with one more entry, ``mapo``: the metadata (configuration, stage,
widths, tracking run) that lets a file be used without the command that made it.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mapo_lightning.files import atomic_write
from mapo_lightning.models.interfaces import WorldModel
from mapo_lightning.training.export import is_export, read_export
from mapo_lightning.training.finite import refuse_broken_weights
from mapo_lightning.training.metadata import (
    EXTRA,
    STAGES,
    check_archive,
    check_metadata,
    check_state,
    check_tensors,
    printable,
)
from mapo_lightning.types import CheckpointError

log = logging.getLogger(__name__)

BEST = "best.ckpt"
"""File of the best agent so far, beside ``last.ckpt``, where ``evaluate.keep_best`` asks for it."""


class LoadReport(NamedTuple):
    """What became of every part when a pre-trained model was taken over."""

    loaded: tuple[str, ...]
    """Parts whose weights come from the checkpoint."""
    fresh: tuple[str, ...]
    """Parts of the new model that start from their initialisation."""
    ignored: tuple[str, ...]
    """Parts of the checkpoint that the new model has no use for."""

    def __str__(self) -> str:
        named = {k: ", ".join(v) or "nothing" for k, v in self._asdict().items()}
        return "loaded {loaded}; fresh {fresh}; ignored {ignored}".format(**named)


def write_checkpoint(content: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint at once or not at all: a killed process leaves the older one whole.

    Raises:
        CheckpointError: The disk is full or cannot be written.
    """
    try:
        with atomic_write(path, durable=True, sole_writer=True) as draft, draft.open("wb") as file:
            torch.save(dict(content), file)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"cannot write the checkpoint '{path}': {reason}. Free some disk space; the checkpoint "
            "before it is intact, and resume= continues from there"
        ) from error


def read_checkpoint(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Read a checkpoint of this package, or an export of one.

    Args:
        path: The file; or the folder of an export.
        mapped: Leave the tensors on disk until they are used: enough to read the metadata.

    Raises:
        CheckpointError: It is missing, damaged, holds code, or was not made by this package.
    """
    if is_export(path):
        content = read_export(path)
        check_metadata(content["mapo"], path)
        check_state(content, path)
        return content
    if not path.is_file():
        raise CheckpointError(
            f"no checkpoint at '{path}'; give the path of a .ckpt file, or the folder of an export"
        )
    check_archive(path)
    content = _loaded(path, mapped=True)  # what is claimed costs nothing yet
    check_tensors(content, path)
    if not isinstance(content, dict) or "mapo" not in content or "state_dict" not in content:
        raise CheckpointError(f"'{path}' was not saved by this package: it has no entry 'mapo'")
    check_metadata(content["mapo"], path)
    check_state(content, path)
    return content if mapped else _loaded(path, mapped=False)


def _loaded(path: Path, mapped: bool) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(
            path, map_location="cpu", weights_only=True, mmap=mapped
        )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"'{path}' is refused: it is damaged, or holds more than plain tensors, strings and "
            "numbers; take an intact checkpoint of this package"
        ) from error
    except Exception as error:  # torch's reader takes apart what a damaged file holds
        reason = printable(str(error)) or type(error).__name__
        raise CheckpointError(
            f"'{path}' is damaged or not a checkpoint ({reason}); take an "
            "earlier one from the same folder"
        ) from error
    return content


def semantic_dim_of(content: Mapping[str, Any]) -> int | None:
    """Width V of the semantic vectors that a checkpoint's networks take; None if they take none."""
    names = "world_model.source.project.weight", "world_model.predictor.phrases.put.weight"
    weight = next((w for n in names if (w := content["state_dict"].get(n)) is not None), None)
    return int(weight.shape[1]) if weight is not None and weight.ndim == 2 else None


def newest_checkpoint(folder: Path) -> Path:
    """The newest whole checkpoint of a run's folder, one of fine-tuning before pre-training's.

    Raises:
        CheckpointError: There is none.
    """
    for phase in reversed(STAGES):
        files = sorted((folder / phase).glob("*.ckpt"), key=lambda file: -file.stat().st_mtime_ns)
        for path in files:
            try:
                read_checkpoint(path, mapped=True)
            except CheckpointError as error:
                log.warning("%s", error)
            else:
                return path
    raise CheckpointError(f"the folder '{folder}' holds no checkpoint that can be read")


def check_fit(model: nn.Module, content: Mapping[str, Any], path: Path) -> None:
    """Compare a checkpoint with a model of all its parts, tensor by tensor.

    Raises:
        CheckpointError: Names the first tensor that is missing, left over or of another shape.
    """
    metadata = content["mapo"]
    advice = (
        f"'{path}' was made with method={metadata.get('method')} and brings its own settings "
        "along; leave out method=, size=, env= and world_model.*"
    )
    _check_part("", model.state_dict(), content["state_dict"], advice)


def load_pretrained(
    world_model: WorldModel, checkpoint: Mapping[str, Any], parts: Sequence[str]
) -> LoadReport:
    """Take over named parts of a pre-trained world model, each of them exactly.

    Deviation: clean-start. ContextWM and PreLAR make one optimiser step on the fresh model before
    they load, and keep its Adam moments; here every optimiser starts after loading.

    Args:
        world_model: The model of the new stage.
        checkpoint: As `read_checkpoint` gives it.
        parts: Names of the parts to take over, if the new model has them.

    Raises:
        CheckpointError: The checkpoint is not of pre-training; or a tensor of a part is missing,
            left over or of another shape.
    """
    if checkpoint["mapo"].get("stage") == "finetune":
        raise CheckpointError(
            "init_from= takes a checkpoint of pre-training, and this one was made by fine-tuning; "
            "resume= continues it, stage=evaluate checkpoint= evaluates its agent"
        )
    stored = _by_part(world_model, checkpoint["state_dict"])
    children = {name: part for name, part in world_model.parts().items() if any(part.state_dict())}
    wanted = [name for name in parts if name in children]
    made_by = checkpoint["mapo"].get("method", "another method")
    advice = (
        f"the checkpoint was made with method={made_by}; use the same method=, size= and vlm=, and "
        "the same world_model.lower.kind"
    )
    for part in wanted:
        _check_part(f"{part}.", children[part].state_dict(), stored.get(part, {}), advice)
        refuse_broken_weights(stored[part], f"the part '{part}' of the checkpoint")
        children[part].load_state_dict(stored[part])
    return LoadReport(
        tuple(wanted),
        tuple(name for name in children if name not in wanted),
        tuple(name for name in stored if name not in wanted),
    )


def _by_part(world_model: WorldModel, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Sort a checkpoint's tensors by part; those of no part of the new model by their first name.

    The state of a whole world model, such as its count of updates, belongs to no part.
    """
    assert isinstance(world_model, nn.Module)
    places = {id(module): name for name, module in world_model.named_modules()}
    prefixes = {f"{places[id(part)]}.": name for name, part in world_model.parts().items()}
    stored: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        head, _, rest = key.partition(".")
        if head != "world_model" or rest == EXTRA:
            continue
        prefix = next((p for p in prefixes if rest.startswith(p)), "")
        part, name = (prefixes[prefix], rest[len(prefix) :]) if prefix else rest.split(".", 1)
        stored.setdefault(part, {})[name] = tensor
    return stored


def _check_part(
    prefix: str, wanted: Mapping[str, Tensor], stored: Mapping[str, Tensor], advice: str
) -> None:
    """Name the first tensor that does not fit."""
    for name, tensor in wanted.items():
        if name.endswith(EXTRA):
            continue
        if name not in stored:
            raise CheckpointError(f"the checkpoint has no '{prefix}{name}': {advice}")
        if stored[name].shape != tensor.shape:
            raise CheckpointError(
                f"'{prefix}{name}' is {tuple(stored[name].shape)} in the checkpoint and "
                f"{tuple(tensor.shape)} in the model: {advice}"
            )
    for name in stored:
        if name not in wanted and not name.endswith(EXTRA):
            raise CheckpointError(f"the model has no '{prefix}{name}': {advice}")
