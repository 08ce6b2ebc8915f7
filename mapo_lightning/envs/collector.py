"""Plays episodes: labels the frames, lets a policy act, and writes every step to replay.

Shapes: N environments side by side, H W image, V semantic vector, A action.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, VectorEnv
from numpy.typing import NDArray

from mapo_lightning.data.replay import Replay, ReplayError
from mapo_lightning.envs.factory import close_vector_env
from mapo_lightning.envs.live_labels import LiveLabeler, Step
from mapo_lightning.types import EnvironmentSetupError, Frames
from mapo_lightning.waiting import waiting

_MAY_BE_LOST = 0.1  # largest share of the replay that may be missing when a run resumes

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


class RandomPolicy:
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


class StillPolicy:
    """Zero actions: the better baseline where a task begins at its goal."""

    def __init__(self, action_dim: int) -> None:
        self.action_dim = action_dim

    def __call__(self, step: Step) -> NDArray[np.float32]:
        """Zeros (N, A)."""
        return np.zeros((len(step["is_first"]), self.action_dim), np.float32)


class Collector:
    """Plays episode after episode, writes every step to replay and keeps the results.

    Args:
        envs: Vector environment with autoreset on the step after an episode's end.
        live_labeler: Labels what the environments show.
        replay: Gets the steps.
        seed: Of the first episode of every environment.
    """

    def __init__(
        self, envs: VectorEnv, live_labeler: LiveLabeler, replay: Replay, seed: int
    ) -> None:
        self.envs, self.live_labeler, self.replay, self.seed = envs, live_labeler, replay, seed
        self.finished: list[Episode] = []
        self._step: Step | None = None
        self._unfinished: NDArray[np.float32] | None = None
        self._done = np.zeros(envs.num_envs, bool)
        self._tally = EpisodeTally(envs.num_envs)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue with the experience of an earlier process, with fresh episodes.

        Args:
            state: What ``replay.state`` returned. Episodes in progress then end where they were:
                simulators cannot be put back into the middle of one.

        Raises:
            ReplayError: The replay is gone, or more than a tenth of it is.
        """
        lost = self.replay.restore(state)
        if lost > _MAY_BE_LOST * (lost + self.replay.steps):
            raise ReplayError(
                f"{lost} agent steps of the checkpoint's replay are missing in "
                f"'{self.replay.root}', and the agent would forget what it learned from "
                "them; resuming needs the folder that the checkpoint was written beside, as it was"
            )
        # Another seed, so that the run does not repeat its first episodes.
        begun = np.random.SeedSequence([self.seed, self.replay.begun])
        self.seed = int(begun.generate_state(1)[0])

    def collect(self, policy: Policy, agent_steps: int, ahead: bool = False) -> int:
        """Play until at least ``agent_steps`` more actions are taken.

        Args:
            policy: Called once per step.
            agent_steps: Actions to take, over all environments.
            ahead: Return while the environments' processes still simulate the last step; the next
                call, or ``settle``, writes its outcome. Makes no difference if they have no
                processes of their own.

        Returns:
            How many actions were taken, including that of an unfinished step.
        """
        taken = 0
        while taken < agent_steps:
            self.settle()
            if self._step is None:
                with _awaited(self.envs, "begin their first episodes"):
                    obs, _ = self.envs.reset(seed=self.seed)
                self._write(obs, None, np.ones(self.envs.num_envs, bool), {})
            assert self._step is not None
            self._unfinished = policy(self._step)
            if isinstance(self.envs, AsyncVectorEnv):
                self.envs.step_async(self._unfinished)
            taken += int((~self._done).sum())
            if not ahead:
                self.settle()
        return taken

    def settle(self) -> None:
        """Wait for the unfinished step, if there is one, and write it."""
        action, self._unfinished = self._unfinished, None
        if action is None:
            return
        with _awaited(self.envs, "take their next step"):
            if isinstance(self.envs, AsyncVectorEnv):
                outcome = self.envs.step_wait()
            else:
                outcome = self.envs.step(action)
        obs, reward, terminated, truncated, info = outcome
        # An environment that was done has ignored the action and begun its next episode.
        result: dict[str, NDArray[Any]] = {"action": action, "reward": reward}
        result |= {"terminated": terminated, "truncated": truncated}
        self._write(obs, result, self._done, info)

    def close(self) -> None:
        """Wait for the labels still to come, and close the environments' processes."""
        try:
            self.live_labeler.close(self.replay)
        finally:
            close_vector_env(self.envs)

    def _write(
        self,
        obs: dict[str, NDArray[np.uint8]],
        outcome: dict[str, NDArray[Any]] | None,
        first: NDArray[np.bool_],
        info: dict[str, Any],
    ) -> None:
        """Label the step, write it to replay, and keep it for the next action."""
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
        step = {"obs": obs["image"], "is_first": first, **self.live_labeler.update(obs, first)}
        rest = {"action": action, "reward": reward, "is_last": ended, "is_terminal": terminal}
        entry = step | self.live_labeler.to_store() | rest
        for n in range(envs):
            where = self.replay.add(n, {key: x[n] for key, x in entry.items()})
            self.live_labeler.note_entry(n, where)
        self.live_labeler.complete(self.replay)
        self._tally.begin(first)
        self._tally.add(~first, reward, info)
        self.finished += [self._tally.result(int(n)) for n in np.flatnonzero(ended)]
        self._step, self._done = step, ended


@contextmanager
def _awaited(envs: VectorEnv, what: str) -> Iterator[None]:
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
        raise EnvironmentSetupError(
            "the process of an environment has died, killed from outside or by its simulator: "
            "lower env.num_envs if the memory is full, or try env.num_envs=1"
        ) from error
    finally:
        gym.logger.min_level = level


def run_episodes(
    envs: VectorEnv,
    live_labeler: LiveLabeler,
    policy_of: Callable[[int], Policy],
    seeds: Sequence[int],
    record: int = 0,
) -> tuple[list[Episode], list[Frames]]:
    """Play one whole episode from each reset seed.

    Args:
        envs: N environments; the seeds are played N at a time.
        live_labeler: Labels what the environments show.
        policy_of: Makes the policy for one batch of episodes, without memory of earlier ones, from
            the batch's first reset seed: what a batch does depends on nothing played before it.
        seeds: Reset seed of every episode.
        record: Number of episodes whose frames are kept.

    Returns:
        One result per seed, in order, and the frames (T, H, W, 3) of the first ``record``: what the
        describer sees where it has a picture of its own, else what the policy sees.
    """
    episodes: list[Episode] = []
    videos: list[Frames] = []
    for start in range(0, len(seeds), envs.num_envs):
        batch = list(seeds[start : start + envs.num_envs])
        kept = max(0, min(record - start, len(batch)))
        # A short last batch plays its last seed more than once and counts it once.
        padded = batch + [batch[-1]] * (envs.num_envs - len(batch))
        played, frames = _play_batch(envs, live_labeler, policy_of(batch[0]), padded, kept)
        episodes += played[: len(batch)]
        videos += frames
    return episodes, videos


def _play_batch(
    envs: VectorEnv, live_labeler: LiveLabeler, policy: Policy, seeds: list[int], record: int
) -> tuple[list[Episode], list[Frames]]:
    """Reset to ``seeds`` and play until every environment has finished one episode."""
    count = envs.num_envs
    first, live = np.ones(count, bool), np.ones(count, bool)
    tally = EpisodeTally(count)
    with _awaited(envs, "begin the test episodes"):
        obs, _ = envs.reset(seed=seeds)  # type: ignore[arg-type]  # Gymnasium takes one for each
    filmed = "label_image" if "label_image" in obs else "image"  # people like the larger one
    videos: list[list[Frames]] = [[obs[filmed][n].copy()] for n in range(record)]
    while live.any():
        step = {"obs": obs["image"], "is_first": first, **live_labeler.update(obs, first)}
        action = policy(step)
        with _awaited(envs, "take their next step of a test episode"):
            obs, reward, terminated, truncated, info = envs.step(action)
        first = np.zeros(count, bool)
        tally.add(live, reward, info)
        for n in np.flatnonzero(live[:record]):
            videos[n].append(obs[filmed][n].copy())
        live &= ~(terminated | truncated)
    return [tally.result(n) for n in range(count)], [np.stack(frames) for frames in videos]
