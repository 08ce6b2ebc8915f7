"""What the processes of a run have of their own: seeds, and their part of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch.distributed as dist


def seed_of_rank(seed: int, rank: int) -> int:
    """Seed of a process; that of the first is ``seed`` itself.

    Far from those of other ranks and of runs with neighbouring seeds.
    """
    if not rank:
        return seed
    return int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])


def of_all_ranks(own: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Gather the state of every process, in the order of the ranks; called on all of them.

    Args:
        own: State of this process: plain numbers, strings and tensors.
    """
    if not dist.is_initialized():
        return [dict(own)]
    found: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, dict(own))
    return found
