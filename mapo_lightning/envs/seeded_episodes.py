"""Episodes that can be played again: each has a seed of its own, and the environment counts them.

Checkpoints hold no states of simulators, some of which cannot be saved. But an episode is its seed
and the actions taken, so a fresh simulator gets to the same state by repeating them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

GO_ON = "go_on"
"""Option of `SeededEpisodes.reset`: take up what the attribute ``episode`` describes."""


class OpenEpisode(NamedTuple):
    """An episode to take up."""

    first_seed: int
    """Seed of the environment's first episode, from which those of the others follow."""
    number: int
    """Which of the environment's episodes it is, from 0."""
    actions: NDArray[np.float32]
    """Actions taken so far, (L, A)."""
    withheld: bool = False
    """Show its first frame at the next step, whose action is ignored, as after an episode's end."""


def episode_seed(first_seed: int, number: int) -> int:
    """Seed of an environment's n-th episode; the first one has ``first_seed`` itself."""
    if number == 0:
        return first_seed
    return int(np.random.SeedSequence([first_seed, number]).generate_state(1)[0])


class SeededEpisodes(gym.Wrapper[Any, Any, Any, Any]):
    """Gives every episode a seed, derived from that of the first one and its number.

    Args:
        env: Any environment; what it does may depend on nothing but its seed and its actions.
        seed: Of the first episode, if the first reset names none.
    """

    def __init__(self, env: gym.Env[Any, Any], seed: int = 0) -> None:
        super().__init__(env)
        self.episode: OpenEpisode | None = None
        self._first_seed, self._number = seed, -1
        self._options: dict[str, Any] | None = None
        self._withheld: Any = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: Its seed, and of the episodes that follow; None: the next episode's.
            options: ``go_on`` takes up the episode of the attribute ``episode``; all others are
                passed on, those given with a seed also in the episodes that follow.

        Returns:
            Observation and info. Where an episode was taken up, ``info`` has the ``reward`` of its
            last step, and whether all its actions could be ``repeated``.
        """
        self._withheld = None
        if options and options.get(GO_ON):
            assert self.episode is not None
            return self._go_on(self.episode)
        if seed is None:
            self._number += 1
        else:
            self._first_seed, self._number, self._options = seed, 0, options
        options = self._options if options is None else options
        return self.env.reset(seed=episode_seed(self._first_seed, self._number), options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take a step, or show the first frame that was withheld."""
        if self._withheld is not None:
            (obs, info), self._withheld = self._withheld, None
            return obs, 0.0, False, False, info
        return self.env.step(action)

    def _go_on(self, episode: OpenEpisode) -> tuple[Any, dict[str, Any]]:
        self._first_seed, self._number = episode.first_seed, episode.number
        self._options = None
        obs, info = self.env.reset(seed=episode_seed(self._first_seed, self._number))
        if episode.withheld:
            self._withheld = obs, info
        reward, repeated = 0.0, True
        for action in episode.actions:
            obs, received, terminated, truncated, _ = self.env.step(action)
            reward = float(received)
            if terminated or truncated:
                repeated = False
                break
        return obs, {"reward": reward, "repeated": repeated}
