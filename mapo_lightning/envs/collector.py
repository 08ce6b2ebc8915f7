"""Plays episodes: labels what is seen, asks a policy, writes what happened.

Shapes: N environments side by side, H W image, V semantic vector, A action.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium.vector import AsyncVectorEnv, VectorEnv
from numpy.typing import NDArray

from mapo_lightning.data.replay import Replay, ReplayError
from mapo_lightning.envs.live_labels import SemanticTracker, Step
from mapo_lightning.types import Frames

_MAY_BE_LOST = 0.1  # share of a replay without which a run still resumes

Policy = Callable[[Step], NDArray[np.float32]]
"""Maps a step to actions (N, A) in [-1, 1]."""


class Episode(NamedTuple):
    """What one finished episode came to."""

    score: float
    """Sum of its rewards, in units of the environment."""
    agent_steps: int
    """Its length in agent steps."""
    success: float | None
    """1 if any step succeeded, 0 if none, None where the suite does not say."""


class RandomPolicy:
    """Uniform actions: the prefill, and the floor that learning is measured against.

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


class StillPolicy:
    """Zero actions: some tasks begin where it is best to stay, and then random is no floor."""

    def __init__(self, action_dim: int) -> None:
        self.action_dim = action_dim

    def __call__(self, step: Step) -> NDArray[np.float32]:
        """Zeros (N, A)."""
        return np.zeros((len(step["is_first"]), self.action_dim), np.float32)


class Collector:
    """Plays without end, writes every step to replay and remembers finished episodes.

    Args:
        envs: Vector environment with autoreset on the step after an episode's end.
        tracker: Labels of what the environments show.
        replay: Where steps go.
        seed: Of the first episode of every environment.
    """

    def __init__(
        self, envs: VectorEnv, tracker: SemanticTracker, replay: Replay, seed: int
    ) -> None:
        self.envs, self.tracker, self.replay, self.seed = envs, tracker, replay, seed
        self.finished: list[Episode] = []
        self._step: Step | None = None
        self._under_way: NDArray[np.float32] | None = None
        self._done = np.zeros(envs.num_envs, bool)
        self._score = np.zeros(envs.num_envs)
        self._length = np.zeros(envs.num_envs, np.int64)
        self._success: list[float | None] = [None] * envs.num_envs

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with the experience of an earlier process, from fresh episodes.

        Args:
            state: What ``replay.state`` returned. The episodes under way then end where they were:
                no simulator can be put back into the middle of one.

        Raises:
            ReplayError: The replay is gone, or a good part of it is.
        """
        lost = self.replay.restore(state)
        if lost > _MAY_BE_LOST * (lost + self.replay.steps):
            raise ReplayError(
                f"{lost} agent steps of the checkpoint's replay are missing in "
                f"'{self.replay.root}', and going on without them would unlearn; resuming needs "
                "the folder that the checkpoint was written beside, as it was"
            )
        # Not the episodes that the run began with once more.
        begun = np.random.SeedSequence([self.seed, self.replay.begun])
        self.seed = int(begun.generate_state(1)[0])

    def collect(self, policy: Policy, agent_steps: int, ahead: bool = False) -> int:
        """Play until at least ``agent_steps`` more actions are taken.

        Args:
            policy: Asked once per step.
            agent_steps: Actions to take, over all environments.
            ahead: Leave the last step under way in the environments' processes; the next call, or
                ``settle``, takes its outcome in. Without processes of their own it makes no
                difference.

        Returns:
            How many actions were taken, the one under way included.
        """
        taken = 0
        while taken < agent_steps:
            self.settle()
            if self._step is None:
                obs, _ = self.envs.reset(seed=self.seed)
                self._write(obs, None, np.ones(self.envs.num_envs, bool), {})
            assert self._step is not None
            self._under_way = policy(self._step)
            if isinstance(self.envs, AsyncVectorEnv):
                self.envs.step_async(self._under_way)
            taken += int((~self._done).sum())
            if not ahead:
                self.settle()
        return taken

    def settle(self) -> None:
        """Wait for the step under way, if there is one, and write it."""
        action, self._under_way = self._under_way, None
        if action is None:
            return
        if isinstance(self.envs, AsyncVectorEnv):
            outcome = self.envs.step_wait()
        else:
            outcome = self.envs.step(action)
        obs, reward, terminated, truncated, info = outcome
        # An environment that was done has ignored the action and begun its next episode.
        told: dict[str, NDArray[Any]] = {"action": action, "reward": reward}
        told |= {"terminated": terminated, "truncated": truncated}
        self._write(obs, told, self._done, info)

    def close(self) -> None:
        """Complete what labels still arrive for, and close the environments' processes."""
        self.tracker.close(self.replay)
        self.envs.close()

    def _write(
        self,
        obs: dict[str, NDArray[np.uint8]],
        outcome: dict[str, NDArray[Any]] | None,
        first: NDArray[np.bool_],
        info: dict[str, Any],
    ) -> None:
        """Complete the step, hand it to replay, and remember it for the next action."""
        envs = len(first)
        live = ~first
        action = np.zeros((envs, self.replay.spec.action_dim), np.float32)
        reward, ended = np.zeros(envs, np.float32), np.zeros(envs, bool)
        terminal = np.zeros(envs, bool)
        if outcome is not None:
            action[live] = outcome["action"][live]
            reward[live] = outcome["reward"][live]
            terminal[live] = outcome["terminated"][live]
            ended[live] = (outcome["terminated"] | outcome["truncated"])[live]
        step = {"obs": obs["image"], "is_first": first, **self.tracker.update(obs, first)}
        rest = {"action": action, "reward": reward, "is_last": ended, "is_terminal": terminal}
        entry = step | self.tracker.to_store() | rest
        for n in range(envs):
            where = self.replay.add(n, {key: x[n] for key, x in entry.items()})
            self.tracker.stored(n, where)
        self.tracker.complete(self.replay)
        self._account(reward, first, ended, info)
        self._step, self._done = step, ended

    def _account(
        self,
        reward: NDArray[np.float32],
        first: NDArray[np.bool_],
        ended: NDArray[np.bool_],
        info: dict[str, Any],
    ) -> None:
        self._score[first], self._length[first] = 0.0, 0
        for n in np.flatnonzero(first):
            self._success[n] = None
        self._score += reward
        self._length += ~first
        for n in np.flatnonzero(~first):
            self._success[n] = _succeeded(self._success[n], info, int(n))
        for n in np.flatnonzero(ended):
            self.finished.append(
                Episode(float(self._score[n]), int(self._length[n]), self._success[n])
            )


def run_episodes(
    envs: VectorEnv,
    tracker: SemanticTracker,
    policy_of: Callable[[int], Policy],
    seeds: Sequence[int],
    film: int = 0,
) -> tuple[list[Episode], list[Frames]]:
    """Play one whole episode from each reset seed.

    Args:
        envs: N environments; the seeds are played N at a time.
        tracker: Labels of what the environments show.
        policy_of: Makes the policy for one batch of episodes, without memory of earlier ones, from
            the batch's first reset seed: what a batch does depends on nothing played before it.
        seeds: Reset seed of every episode.
        film: Number of episodes whose frames are kept.

    Returns:
        One result per seed, in order, and the frames (T, H, W, 3) of the first ``film``.
    """
    episodes: list[Episode] = []
    films: list[Frames] = []
    for start in range(0, len(seeds), envs.num_envs):
        batch = list(seeds[start : start + envs.num_envs])
        kept = max(0, min(film - start, len(batch)))
        # A short last batch plays its last seed more than once and counts it once.
        padded = batch + [batch[-1]] * (envs.num_envs - len(batch))
        played, filmed = _play_batch(envs, tracker, policy_of(batch[0]), padded, kept)
        episodes += played[: len(batch)]
        films += filmed
    return episodes, films


def _play_batch(
    envs: VectorEnv, tracker: SemanticTracker, policy: Policy, seeds: list[int], film: int
) -> tuple[list[Episode], list[Frames]]:
    """Reset to ``seeds`` and play until every environment has finished one episode."""
    count = envs.num_envs
    first, live = np.ones(count, bool), np.ones(count, bool)
    score, length = np.zeros(count), np.zeros(count, np.int64)
    success: list[float | None] = [None] * count
    obs, _ = envs.reset(seed=seeds)  # type: ignore[arg-type]  # Gymnasium takes one per environment
    reels: list[list[Frames]] = [[obs["image"][n].copy()] for n in range(film)]
    while live.any():
        step = {"obs": obs["image"], "is_first": first, **tracker.update(obs, first)}
        obs, reward, terminated, truncated, info = envs.step(policy(step))
        first = np.zeros(count, bool)
        for n in np.flatnonzero(live):
            score[n] += reward[n]
            length[n] += 1
            success[n] = _succeeded(success[n], info, int(n))
            if n < film:
                reels[n].append(obs["image"][n].copy())
        live &= ~(terminated | truncated)
    episodes = [Episode(float(score[n]), int(length[n]), success[n]) for n in range(count)]
    return episodes, [np.stack(reel) for reel in reels]


def _succeeded(before: float | None, info: dict[str, Any], n: int) -> float | None:
    """An episode succeeds if any of its steps does (facts 6.2)."""
    if "success" not in info or not info.get("_success", np.ones(n + 1, bool))[n]:
        return before
    return max(before or 0.0, float(info["success"][n]))
