"""Random numbers of processes that train together: each has its own, far from the others'."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from callbacks.resume import Resume, states
from mapo_lightning.training.ranks import seed_of_rank

CPU: Any = SimpleNamespace(device=torch.device("cpu"))


def seed() -> None:
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)


def drawn(rank: int, *, resumed: dict[str, Any] | None = None, batches: int = 1) -> list[float]:
    """What torch, numpy and Python draw in the last of some first batches of a rank."""
    seed()
    callback, trainer = Resume(), SimpleNamespace(global_rank=rank)
    callback._resumed = resumed
    for batch in range(batches):
        callback.on_train_batch_start(trainer, CPU, None, batch)  # type: ignore[arg-type]
        found = [float(torch.rand(())), float(np.random.rand()), random.random()]
    return found


def test_each_rank_draws_its_own_numbers_and_the_first_those_of_a_single_process() -> None:
    seed()
    alone = [float(torch.rand(())), float(np.random.rand()), random.random()]
    assert drawn(0) == alone
    every = [number for rank in range(4) for number in drawn(rank)]
    assert len(set(every)) == len(every)


def test_a_rank_begins_once_and_a_resumed_one_goes_on() -> None:
    assert drawn(1, batches=1) != drawn(1, batches=2)
    torch.manual_seed(99)
    state = states(CPU.device)
    following = float(torch.rand(()))
    assert drawn(1, resumed=state)[0] == following


@pytest.mark.parametrize("number", [0, 5, 2**32 - 1])
def test_seeds_of_ranks_are_none_of_neighbouring_runs(number: int) -> None:
    assert seed_of_rank(number, 0) == number
    others = {seed_of_rank(s, r) for s in range(100) for r in range(1, 64)}
    assert len(others) == 100 * 63
    assert min(others) > 10_000
    assert max(others) < 2**32
