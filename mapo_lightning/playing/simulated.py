"""An agent's model beside the simulator that it was trained in: both get the same actions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from mapo_lightning.envs.snapshots import Snapshot
from mapo_lightning.envs.wrappers import Observation, PixelEnv
from mapo_lightning.models.interfaces import Belief, Driver, Stepwise, WorldModel
from mapo_lightning.playing.scene import Drive, Moment, dice, pictures, shown
from mapo_lightning.types import SEEDS, ConfigError, MapoError

_SAVED = 10  # steps from one saved state to the next: to go back costs as many at most


class Actor(Protocol):
    """An agent as `load_agent` gives it."""

    action_dim: int

    @property
    def world_model(self) -> WorldModel:
        """What it believes with."""
        ...

    @property
    def belief(self) -> Belief:
        """What it knows after the newest frame, axes (1,)."""
        ...

    def reset(self, seed: int | None = None) -> None:
        """Forget everything."""
        ...

    def see(self, obs: NDArray[np.uint8], label_obs: NDArray[np.uint8] | None = None) -> None:
        """Take in the newest frame."""
        ...

    def choose(self) -> NDArray[np.float32]:
        """Answer with an action (A,), which counts as done."""
        ...

    def take(self, action: NDArray[np.float32]) -> None:
        """Note that this action was done instead."""
        ...

    def mark(self) -> Any:
        """All that it remembers."""
        ...

    def back(self, mark: Any) -> None:
        """Remember that again."""
        ...


class SimulatedScene:
    """A simulator and the dreams of it.

    Where the player goes back, the simulator goes on from the last state before that was saved,
    with the same actions; one that cannot save its state, from the beginning of the episode.

    Args:
        names: What to call the models.
        actors: Their agents, of the same task; the first one can drive.
        make_env: Makes the environment; called in the thread that plays, because OpenGL stays with
            its thread.
        watch: Frames that are watched before the dreams begin.
        downwards: Whether a larger second action leads down the screen.

    Raises:
        ConfigError: A model cannot dream step by step, or the agents do not act alike.
    """

    driver: Driver = "action"
    reach, starts, auto = 1.0, SEEDS, "the agent"

    def __init__(
        self,
        names: Sequence[str],
        actors: Sequence[Actor],
        make_env: Callable[[], PixelEnv],
        watch: int,
        downwards: bool = False,
    ) -> None:
        self.names, self.actors, self.watch = tuple(names), tuple(actors), watch
        widths = {actor.action_dim for actor in actors}
        if len(widths) > 1:
            raise ConfigError(
                f"models are compared with the same actions, and these have {sorted(widths)} "
                "numbers: give checkpoints of one task"
            )
        self.worlds = tuple(stepwise(actor.world_model) for actor in actors)
        self.drive_dim = widths.pop()
        self.device = next(self.worlds[0].parameters()).device
        self.env = make_env()
        limit = self.env.steps_limit
        task = f"{self.env.name}, at most {limit} steps" if limit else self.env.name
        self.about: dict[str, Any] = {"task": task, "downwards": downwards}
        self._start = 0
        self._at: Moment | None = None  # where the simulator and the agents stand
        self._saves = True  # whether the simulator can save its state, as far as is known

    def begin(self, start: int) -> list[Moment]:
        """As `Scene.begin`: from a reset seed, nothing is done while the models watch."""
        self._start, self._at = start, None
        obs, _ = self.env.reset(seed=start)
        for actor in self.actors:
            actor.reset(start)
        past = [self._seen([], obs, Moment(obs["image"], (), ()))]
        still = np.zeros(self.drive_dim, np.float32)
        while len(past) < self.watch and not past[-1].ended:
            past.append(self.dream_anew([*past, self._really(past, still)]))
        self._at = past[-1]
        return past

    def advance(self, past: Sequence[Moment], drive: Drive) -> Moment:
        """As `Scene.advance`. Where the episode has ended, the dreams go on alone."""
        now = past[-1]
        action = np.asarray(drive.action, np.float32)
        if not now.ended:
            self._go_to(past)
            if drive.auto:
                action = np.asarray(self.actors[0].choose(), np.float32)
            then = self._really(past, action)
        else:
            then = now._replace(reward=None)
        led = {"action": torch.from_numpy(action)[None].to(self.device)}
        dreams = []
        for dream in now.dreams:
            with dice(self._start, len(past), self.device):
                dreams.append(dream.step(led))
        then = then._replace(
            dreams=tuple(dreams),
            frames=pictures(dreams),
            dreamt=now.dreamt + 1,
            action=tuple(action.tolist()),
        )
        self._at = then if not now.ended else self._at
        return then

    def dream_anew(self, past: Sequence[Moment]) -> Moment:
        """As `Scene.dream_anew`."""
        now = past[-1]
        self._go_to(past)
        dreams = []
        for actor, world in zip(self.actors, self.worlds, strict=True):
            with dice(self._start, len(past), self.device):
                dreams.append(world.dreaming(actor.belief, shown(past, self.device)))
        self._at = now._replace(dreams=tuple(dreams), frames=pictures(dreams), dreamt=0)
        return self._at

    def close(self) -> None:
        """As `Scene.close`."""
        self.env.close()

    def _really(self, past: Sequence[Moment], action: NDArray[np.float32]) -> Moment:
        """Take a step in the simulator; agents see what comes of it."""
        self._at = None  # nowhere known, if this fails
        for actor in self.actors:
            actor.take(action)
        obs, reward, terminated, truncated, _ = self.env.step(action)
        ended = "its time is up" if truncated else "the task has ended" if terminated else ""
        then = Moment(
            obs["image"], (), (), action=tuple(action.tolist()), reward=float(reward), ended=ended
        )
        return self._seen(past, obs, then)

    def _seen(self, past: Sequence[Moment], obs: Observation, moment: Moment) -> Moment:
        for actor in self.actors:
            actor.see(obs["image"], obs.get("label_image"))
        marks, state = tuple(actor.mark() for actor in self.actors), self._state(len(past))
        moment = moment._replace(marks=marks, state=state)
        self._at = moment
        return moment if past else self.dream_anew([moment])

    def _state(self, number: int) -> Snapshot | None:
        """The simulator's state at every few moments, where it can be saved."""
        if not self._saves or number % _SAVED:
            return None
        try:
            return self.env.save()
        except MapoError:
            self._saves = False
            return None

    def _go_to(self, past: Sequence[Moment]) -> None:
        """Bring simulator and agents to the last moment of ``past``."""
        now = past[-1]
        if self._at is now:
            return
        self._at = None
        for saved in range(len(past) - 1, -1, -1):
            if (state := past[saved].state) is not None:
                self.env.restore(state)
                break
        else:
            saved = 0
            self.env.reset(seed=self._start)
        for before, moment in pairwise(past[saved:]):
            if not before.ended:
                self.env.step(np.asarray(moment.action, np.float32))
        for actor, mark in zip(self.actors, now.marks, strict=True):
            actor.back(mark)
        self._at = now


def stepwise(world_model: WorldModel) -> Stepwise:
    """The world model, if its dreams can be led one step at a time.

    Raises:
        ConfigError: They cannot.
    """
    if not isinstance(world_model, Stepwise):
        raise ConfigError(
            f"{type(world_model).__name__} cannot be played: its dreams are not led step by step; "
            "give it `driver`, `drive_dim` and `dreaming` (models/interfaces.py, Stepwise)"
        )
    return world_model
