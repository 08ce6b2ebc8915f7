"""Checks what a checkpoint says about itself, and that it is no larger than it looks.

A checkpoint may come from anybody. These checks come before any of it is used, so that a damaged or
hostile file is one sentence, and claims of huge tensors cost no memory.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mapo_lightning.ownership import MAX_SETTINGS
from mapo_lightning.types import CheckpointError

STAGES = ("tokenizer", "pretrain", "finetune")
"""Trainings that a checkpoint may be of, in their order."""
EXTRA = "_extra_state"
"""End of the keys under which torch keeps what is no tensor, such as an agent's own optimisers."""
MAX_ACTION_DIM = 10_000
"""Largest width of an action."""
_NAME = re.compile(r"[\w.+\- ]{1,100}")  # of a method
_TENSOR = re.compile(r"[\w.\-]{1,500}")
_RUN = re.compile(r"([0-9a-f]{32})?")
_MOST = 1_000_000  # objects in a checkpoint


def check_archive(path: Path) -> None:
    """See that the archive which a checkpoint is cannot grow when it is read.

    Raises:
        CheckpointError: It is no archive, its parts are compressed or overlap.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except OSError as error:
        raise CheckpointError(
            f"'{path}' cannot be read ({error.strerror}); look at its permissions and at the disk"
        ) from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise CheckpointError(
            f"'{path}' is damaged or not a checkpoint ({printable(str(error))}); take an earlier "
            "one from the same folder"
        ) from error
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise CheckpointError(f"'{path}' is refused: its parts are compressed, and ours never are")
    if sum(part.file_size for part in parts) > path.stat().st_size:
        raise CheckpointError(f"'{path}' is refused: its parts are larger than the file")


def check_tensors(content: Any, path: Path) -> None:
    """See that every tensor in a checkpoint, however nested, is on disk in full.

    Raises:
        CheckpointError: A tensor repeats itself instead (stride 0), shares its numbers with others,
            or is of an unusual kind; or there are too many objects.
    """
    stored: dict[int, int] = {}
    claimed, seen, left = 0, set[int](), [content]
    while left:
        item = left.pop()
        if not isinstance(item, dict | list | tuple | set | Tensor) or id(item) in seen:
            continue
        seen.add(id(item))
        if len(seen) > _MOST:
            raise CheckpointError(f"'{path}' is refused: it holds more than {_MOST} objects")
        if not isinstance(item, Tensor):
            left += item.values() if isinstance(item, dict) else item
            continue
        if item.layout != torch.strided or item.device.type != "cpu" or item.is_quantized:
            raise CheckpointError(f"'{path}' is refused: it holds a tensor of an unusual kind")
        storage = item.untyped_storage()
        stored[storage._cdata] = storage.nbytes()
        size = item.numel() * item.element_size()
        claimed += size
        if size > storage.nbytes():
            break
    if claimed > sum(stored.values()):
        raise CheckpointError(
            f"'{path}' is refused: its tensors claim {claimed} bytes, more than the file holds"
        )


def check_metadata(metadata: Any, path: Path) -> None:
    """See that checkpoint metadata has the right entries, and no value is out of range.

    Raises:
        CheckpointError: Names the first entry that is wrong.
    """
    if not isinstance(metadata, Mapping) or not all(isinstance(key, str) for key in metadata):
        raise _damaged(path, "mapo", "must hold named entries")
    for name, value in metadata.items():
        if isinstance(value, str) and len(value) > MAX_SETTINGS:
            raise _damaged(path, name, f"has {len(value)} characters")
        if not (value is None or isinstance(value, str | int) or _finite(value)):
            raise _damaged(path, name, "is neither text nor a finite number")
    if metadata.get("stage") not in STAGES:
        raise _damaged(path, "stage", f"must be one of {', '.join(STAGES)}")
    if not _NAME.fullmatch(_text(metadata, "method", path)):
        raise _damaged(path, "method", "is no name")
    for name in ("config", "config_signature"):
        _text(metadata, name, path)
    for name in ("mlflow_parent", "mlflow_run"):
        if not _RUN.fullmatch(_text(metadata, name, path)):
            raise _damaged(path, name, "is not the id of an MLflow run")
    _whole(metadata, "action_dim", 1, MAX_ACTION_DIM, path)
    _whole(metadata, "env_frames", 0, 1 << 53, path)


def check_state(content: Mapping[Any, Any], path: Path) -> None:
    """See that the weights are named tensors, and the counter of updates is one.

    Raises:
        CheckpointError: They are not.
    """
    state = content["state_dict"]
    if not isinstance(state, Mapping):
        raise _damaged(path, "state_dict", "must hold named tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not _TENSOR.fullmatch(name):
            raise _damaged(path, "state_dict", f"has the entry {name!r:.60}")
        if not isinstance(value, Tensor) and not name.endswith(EXTRA):
            raise _damaged(path, "state_dict", f"holds {name[:60]}, which is no tensor")
    _whole(content, "global_step", 0, 1 << 53, path)


def weights_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """A checkpoint's tensors by name, without states that serve learning only."""
    return {k: x for k, x in content["state_dict"].items() if not k.endswith(EXTRA)}


def signed_part(metadata: Mapping[str, Any]) -> str:
    """Return what the signature covers: the settings, and the MLflow runs that resuming writes to.

    With other runs' ids in it, a checkpoint is no longer its user's own.
    """
    config = metadata.get("config") or ""
    runs = [metadata.get(name) or "" for name in ("mlflow_parent", "mlflow_run")]
    return f"# MLflow runs: {' '.join(runs)}\n{config}" if any(runs) else config


def printable(text: str) -> str:
    """Return the first line of a text, without what could steer a terminal."""
    first = (text.splitlines() or [""])[0]
    return "".join(c if c.isprintable() else " " for c in first)[:300]


def _finite(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _text(metadata: Mapping[str, Any], name: str, path: Path) -> str:
    value = metadata.get(name) or ""
    if name == "method" and not value:
        return "unnamed"
    if not isinstance(value, str):
        raise _damaged(path, name, "is no text")
    return value


def _whole(content: Mapping[Any, Any], name: str, low: int, high: int, path: Path) -> None:
    value = content.get(name, low)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _damaged(path, name, f"must be a whole number in [{low}, {high}], got {value!r:.40}")


def _damaged(path: Path, name: str, what: str) -> CheckpointError:
    shown = printable(name)[:60]
    return CheckpointError(f"'{path}' is damaged: its entry '{shown}' {what}; take an intact file")
