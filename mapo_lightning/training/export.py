"""Writes and reads exports: the weights of a checkpoint as safetensors, and a card in JSON.

An export is what one hands to others. It is a folder with three files:

- ``model.safetensors``: all tensors of the model, and nothing else;
- ``card.json``: what the checkpoint says about itself (stage, method, the settings that shape
  networks, environment and preprocessing), and the SHA-256 hash of the tensors' file;
- ``README.md``: the same for people.

The hash shows damage. It does not show who made the export: an export is always somebody else's.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mapo_lightning.files import atomic_write
from mapo_lightning.training.metadata import STAGES, weights_of
from mapo_lightning.types import CheckpointError

TENSORS, CARD, README = "model.safetensors", "card.json", "README.md"
VERSION = 1
"""Version of the layout of an export; a reader refuses any other."""

_MOST_BYTES = 1 << 20  # of a card
_BLOCK = 1 << 20  # bytes hashed at once
_KEYS: Mapping[str, type] = {
    "version": int,
    "sha256": str,
    "stage": str,
    "method": str,
    "settings": dict,
    "made_with": dict,
}
"""Keys of every card, and the types of their values."""
_OF_AN_AGENT: Mapping[str, type] = {"action_dim": int, "env_frames": int}
"""Further keys of a fine-tuned one."""
_README = """\
# {method}, {stage}

A world model{agent} of MAPO Lightning {package}.

- Tensors: `{tensors}`, {count} of them, {size:.1f} MB, SHA-256 `{sha256}`.
- Task: {task}.{frames}
- Settings of networks, environment and preprocessing: `{card}`.

{use}

The hash shows damage, not who made these files.
"""


def is_export(path: Path) -> bool:
    """Whether a path names an export: its folder, its tensors or its card."""
    if path.is_dir():
        return (path / CARD).is_file() or (path / TENSORS).is_file()
    return path.suffix == ".safetensors" or path.name == CARD


def check_resumable(path: Path) -> None:
    """Refuse to resume an export.

    Raises:
        CheckpointError: It is one.
    """
    if is_export(path):
        raise CheckpointError(
            f"'{path}' is an export, which holds no state of an optimiser: resume= needs a .ckpt; "
            "init_from= fine-tunes a pre-trained export, stage=evaluate checkpoint= plays an agent"
        )


def write_export(
    content: Mapping[str, Any], settings: Mapping[str, Any], made_with: Mapping[str, str], out: Path
) -> None:
    """Write an export; the card comes last, so that a folder with a card is whole.

    Args:
        content: A checkpoint, as `read_checkpoint` gives it.
        settings: Those that are handed on, as plain dicts, lists and leaves.
        made_with: Package -> version.
        out: Folder; made if missing.

    Raises:
        CheckpointError: The folder is not empty or cannot be written, or the checkpoint holds more
            than tensors.
    """
    metadata = content["mapo"]
    # Optimisers and the like, which go on learning and play no part in acting.
    state = weights_of(content)
    other = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise CheckpointError(
            f"this checkpoint cannot be exported: '{other[0]}' is no tensor, and an export holds "
            "nothing else"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"out='{out}' is there and not empty; give a new folder")
    # Copies: a file of safetensors holds no tensor that shares its numbers with another.
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    card: dict[str, Any] = {
        "version": VERSION,
        "stage": metadata["stage"],
        "method": metadata["method"],
        **{name: metadata[name] for name in _OF_AN_AGENT if name in metadata},
        "settings": dict(settings),
        "made_with": dict(made_with),
    }
    try:
        with atomic_write(out / TENSORS, durable=True) as draft:
            save_file(tensors, draft)
            card["sha256"], size = _hash(draft), draft.stat().st_size
        with atomic_write(out / README) as draft:
            draft.write_text(_readme(card, len(tensors), size), encoding="utf-8")
        with atomic_write(out / CARD, durable=True) as draft:
            draft.write_text(json.dumps(card, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except (OSError, SafetensorError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"cannot write the export '{out}': {reason}") from error


def read_export(path: Path) -> dict[str, Any]:
    """Read an export as `read_checkpoint` reads a checkpoint; its settings become YAML text.

    Args:
        path: Its folder, its tensors or its card.

    Raises:
        CheckpointError: A file is missing, too large or damaged, the hash is another, or the card
            is of another version, or says anything that it should not.
    """
    folder = path if path.is_dir() else path.parent
    card = _read_card(folder / CARD)
    file = folder / TENSORS
    try:
        stat = file.stat()
        found = _known_hash(file, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise CheckpointError(f"the export '{folder}' has no '{TENSORS}' to read") from error
    if found != card["sha256"]:
        raise CheckpointError(
            f"'{file}' is not the file that '{CARD}' names: its SHA-256 is {found[:12]}..., "
            f"{card['sha256'][:12]!a} was promised; copy the export again"
        )
    try:
        state = load_file(file)
    # The header comes from anybody: safetensors checks it before it reads a tensor.
    except (SafetensorError, OSError, ValueError, KeyError, OverflowError, MemoryError) as error:
        reason = ascii((str(error) or type(error).__name__).splitlines()[0][:200])[1:-1]
        raise CheckpointError(
            f"'{file}' is damaged or not a file of safetensors ({reason}); copy the export again"
        ) from error
    metadata = {name: card[name] for name in ("stage", "method", *_OF_AN_AGENT) if name in card}
    text = yaml.safe_dump(card["settings"], sort_keys=False)
    return {"state_dict": state, "mapo": {**metadata, "config": text}, "global_step": 0}


def _read_card(path: Path) -> dict[str, Any]:
    """The card, with exactly the keys that it must have.

    Raises:
        CheckpointError: It is missing, no JSON, of another version, or has other keys.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"the export '{path.parent}' has no '{CARD}' to read") from error
    if len(text) > _MOST_BYTES:
        raise CheckpointError(f"'{path}' is larger than {_MOST_BYTES} bytes: it is no card")
    try:
        card: Any = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"'{path}' is damaged: it is no JSON; copy the export again"
        ) from error
    version = card.get("version") if isinstance(card, dict) else None
    if type(version) is not int or version != VERSION:
        raise CheckpointError(
            f"'{path}' is a card of version {version!a:.20}, and this package reads version "
            f"{VERSION}; use the version of the package that made it"
        )
    wanted = {**_KEYS, **({} if card.get("stage") in STAGES[:-1] else _OF_AN_AGENT)}
    odd = sorted(set(card) ^ set(wanted))
    if odd:
        how = "has no entry" if odd[0] in wanted else "has an unknown entry"
        raise CheckpointError(f"'{path}' {how} {odd[0]!a:.60}; take an intact export")
    for name, kind in wanted.items():
        if type(card[name]) is not kind:
            raise CheckpointError(f"'{path}' is damaged: {name} must be of type {kind.__name__}")
    if card["stage"] not in STAGES or len(card["method"]) > 100:
        raise CheckpointError(f"'{path}' is damaged: there is no such stage or method")
    if card["stage"] == "finetune" and not (card["action_dim"] >= 1 and card["env_frames"] >= 0):
        raise CheckpointError(f"'{path}' is damaged: action_dim or env_frames is negative")
    checked: dict[str, Any] = card
    return checked


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


@functools.lru_cache(maxsize=8)
def _known_hash(path: Path, size: int, date: int) -> str:
    return _hash(path)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _readme(card: Mapping[str, Any], count: int, size: int) -> str:
    env = card["settings"].get("env", {})
    agent = card["stage"] == "finetune"
    frames = f" The agent has seen {card['env_frames']:,} frames of it." if agent else ""
    use = "Fine-tune it: `mapo-train stage=finetune init_from=DIR env=...`"
    if agent:
        use = (
            'Play it: `mapo-train stage=evaluate checkpoint=DIR`, or `load_agent("DIR")` in Python.'
        )
    return _README.format(
        method=card["method"],
        stage=card["stage"],
        agent=" and its agent" if agent else "",
        package=card["made_with"].get("mapo-lightning", ""),
        tensors=TENSORS,
        count=count,
        size=size / 1e6,
        sha256=card["sha256"],
        task=f"{env.get('kind', '')}/{env.get('name', '')}" if agent else "videos",
        frames=frames,
        card=CARD,
        use=use,
    )
