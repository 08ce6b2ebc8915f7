"""Makes of a checkpoint what can be handed to others: ``mapo-export``.

Usage: mapo-export checkpoint=runs/NAME/finetune/last.ckpt out=DIR

Writes into DIR, a new folder, the model's tensors (model.safetensors), a card with their hash and
the settings that shape networks, environment and preprocessing (card.json), and a short README.md.
Left out are the optimisers, folders, addresses, ids of runs, and everything secret. ``init_from=``,
``checkpoint=`` and ``load_agent`` take DIR in place of a checkpoint; ``resume=`` does not.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from mapo_lightning.config.redact import HIDDEN, redact
from mapo_lightning.run.renamed import RENAMED
from mapo_lightning.types import CheckpointError, ConfigError, MapoError

KEPT = (
    "method",
    "seed",
    "data",
    "vlm.kind",
    "vlm.direction",
    "vlm.hidden_dim",
    "vlm.max_new_tokens",
    "vlm.flow_min_percent",
    "vlm.model",
    "vlm.window",
    "vlm.collect",
    "vlm.embed",
    "env",
    "replay",
    "world_model",
    "agent",
    "pretrain",
    "finetune",
    "evaluate",
)
"""Sections and keys of the settings that an export hands on."""
LEFT_OUT = (
    "data.root",
    "data.cache_mb",
    "data.workers",
    "data.limits",
    "env.num_envs",
)
"""Keys inside them that are about the machine where the checkpoint was made."""
_LOADED = ("vlm.model", "vlm.embed.encoder")  # a name on a hub, or a folder of this machine
_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WORDS = ("checkpoint", "out")


def main(argv: Sequence[str] | None = None) -> int:
    """Export a checkpoint; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or {"-h", "--help"} & set(words):
        sys.stdout.write(__doc__ or "")
        return 0
    try:
        given = _given(words)
        export(Path(given["checkpoint"]), Path(given["out"]))
    except MapoError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"Exported to {given['out']}\n")
    return 0


def export(checkpoint: Path, out: Path) -> None:
    """Write the export of a checkpoint into the folder ``out``, which must be new or empty.

    Raises:
        CheckpointError: The checkpoint cannot be read or exported, or ``out`` cannot be written.
    """
    # These import torch, which takes seconds: the words were checked without.
    from mapo_lightning.training.checkpoint import read_checkpoint
    from mapo_lightning.training.export import write_export

    content = read_checkpoint(checkpoint)
    settings = yaml.safe_load(content["mapo"].get("config") or "")
    if not isinstance(settings, dict):
        raise CheckpointError(
            f"'{checkpoint}' does not hold the settings it was made with, without which nobody "
            "could use the export"
        )
    made_with = {name: version(name) for name in ("mapo-lightning", "torch")}
    write_export(content, shareable(RENAMED.translate(settings)), made_with, out)


def shareable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Reduce settings to what others need, as `KEPT` lists it, without secrets.

    Args:
        settings: All settings of a run, as plain dicts, lists and leaves.
    """
    kept: dict[str, Any] = {}
    for key, value in _leaves(redact(dict(settings))):
        inside = any(f"{key}.".startswith(f"{name}.") for name in KEPT)
        outside = any(f"{key}.".startswith(f"{name}.") for name in LEFT_OUT)
        if not inside or outside:
            continue
        if key in _LOADED and isinstance(value, str) and not _is_on_a_hub(value):
            value = Path(value).name
        if isinstance(value, str) and ("${" in value or HIDDEN in value):
            continue
        *parents, name = key.split(".")
        owner = kept
        for parent in parents:
            owner = owner.setdefault(parent, {})
        owner[name] = value
    return kept


def _is_on_a_hub(name: str) -> bool:
    return _HUB.fullmatch(name) is not None and not Path(name).exists()


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        key = f"{prefix}{name}"
        found += _leaves(value, f"{key}.") if isinstance(value, dict) and value else [(key, value)]
    return found


def _given(words: Sequence[str]) -> dict[str, str]:
    given = dict(word.partition("=")[::2] for word in words)
    odd = [name for name in given if name not in _WORDS]
    if odd:
        raise ConfigError(f"mapo-export has no word '{odd[0]}'; it takes checkpoint=PATH out=DIR")
    for name in _WORDS:
        if not given.get(name):
            raise ConfigError(
                f"mapo-export needs {name}=; type: mapo-export checkpoint=PATH out=DIR"
            )
    return given
