"""Makes of a checkpoint what can be handed to others: ``mapo-export``.

Usage: mapo-export checkpoint=runs/NAME/finetune/last.ckpt out=DIR

Writes into DIR, a new folder, the model's tensors (model.safetensors), a card with their hash and
the settings that shape networks, environment and preprocessing (card.json), and a short README.md.
Left out are the optimisers, folders, addresses, ids of runs, and everything secret. ``init_from=``,
``checkpoint=`` and ``load_agent`` take DIR in place of a checkpoint; ``resume=`` does not.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mapo_lightning.config.command_line import small_program
from mapo_lightning.config.redact import HIDDEN, redact
from mapo_lightning.config.schema import flatten, nested
from mapo_lightning.run.foreign import bound_of, settings_of
from mapo_lightning.run.renamed import RENAMED
from mapo_lightning.tracking.versions import package_version
from mapo_lightning.types import ConfigError

_LOADED = ("vlm.model", "vlm.embed.encoder")  # a name on a hub, or a folder of this machine
_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WORDS = ("checkpoint", "out")


def main(argv: Sequence[str] | None = None) -> int:
    """Export a checkpoint; returns the exit code."""
    return small_program(argv, __doc__ or "", _run)


def _run(words: Sequence[str]) -> None:
    given = _given(words)
    export(Path(given["checkpoint"]), Path(given["out"]))
    sys.stdout.write(f"Exported to {given['out']}\n")


def export(checkpoint: Path, out: Path) -> None:
    """Write the export of a checkpoint into the folder ``out``, which must be new or empty.

    Raises:
        CheckpointError: The checkpoint cannot be read or exported, or ``out`` cannot be written.
    """
    # These import torch, which takes seconds: the words were checked without.
    from mapo_lightning.training.checkpoint import read_checkpoint
    from mapo_lightning.training.export import write_export

    content = read_checkpoint(checkpoint)
    settings = settings_of(content["mapo"].get("config") or "", checkpoint)
    made_with = {"mapo-lightning": package_version(), "torch": version("torch")}
    write_export(content, shareable(RENAMED.translate(settings)), made_with, out)


def shareable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Reduce settings to what others' programs take from a file, and names of models.

    Secrets are left out.

    Args:
        settings: All settings of a run, as plain dicts, lists and leaves.
    """
    found = ((key, _portable(key, value)) for key, value in flatten(redact(dict(settings))))
    return nested(
        (key, value)
        for key, value in found
        if (bound_of(key) is not None or key in _LOADED)
        and not (isinstance(value, str) and ("${" in value or HIDDEN in value))
    )


def _portable(key: str, value: Any) -> Any:
    """A model in a folder of this machine is called by the folder's name alone."""
    on_a_hub = key not in _LOADED or not isinstance(value, str) or _is_on_a_hub(value)
    return value if on_a_hub else Path(value).name


def _is_on_a_hub(name: str) -> bool:
    return _HUB.fullmatch(name) is not None and not Path(name).exists()


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
