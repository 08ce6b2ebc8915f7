"""Makes a Gymnasium environment of a simulator: repeats, normalises, limits and draws.

A suite provides a `Simulator`, which knows its own units; `PixelEnv` is everything that all
suites share. Frames are drawn only when the agent sees them, not for every repeated action.
"""

from __future__ import annotations

import difflib
import functools
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from mapo_lightning.envs.actions import action_width, to_space
from mapo_lightning.envs.snapshots import Freezer, Restorable, Snapshot
from mapo_lightning.types import EnvironmentSetupError, Frames, MapoError

BLIND = "blind"
"""Option of a reset: nobody looks at this episode."""

_COUNTERS = ("_first_seed", "_agent_steps", "_np_random", "_np_random_seed")
_LARGEST = float(np.finfo(np.float32).max)  # replay stores rewards as float32

Observation = dict[str, Frames]
"""``image`` and perhaps ``label_image``: (H, W, 3) uint8, new arrays at every step."""


class Outcome(NamedTuple):
    """Result of one simulator frame."""

    reward: float  # in units of the suite
    terminated: bool = False  # the task ended
    truncated: bool = False  # the suite's clock ran out
    success: float | None = None  # 0.0 or 1.0; None where the suite does not know


class Simulator(Protocol):
    """A task in its own units; a new suite implements this."""

    action_space: spaces.Space[Any]
    """Actions in the simulator's own units."""
    frame_rate: float
    """Control frames per simulated second, in Hz."""
    frame_limit: int | None
    """Frames after which the suite ends an episode; None: never."""

    def reset(self, seed: int | None) -> None:
        """Start an episode; a seed restarts the random stream, None continues it."""
        ...

    def step(self, action: Any) -> Outcome:
        """Advance one control frame with an action of ``action_space``."""
        ...

    def frame(self, size: int) -> Frames:
        """Draw the current state, upright, as a new array (size, size, 3) uint8."""
        ...

    def close(self) -> None:
        """Free what the simulator holds; a second call does nothing."""
        ...


def no_such_task(suite: str, name: str, known: Iterable[str]) -> EnvironmentSetupError:
    """The error for a task that a suite does not have: names the nearest one, then all."""
    tasks = sorted(known)
    near = difflib.get_close_matches(name, tasks, 1, 0.0)[0]
    return EnvironmentSetupError(
        f"{suite} has no task '{name}', did you mean '{near}'? It has: {', '.join(tasks)}"
    )


class PixelEnv(gym.Env[Any, Any]):
    """A simulator seen through a camera and moved by actions in [-1, 1].

    Args:
        simulator: The task; closed with the environment.
        name: What to call the task in messages.
        size: Height and width of ``image``, in pixels.
        label_size: Height and width of ``label_image``, in pixels; None: not drawn.
        action_repeat: Simulator frames per agent step.
        time_limit: Longest episode in agent steps; None: only the simulator's own limit.
        seed: Seed of the first reset that names none.
    """

    def __init__(
        self,
        simulator: Simulator,
        *,
        name: str = "the task",
        size: int = 64,
        label_size: int | None = None,
        action_repeat: int = 1,
        time_limit: int | None = None,
        seed: int = 0,
    ) -> None:
        self.simulator, self.name = simulator, name
        self.action_repeat, self.time_limit = action_repeat, time_limit
        self.render_mode = "rgb_array"
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": max(1, round(simulator.frame_rate / action_repeat)),
        }
        self._sizes = {"image": size} | ({"label_image": label_size} if label_size else {})
        self.observation_space = spaces.Dict(
            {k: spaces.Box(0, 255, (n, n, 3), np.uint8) for k, n in self._sizes.items()}
        )
        self.action_space: spaces.Box = spaces.Box(
            -1.0, 1.0, (action_width(simulator.action_space),), np.float32
        )
        self._first_seed: int | None = seed
        self._blind = False
        self._agent_steps: int | None = None  # None: the episode has ended or never begun
        self._moment = "before its first reset"

    @property
    def steps_limit(self) -> int | None:
        """Agent steps after which an episode is truncated; None: never."""
        own = self.simulator.frame_limit
        limits = [] if own is None else [-(-own // self.action_repeat)]
        limits += [] if self.time_limit is None else [self.time_limit]
        return min(limits, default=None)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; see `gymnasium.Env.reset`.

        Args:
            seed: Its seed.
            options: With ``blind``, nothing is drawn in this episode: its pictures are black.

        Raises:
            EnvironmentSetupError: The simulator failed.
        """
        if seed is None:
            seed = self._first_seed
        self._first_seed, self._blind = None, bool(options and options.get(BLIND))
        super().reset(seed=seed)
        self._moment = "at reset"
        with self._guarded():
            self.simulator.reset(seed)
            self._agent_steps = 0
            return self._observe(), {}

    def step(
        self, action: NDArray[np.float32]
    ) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Repeat an action (A,), clipped to [-1, 1]; see `gymnasium.Env.step`.

        Raises:
            MapoError: The episode has ended, or the action has a wrong shape or is not finite.
            EnvironmentSetupError: The simulator failed, or its reward is not a finite number.
        """
        if self._agent_steps is None:
            raise MapoError("step was called after the end of an episode: call reset first")
        raw = self._denormalised(action)
        self._moment = f"at step {self._agent_steps + 1} of an episode"
        with self._guarded():
            reward, terminated, truncated, success = self._repeat(raw)
            observation = self._observe()
        self._agent_steps += 1
        # An episode that terminates in its last allowed step is not truncated.
        out_of_time = self.time_limit is not None and self._agent_steps >= self.time_limit
        truncated = not terminated and (truncated or out_of_time)
        if terminated or truncated:
            self._agent_steps = None
        info = {} if success is None else {"success": success}
        return observation, reward, terminated, truncated, info

    def save(self) -> Snapshot:
        """Save the episode as it stands: the simulator's state and the count of agent steps.

        Raises:
            MapoError: No episode is under way, or this simulator cannot save its state.
            EnvironmentSetupError: The simulator failed, or holds what cannot be copied.
        """
        if self._agent_steps is None:
            raise MapoError("save was called where no episode is under way: call reset first")
        simulator = self._restorable()
        self._moment = f"where it is saved, after step {self._agent_steps} of an episode"
        with self._guarded():
            inner = simulator.save()
        counters = {name: getattr(self, name) for name in _COUNTERS}
        return self._freezer.freeze({"simulator": inner, "counters": counters})

    def restore(self, snapshot: Snapshot) -> Observation:
        """Go on from a state that this environment, or another of the same task, has saved.

        Size, action repeat and limits stay those of this environment.

        Returns:
            What the restored state looks like.

        Raises:
            MapoError: This simulator cannot restore a state.
            EnvironmentSetupError: The simulator failed, or the state is of another task.
        """
        simulator = self._restorable()
        self._moment = "where a state is restored"
        with self._guarded():
            saved = self._freezer.thaw(snapshot)
            simulator.restore(saved["simulator"])
            for name, value in saved["counters"].items():
                setattr(self, name, value)
            self._blind = False
            return self._observe()

    def _restorable(self) -> Restorable:
        if not isinstance(self.simulator, Restorable):
            raise MapoError(
                f"the state of {self.name} cannot be saved: its simulator "
                f"{type(self.simulator).__name__} has no methods save and restore "
                "(docs/extending.md says how to write them)"
            )
        return self.simulator

    @property
    def _freezer(self) -> Freezer:
        return Freezer(f"an environment of {self.name}", {})

    def render(self) -> Frames:
        """Draw the current state at the largest observed size, (S, S, 3) uint8."""
        return self.simulator.frame(max(self._sizes.values()))

    def close(self) -> None:
        """Free the simulator."""
        self.simulator.close()

    def _repeat(self, raw: Any) -> Outcome:
        """Advance the simulator's frames of one agent step; rewards are summed."""
        reward, terminated, truncated, success = 0.0, False, False, None
        for _ in range(self.action_repeat):
            outcome = self.simulator.step(raw)
            reward += outcome.reward
            terminated, truncated = outcome.terminated, outcome.truncated
            if outcome.success is not None:
                success = max(success or 0.0, outcome.success)
            if terminated or truncated:
                break
        if not abs(reward) <= _LARGEST:  # also where it is not a number
            raise EnvironmentSetupError(
                f"the reward is {reward}, which nothing can be learned from: return a finite "
                "number, or end the episode there"
            )
        return Outcome(reward, terminated, truncated, success)

    def _observe(self) -> Observation:
        if self._blind:
            return {name: np.zeros((size, size, 3), np.uint8) for name, size in self._sizes.items()}
        return {name: self.simulator.frame(size) for name, size in self._sizes.items()}

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Say of every failure of the simulator which task it was, and when."""
        try:
            yield
        except EnvironmentSetupError as error:
            raise EnvironmentSetupError(f"{self.name} {self._moment}: {error}") from error
        except Exception as error:  # a simulator is other people's code
            raise EnvironmentSetupError(
                f"{self.name} failed {self._moment}: {described(error)}"
            ) from error

    def _denormalised(self, action: NDArray[np.float32]) -> Any:
        action = np.asarray(action, np.float64)
        if action.shape != self.action_space.shape or not np.isfinite(action).all():
            raise MapoError(
                f"an action of shape {self.action_space.shape} with finite values was expected, "
                f"got {np.array2string(action, threshold=8)} of shape {action.shape}"
            )
        return to_space(self.simulator.action_space, action)


def described(error: Exception) -> str:
    """An error of other people's code in one line: its kind, its words, and where it was raised."""
    words = " ".join(str(error).split()) or "no message"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {words:.300} ({last.filename}, line {last.lineno})"


def resize_area(image: Frames, size: int) -> Frames:
    """Scale an image to (size, size, 3) by averaging areas; sides are scaled independently.

    Args:
        image: (H, W, 3) uint8.
        size: Height and width of the result, in pixels.

    Returns:
        A new array (size, size, 3) uint8.
    """
    # Not OpenCV's INTER_AREA, as for videos: it rounds halves up when it shrinks by exactly 2, and
    # interpolates when it enlarges, so that pixels would differ by 1.
    rows, columns = (_area_weights(n, size) for n in image.shape[:2])
    tall = np.tensordot(rows, image.astype(np.float32), axes=(1, 0))
    small = np.tensordot(columns, tall, axes=(1, 1)).transpose(1, 0, 2)
    return np.clip(np.rint(small), 0, 255).astype(np.uint8, order="C")


@functools.lru_cache(maxsize=32)
def _area_weights(old: int, new: int) -> NDArray[np.float32]:
    """Share of each of ``old`` pixels in each of ``new`` equal stretches, (new, old)."""
    edges = np.linspace(0.0, old, new + 1)
    pixel = np.arange(old)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    weights = np.clip(overlap, 0.0, None)
    shares: NDArray[np.float32] = weights / weights.sum(axis=1, keepdims=True)
    return shares.astype(np.float32)
