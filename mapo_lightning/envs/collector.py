"""Plays episodes: labels the frames, lets a policy act, and writes every step to replay.

Shapes: N environments side by side, H W image, V semantic vector, A action.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, VectorEnv
from numpy.typing import NDArray

from mapo_lightning.data.replay import Replay, ReplayError
from mapo_lightning.envs.factory import env_seed
from mapo_lightning.envs.live_labels import LiveLabeler, Step
from mapo_lightning.envs.replacement import (
    DeadEnvironmentError,
    Deaths,
    close_vector_env,
    died,
    end_processes,
)
from mapo_lightning.envs.seeded_episodes import GO_ON, OpenEpisode
from mapo_lightning.types import Frames
from mapo_lightning.waiting import waiting

log = logging.getLogger(__name__)

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

    def state(self) -> list[Any]:
        """The episodes of all environments so far, as a checkpoint may hold them."""
        return [list(self.result(n)) for n in range(len(self._score))]

    def restore(self, state: Sequence[Any]) -> None:
        """Go on with what `state` returned."""
        score, length, success = zip(*state, strict=True)
        self._score, self._length = np.array(score), np.array(length, np.int64)
        self._success = list(success)


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

    Episodes in progress can be taken up by another process, or in new processes of the
    environments: each is begun again with its seed, its recorded actions are repeated, and where
    the last frame and reward are those on record, it goes on.

    Args:
        envs: Vector environment of `SeededEpisodes`, with autoreset on the step after an
            episode's end.
        live_labeler: Labels what the environments show.
        replay: Gets the steps.
        seed: Seeds of the environments' first episodes follow from it.
        spare: Makes environments in place of those whose processes died, and counts the deaths;
            None: a death is an error.
    """

    def __init__(
        self,
        envs: VectorEnv,
        live_labeler: LiveLabeler,
        replay: Replay,
        seed: int,
        spare: tuple[Callable[[], VectorEnv], Deaths] | None = None,
    ) -> None:
        self.envs, self.live_labeler, self.replay = envs, live_labeler, replay
        self.spare = spare
        self.finished: list[Episode] = []
        self.first_seeds = [env_seed(seed, index) for index in range(envs.num_envs)]
        """Seed of each environment's first episode."""
        self._numbers = np.full(envs.num_envs, -1, np.int64)  # of the current episodes
        self._step: Step | None = None
        self._unfinished: NDArray[np.float32] | None = None
        self._sent = self._counted = False  # the unfinished step
        self._uncounted = 0  # actions that were counted and died with their environment
        self._fresh = False  # the environments are to take up the episodes in progress
        self._done = np.zeros(envs.num_envs, bool)
        self._tally = EpisodeTally(envs.num_envs)

    def state(self) -> dict[str, Any]:
        """What another process needs to go on from here, as a checkpoint may hold it.

        Waits for an unfinished step. The steps themselves stay in the replay's folder.
        """
        self.settle()
        state: dict[str, Any] = {"replay": self.replay.state()}
        if self._step is None:
            return state
        return state | {
            "first_seeds": self.first_seeds,
            "numbers": self._numbers.tolist(),
            "step": {key: torch.from_numpy(np.array(x)) for key, x in self._step.items()},
            "done": self._done.tolist(),
            "tally": self._tally.state(),
            "finished": [list(episode) for episode in self.finished],
            "uncounted": self._uncounted,
            "labels": self.live_labeler.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where another process was, in the middle of its episodes.

        Episodes that cannot be repeated end at their last entry, and new ones begin.

        Args:
            state: What `state` returned.

        Raises:
            ReplayError: The replay is gone, or more than a tenth of it is.
        """
        lost = self.replay.restore(state["replay"])
        if lost > _MAY_BE_LOST * (lost + self.replay.steps):
            raise ReplayError(
                f"{lost} agent steps of the checkpoint's replay are missing in "
                f"'{self.replay.root}', and the agent would forget what it learned from "
                "them; resuming needs the folder that the checkpoint was written beside, as it was"
            )
        envs = self.envs.num_envs
        before = len(state.get("first_seeds", ()))
        if before != envs:
            # The run has another number of environments, or begins its first episodes.
            for n in range(max(before, envs)):
                self.replay.cut_short(n)
            self.first_seeds = [
                env_seed(seed, self.replay.begun) for seed in self.first_seeds
            ]  # not the episodes that the run began with
            if before:
                log.info(
                    "the checkpoint has %d environments and this run %d: their episodes in "
                    "progress end at their last steps, and new ones begin",
                    before,
                    envs,
                )
            return
        self.first_seeds, self._numbers = state["first_seeds"], np.array(state["numbers"])
        self._step = {key: x.numpy() for key, x in state["step"].items()}
        self._done = np.array(state["done"], bool)
        self._tally.restore(state["tally"])
        self.finished = [Episode(*episode) for episode in state["finished"]]
        self._uncounted = state["uncounted"]
        self.live_labeler.restore(state["labels"])
        self._end_episodes(np.array([not len(self.replay.in_progress(n)) for n in range(envs)]))
        self._fresh = True
        self._reliably(lambda: None)

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
                self._reliably(self._begin)
            assert self._step is not None
            self._unfinished = policy(self._step)
            self._reliably(self._start)
            taken += int((~self._done).sum()) - self._uncounted
            self._counted, self._uncounted = True, 0
            if not ahead:
                self.settle()
        return taken

    def settle(self) -> None:
        """Wait for the unfinished step, if there is one, and write it."""
        if self._unfinished is not None:
            self._reliably(self._finish)

    def _reliably(self, call: Callable[[], object]) -> None:
        """Make a call to the environments; where processes of theirs die, again in new ones.

        Raises:
            EnvironmentSetupError: A process has died, and too many have, or there is no spare.
        """
        while True:
            try:
                if self._fresh:
                    self._take_up()
                call()
                return
            except DeadEnvironmentError:
                if self.spare is None or not isinstance(self.envs, AsyncVectorEnv):
                    raise
                make, deaths = self.spare
                gone = died(self.envs)
                end_processes(self.envs)
                deaths.add(max(1, int(gone.sum())))
                self.envs, self._sent = make(), False
                if self._step is not None:
                    self._end_episodes(gone)
                    self._fresh = True

    def _begin(self) -> None:
        with _awaited(self.envs, "begin their first episodes"):
            obs, _ = self.envs.reset(seed=self.first_seeds)  # type: ignore[arg-type]  # one each
        self._write(obs, None, np.ones(self.envs.num_envs, bool), {})

    def _start(self) -> None:
        """Send the unfinished step to environments that have processes."""
        if isinstance(self.envs, AsyncVectorEnv):
            with _awaited(self.envs, "take their next step"):
                self.envs.step_async(self._unfinished)
        self._sent = True

    def _finish(self) -> None:
        """Wait for the unfinished step, and write it."""
        action = self._unfinished
        assert action is not None
        if not self._sent:
            self._start()
        with _awaited(self.envs, "take their next step"):
            if isinstance(self.envs, AsyncVectorEnv):
                outcome = self.envs.step_wait()
            else:
                outcome = self.envs.step(action)
        self._unfinished, self._sent, self._counted = None, False, False
        obs, reward, terminated, truncated, info = outcome
        # An environment that was done has ignored the action and begun its next episode.
        result: dict[str, NDArray[Any]] = {"action": action, "reward": reward}
        result |= {"terminated": terminated, "truncated": truncated}
        self._write(obs, result, self._done, info)

    def _take_up(self) -> None:
        """Bring fresh environments to where the episodes in progress are."""
        envs: Any = self.envs  # Gymnasium's interface of vector environments lacks set_attr
        with _awaited(envs, "repeat their episodes in progress"):
            envs.set_attr("episode", self._open_episodes())
            obs, info = envs.reset(options={GO_ON: True})
        failed = ~self._done & ~self._repeated(obs["image"], info)
        if failed.any():
            log.info(
                "%d of %d episodes in progress cannot be repeated from their seeds and actions: "
                "they end at their last steps, and new ones begin",
                failed.sum(),
                len(failed),
            )
            self._end_episodes(failed)
            with _awaited(envs, "begin new episodes"):
                envs.set_attr("episode", self._open_episodes())
                envs.reset(options={GO_ON: True, "reset_mask": failed})
        self._fresh = False

    def _open_episodes(self) -> list[OpenEpisode]:
        """What each environment is to take up: its episode, or the next one if that has ended."""
        found = []
        for n, (seed, number) in enumerate(zip(self.first_seeds, self._numbers, strict=True)):
            # The action of an entry led to it; the first entry has none.
            actions = self.replay.in_progress(n)["action"][1:].copy()
            if self._done[n]:
                found.append(OpenEpisode(seed, int(number) + 1, actions[:0], withheld=True))
            else:
                found.append(OpenEpisode(seed, int(number), actions))
        return found

    def _repeated(self, image: Frames, info: Mapping[str, Any]) -> NDArray[np.bool_]:
        """Whether the repeated episodes end in the frames and rewards on record, (N,)."""
        same = np.array(info.get("repeated", np.zeros(len(image))), bool)
        for n in np.flatnonzero(same & ~self._done):
            last = self.replay.in_progress(int(n))[-1]
            reward = np.float32(info["reward"][n])
            same[n] = np.array_equal(image[n], last["obs"]) and reward == last["reward"]
        return same

    def _end_episodes(self, envs: NDArray[np.bool_]) -> None:
        """End the episodes in progress of some environments, (N,), at their last entries."""
        for n in np.flatnonzero(envs & ~self._done):
            self.replay.cut_short(int(n))
            self._done[n] = True
            self._uncounted += self._counted  # it never took the unfinished step

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
        self._numbers += first
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
        raise DeadEnvironmentError(
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
