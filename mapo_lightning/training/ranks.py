"""What every process of a run adds to a checkpoint, which only the main process writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist


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
