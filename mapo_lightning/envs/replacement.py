"""Replaces environments whose processes have died, up to a number per hour."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, VectorEnv
from numpy.typing import NDArray

from mapo_lightning.types import EnvironmentSetupError
from mapo_lightning.waiting import waiting

log = logging.getLogger(__name__)

_HOUR = 3600.0


class DeadEnvironmentError(EnvironmentSetupError):
    """The process of an environment has ended, killed from outside or by its simulator."""


class Deaths:
    """Counts processes that died, and says when they are too many.

    Args:
        per_hour: Largest number within an hour.
        clock: Seconds since any moment.
    """

    def __init__(self, per_hour: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_hour, self._clock = per_hour, clock
        self.count = 0
        """All that have died so far."""
        self._recent: deque[float] = deque()

    def add(self, died: int) -> None:
        """Count processes that have just died.

        Raises:
            EnvironmentSetupError: More than ``per_hour`` died within an hour.
        """
        now = self._clock()
        self.count += died
        self._recent += [now] * died
        while self._recent and now - self._recent[0] >= _HOUR:
            self._recent.popleft()
        if len(self._recent) > self.per_hour:
            raise EnvironmentSetupError(
                f"{len(self._recent)} processes of environments have died within an hour, killed "
                "from outside or by their simulators, and env.deaths_per_hour allows "
                f"{self.per_hour}: lower env.num_envs if the memory is full, or try "
                "env.num_envs=1, which shows the simulator's own error"
            )
        log.warning(
            "environments whose process has died and is replaced: %d (%d so far in this run)",
            died,
            self.count,
        )


def died(envs: AsyncVectorEnv) -> NDArray[np.bool_]:
    """Tell which of the environments have lost their process, (N,); no call to them may follow."""
    return np.array([_is_closed(pipe) for pipe in envs.parent_pipes])


def lost_processes(envs: VectorEnv) -> int:
    """Count the processes that are gone, at least one, and end the others."""
    assert isinstance(envs, AsyncVectorEnv)
    count = max(1, int(died(envs).sum()))
    end_processes(envs)
    return count


def _is_closed(pipe: Any) -> bool:
    """Whether nobody is at the other end; throws away what has been sent."""
    try:
        while pipe.poll():
            pipe.recv()
    except (EOFError, OSError):
        return True
    return False


def close_vector_env(envs: VectorEnv) -> None:
    """Close environments, even where a process of theirs has died."""
    try:
        envs.close()  # does nothing the second time
    except (EOFError, ConnectionError):
        assert isinstance(envs, AsyncVectorEnv)
        end_processes(envs)


def end_processes(envs: AsyncVectorEnv) -> None:
    """End all processes of environments at once; Gymnasium has no way to close what is left."""
    for process in envs.processes:
        process.kill()
        process.join()
    for pipe in envs.parent_pipes:
        if pipe is not None:
            pipe.close()
    envs.closed = True


@contextmanager
def awaited(envs: VectorEnv, what: str) -> Iterator[None]:
    """Call the environments inside; what fails in a process of theirs is an error of one sentence.

    Gymnasium would first log the error that it is about to raise, with the process's traceback.
    """
    level = gym.logger.min_level
    if isinstance(envs, AsyncVectorEnv):
        gym.logger.min_level = gym.logger.ERROR + 1
    try:
        with waiting(f"the environments to {what}"):
            yield
    except (EOFError, ConnectionError) as error:
        raise DeadEnvironmentError(
            "the process of an environment has died, killed from outside or by its simulator: "
            "lower env.num_envs if the memory is full, or try env.num_envs=1"
        ) from error
    finally:
        gym.logger.min_level = level
