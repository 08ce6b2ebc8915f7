"""States of simulators: saved, restored, and refused where that is impossible."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from branch_orders import check_branch_orders, play, sequences
from gymnasium import spaces

from mapo_lightning.envs.factory import make_env
from mapo_lightning.envs.settings import EnvConfig
from mapo_lightning.envs.snapshots import Restorable
from mapo_lightning.envs.wrappers import Outcome, PixelEnv
from mapo_lightning.types import EnvironmentSetupError, Frames, MapoError


class Ball(gym.Env[np.ndarray, np.ndarray]):
    """A square that is pushed, and shaken by the environment's own random numbers."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.observation_space = spaces.Box(-1.0, 1.0, (2,))
        self.action_space = spaces.Box(-1.0, 1.0, (2,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, Any]:
        super().reset(seed=seed)
        self.place, self.path = self.np_random.uniform(-0.5, 0.5, 2), []
        return self.place.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        shaken = 0.1 * action + 0.05 * self.noise()
        self.place = np.clip(self.place + shaken, -0.8, 0.8)
        self.path.append(self.place)
        return self.place.astype(np.float32), float(self.place[0]), False, False, {}

    def noise(self) -> np.ndarray:
        return self.np_random.normal(size=2)

    def render(self) -> np.ndarray:
        image = np.zeros((64, 64, 3), np.uint8)
        row, column = (32 + 30 * self.place).astype(int)
        image[row - 3 : row + 3, column - 3 : column + 3] = 255
        return image


class Elsewhere(Ball):
    """Draws from a stream that lies outside the object."""

    stream = itertools.count()

    def noise(self) -> np.ndarray:
        return np.full(2, np.sin(next(self.stream)))


class Locked(Ball):
    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, Any]:
        self.lock = threading.Lock()
        return super().reset(seed=seed)


class Unsaved:
    action_space: Any = spaces.Box(-1.0, 1.0, (1,), np.float32)
    frame_rate, frame_limit = 10.0, 5

    def reset(self, seed: int | None) -> None: ...

    def step(self, action: Any) -> Outcome:
        return Outcome(0.0)

    def frame(self, size: int) -> Frames:
        return np.zeros((size, size, 3), np.uint8)

    def close(self) -> None: ...


for kind in (Ball, Elsewhere, Locked):
    gym.register(f"{kind.__name__}-v0", kind, max_episode_steps=40)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("toy", "disc"),
        ("toy", "disc_anywhere"),
        ("gym", "Ball-v0"),
        *(
            pytest.param(kind, name, marks=pytest.mark.slow)
            for kind, name in [
                ("dmc", "finger_turn_hard"),  # its target is a site of the model
                ("dmc", "reacher_easy"),  # ... and here its size as well
                ("dmc", "point_mass_hard"),  # gains of the model are drawn at reset
                ("dmc", "cartpole_swingup"),
                ("dmc", "hopper_hop"),  # touch sensors
                ("dmc", "quadruped_escape"),  # terrain
                ("metaworld", "door-open"),
                ("metaworld", "pick-place"),
            ]
        ),
    ],
)  # fmt: skip
def test_branches_do_not_depend_on_their_order(kind: Any, name: str) -> None:
    assert check_branch_orders(EnvConfig(kind=kind, name=name)) >= 100


@pytest.mark.slow
@pytest.mark.parametrize("name", ["InvertedPendulum-v5", "Reacher-v5"])
def test_branches_of_gymnasium_do_not_depend_on_their_order(name: str) -> None:
    assert check_branch_orders(EnvConfig(kind="gym", name=name), lead=4, length=6) > 0


@pytest.mark.slow
def test_a_gymnasium_task_made_after_one_was_closed_is_not_black() -> None:
    cfg = EnvConfig(kind="gym", name="InvertedPendulum-v5")
    for _ in range(3):
        env = make_env(cfg, 0)
        assert env.reset(seed=0)[0]["image"].max() > 0
        env.close()


def test_the_clock_of_an_episode_is_restored() -> None:
    env = make_env(EnvConfig(time_limit=6), 0)
    ways = sequences(env, 3, 6)
    env.reset(seed=0)
    play(env, ways["lead"])
    snapshot = env.save()
    assert [len(play(env, ways["A"])), env.restore(snapshot)["image"].shape] == [3, (64, 64, 3)]
    steps = play(env, ways["A"])  # the episode was over, and is not any more
    assert len(steps) == 3
    assert steps[-1][3]


def test_a_state_may_be_seen_at_another_size() -> None:
    small, large = make_env(EnvConfig(size=32), 0), make_env(EnvConfig(size=96), 0)
    small.reset(seed=0)
    small.step(np.ones(2, np.float32))
    assert large.restore(small.save())["image"].shape == (96, 96, 3)
    one, two = (env.step(np.ones(2, np.float32))[1] for env in (small, large))
    assert one == two


def test_every_simulator_of_the_package_is_restorable() -> None:
    for cfg in (EnvConfig(), EnvConfig(kind="gym", name="Ball-v0")):
        assert isinstance(make_env(cfg, 0).simulator, Restorable)
    assert not isinstance(Unsaved(), Restorable)


def saved(name: str) -> None:
    env = make_env(EnvConfig(kind="gym", name=name), 0)
    env.reset(seed=0)
    env.save()


def test_what_cannot_be_saved_is_refused_in_one_sentence() -> None:
    with pytest.raises(EnvironmentSetupError, match=r"'Elsewhere-v0' cannot be restored.*\.Elsewh"):
        saved("Elsewhere-v0")
    with pytest.raises(EnvironmentSetupError, match=r"cannot be saved, because .*_thread\.lock"):
        saved("Locked-v0")
    env = PixelEnv(Unsaved(), name="lab/thing")
    env.reset()
    with pytest.raises(MapoError, match=r"lab/thing cannot be saved.*Unsaved has no methods save"):
        env.save()


def test_a_state_of_another_task_or_of_no_episode_is_refused() -> None:
    env, other = make_env(EnvConfig(), 0), make_env(EnvConfig(name="disc_anywhere"), 0)
    with pytest.raises(MapoError, match="no episode is under way: call reset first"):
        env.save()
    env.reset(seed=0)
    with pytest.raises(EnvironmentSetupError, match=r"toy/disc was given to .*toy/disc_anywhere"):
        other.restore(env.save())
