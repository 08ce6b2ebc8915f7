"""Whole episodes: who plays them, what comes of them, and those that test an agent.

Shapes: N environments side by side, A action.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from mapo_lightning.envs.live_labels import LiveLabeler, Step
from mapo_lightning.envs.replacement import awaited
from mapo_lightning.envs.wrappers import BLIND
from mapo_lightning.types import Frames

Policy = Callable[[Step], NDArray[np.float32]]
"""Maps a step to actions (N, A) in [-1, 1]."""


class Episode(NamedTuple):
    """Result of one finished episode."""

    score: float
    """Sum of its rewards, in units of the environment."""
    agent_steps: int
    """Its length in agent steps."""
    success: float | None
    """1 if any step succeeded, 0 if none, None where the suite does not say."""


class EpisodeTally:
    """Score, length and success of the current episode of each environment.

    Gymnasium's ``RecordEpisodeStatistics`` counts the first two alike, but knows no success.

    Args:
        envs: Number N of environments.
    """

    def __init__(self, envs: int) -> None:
        self._score, self._length = np.zeros(envs), np.zeros(envs, np.int64)
        self._success: list[float | None] = [None] * envs

    def begin(self, envs: NDArray[np.bool_]) -> None:
        """Start anew where an episode begins, (N,)."""
        self._score[envs], self._length[envs] = 0.0, 0
        for n in np.flatnonzero(envs):
            self._success[n] = None

    def add(
        self, envs: NDArray[np.bool_], reward: NDArray[np.floating], info: Mapping[str, Any]
    ) -> None:
        """Add one step of some environments.

        Args:
            envs: Environments that took a step, (N,).
            reward: Rewards (N,), in units of the environment.
            info: As Gymnasium's vector environments give it: ``success`` (N,) where the suite knows
                it, and ``_success`` (N,), which environments it holds for. An episode succeeds if
                any of its steps does (facts 6.2).
        """
        self._score[envs] += reward[envs]
        self._length[envs] += 1
        if "success" in info:
            for n in np.flatnonzero(envs & info.get("_success", True)):
                self._success[n] = max(self._success[n] or 0.0, float(info["success"][n]))

    def result(self, env: int) -> Episode:
        """The episode of an environment so far."""
        return Episode(float(self._score[env]), int(self._length[env]), self._success[env])

    def state(self) -> list[Any]:
        """The episodes of all environments so far, as a checkpoint may hold them."""
        return [list(self.result(n)) for n in range(len(self._score))]

    def restore(self, state: Sequence[Any]) -> None:
        """Go on with what `state` returned."""
        score, length, success = zip(*state, strict=True)
        self._score, self._length = np.array(score), np.array(length, np.int64)
        self._success = list(success)


class BlindPolicy(ABC):
    """A policy that never looks: its test episodes are neither drawn nor labelled."""

    @abstractmethod
    def __call__(self, step: Step) -> NDArray[np.float32]:
        """Actions (N, A) of a step, of which only ``is_first`` may be read."""


class RandomPolicy(BlindPolicy):
    """Uniform random actions: for the prefill, and as a baseline score.

    Args:
        action_dim: Width A of an action.
        seed: Of the draws.
        hold: Agent steps for which an action is repeated before the next is drawn.
    """

    def __init__(self, action_dim: int, seed: int, hold: int = 1) -> None:
        self.action_dim, self.hold = action_dim, hold
        self.rng = np.random.default_rng(seed)
        self._age = 0
        self._action = np.zeros((0, action_dim), np.float32)

    def __call__(self, step: Step) -> NDArray[np.float32]:
        """Draw actions (N, A), or repeat the last ones."""
        if self._age % self.hold == 0:
            shape = (len(step["is_first"]), self.action_dim)
            self._action = self.rng.uniform(-1.0, 1.0, shape).astype(np.float32)
        self._age += 1
        return self._action.copy()


class StillPolicy(BlindPolicy):
    """Zero actions: the better baseline where a task begins at its goal."""

    def __init__(self, action_dim: int) -> None:
        self.action_dim = action_dim

    def __call__(self, step: Step) -> NDArray[np.float32]:
        """Zeros (N, A)."""
        return np.zeros((len(step["is_first"]), self.action_dim), np.float32)


def run_episodes(
    envs: VectorEnv,
    live_labeler: LiveLabeler,
    policy_of: Callable[[int], Policy],
    seeds: Sequence[int],
    record: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Episode], list[Frames]]:
    """Play one whole episode from each reset seed.

    Args:
        envs: N environments; the seeds are played N at a time.
        live_labeler: Labels what the environments show.
        policy_of: Makes the policy for one batch of episodes, without memory of earlier ones, from
            the batch's first reset seed: what a batch does depends on nothing played before it.
        seeds: Reset seed of every episode.
        record: Number of episodes whose frames are kept.
        progress: Told how many episodes are finished, of how many.

    Returns:
        One result per seed, in order, and the frames (T, H, W, 3) of the first ``record``: what the
        describer sees where it has a picture of its own, else what the policy sees.
    """
    episodes: list[Episode] = []
    videos: list[Frames] = []
    for start in range(0, len(seeds), envs.num_envs):
        if progress is not None:
            progress(start, len(seeds))
        batch = list(seeds[start : start + envs.num_envs])
        kept = max(0, min(record - start, len(batch)))
        # A short last batch plays its last seed more than once and counts it once.
        padded = batch + [batch[-1]] * (envs.num_envs - len(batch))
        live = np.arange(envs.num_envs) < len(batch)
        played, frames = _play_batch(envs, live_labeler, policy_of(batch[0]), padded, kept, live)
        episodes += played
        videos += frames
    if progress is not None:
        progress(len(seeds), len(seeds))
    return episodes, videos


def _play_batch(
    envs: VectorEnv,
    live_labeler: LiveLabeler,
    policy: Policy,
    seeds: list[int],
    record: int,
    live: NDArray[np.bool_],
) -> tuple[list[Episode], list[Frames]]:
    """Reset to ``seeds`` and play until every environment that is ``live`` has finished one."""
    count, counted = envs.num_envs, int(live.sum())
    first = np.ones(count, bool)
    tally = EpisodeTally(count)
    blind = isinstance(policy, BlindPolicy) and not record
    with awaited(envs, "begin the test episodes"):
        obs, _ = envs.reset(
            seed=seeds,  # type: ignore[arg-type]  # Gymnasium takes one for each
            options={BLIND: True} if blind else None,
        )
    filmed = "label_image" if "label_image" in obs else "image"  # people like the larger one
    videos: list[list[Frames]] = [[obs[filmed][n].copy()] for n in range(record)]
    while live.any():
        step: Step = {"is_first": first}
        if not blind:
            step |= {"obs": obs["image"], **live_labeler.update(obs, first, live)}
        action = policy(step)
        with awaited(envs, "take their next step of a test episode"):
            obs, reward, terminated, truncated, info = envs.step(action)
        first = np.zeros(count, bool)
        tally.add(live, reward, info)
        for n in np.flatnonzero(live[:record]):
            videos[n].append(obs[filmed][n].copy())
        live &= ~(terminated | truncated)
    return [tally.result(n) for n in range(counted)], [np.stack(frames) for frames in videos]
