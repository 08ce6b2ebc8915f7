"""Plays episodes: labels the frames, lets a policy act, and writes every step to replay.

Shapes: N environments side by side, H W image, V semantic vector, A action.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, VectorEnv
from numpy.typing import NDArray

from mapo_lightning.data.replay import Replay, ReplayError
from mapo_lightning.envs.episodes import Episode, EpisodeTally, Policy
from mapo_lightning.envs.factory import env_seed
from mapo_lightning.envs.live_labels import LiveLabeler, Step
from mapo_lightning.envs.replacement import (
    DeadEnvironmentError,
    Deaths,
    awaited,
    close_vector_env,
    died,
    end_processes,
)
from mapo_lightning.envs.seeded_episodes import GO_ON, OpenEpisode
from mapo_lightning.types import Frames

log = logging.getLogger(__name__)

_MAY_BE_LOST = 0.1  # largest share of the replay that may be missing when a run resumes


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
        with awaited(self.envs, "begin their first episodes"):
            obs, _ = self.envs.reset(seed=self.first_seeds)  # type: ignore[arg-type]  # one each
        self._write(obs, None, np.ones(self.envs.num_envs, bool), {})

    def _start(self) -> None:
        """Send the unfinished step to environments that have processes."""
        if isinstance(self.envs, AsyncVectorEnv):
            with awaited(self.envs, "take their next step"):
                self.envs.step_async(self._unfinished)
        self._sent = True

    def _finish(self) -> None:
        """Wait for the unfinished step, and write it."""
        action = self._unfinished
        assert action is not None
        if not self._sent:
            self._start()
        with awaited(self.envs, "take their next step"):
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
        with awaited(envs, "repeat their episodes in progress"):
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
            with awaited(envs, "begin new episodes"):
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
