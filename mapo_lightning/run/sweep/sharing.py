"""Pre-training that several points of a sweep have in common, which is then done once.

Two points share it where every setting is the same that pre-training may read. A setting counts as
read unless it is listed here: to train a model twice costs hours, to share a wrong one costs a
result.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from mapo_lightning.run.config import RunConfig

if TYPE_CHECKING:
    from mapo_lightning.run.sweep.plan import Point

NOT_READ = (
    "stage",
    "run_dir",
    "resume",
    "replay",
    "agent",
    "finetune",
    "evaluate",
    "callbacks.progress",
    "trainer.requeue",
    "tracking",
    "launch",
    "vlm.server.base_url",
)
"""Keys and sections that change nothing in pre-training. `env` is another: see `_env_not_read`."""


def digest(cfg: RunConfig, flat: Mapping[str, Any]) -> str:
    """Digest of every setting of a run that its pre-training may read.

    Args:
        cfg: The run.
        flat: The same by dotted keys.

    Returns:
        12 hexadecimal digits.
    """
    read = {key: value for key, value in flat.items() if _is_read(key, cfg)}
    content = json.dumps(read, sort_keys=True, default=str)
    return hashlib.blake2b(content.encode(), digest_size=6).hexdigest()


def shared(points: Sequence[Point]) -> dict[str, str]:
    """Name of a point -> digest of the pre-training that it shares with others."""
    found = {
        point.name: digest(point.composed.config, point.composed.flat)
        for point in points
        if _pretrains_and_tunes(point.composed.config)
    }
    counts = Counter(found.values())
    return {name: value for name, value in found.items() if counts[value] > 1}


def _pretrains_and_tunes(cfg: RunConfig) -> bool:
    return cfg.stage == "all" and bool(cfg.pretraining)


def _is_read(key: str, cfg: RunConfig) -> bool:
    listed = (*NOT_READ, *_env_not_read(cfg))
    return not any(key == name or key.startswith(f"{name}.") for name in listed)


def _env_not_read(cfg: RunConfig) -> Iterator[str]:
    """Keys of the task that pre-training does not read: rendered videos may show it."""
    if cfg.data.kind == "metaworld_experts":  # whose films leave the task out
        return
    for field in fields(cfg.env):
        if field.name != "render_quality" or cfg.data.kind != "demo":
            yield f"env.{field.name}"
