"""Small entries for the tests of the replay; the number of an entry shows in all its values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mapo_lightning.data.replay import EntryId, Replay, ReplaySpec
from mapo_lightning.data.settings import ReplayConfig

SPEC = ReplaySpec((4, 4, 3), action_dim=2, semantic_dim=5)


def entry(number: int, first: bool = False, last: bool = False, **change: Any) -> dict[str, Any]:
    return {
        "obs": np.full((4, 4, 3), number % 256, np.uint8),
        "action": np.full(2, 0.0 if first else 0.5, np.float32),
        "reward": np.float32(0.0 if first else number),
        "is_first": first,
        "is_last": last,
        "is_terminal": False,
        "semantic": np.full(5, number / 8, np.float16),
        "has_semantic": not first,
        "position": number % 25,
    } | change


def play(replay: Replay, env_id: int, agent_steps: int, start: int = 0) -> list[EntryId]:
    """Add one whole episode whose rewards and pixels count from ``start``."""
    return [
        replay.add(env_id, entry(start + i, first=i == 0, last=i == agent_steps))
        for i in range(agent_steps + 1)
    ]


def make(root: Path, capacity: int = 100, **settings: Any) -> Replay:
    return Replay(root, ReplayConfig(capacity=capacity, **settings), SPEC)
