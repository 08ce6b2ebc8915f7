"""Gymnasium environments that break its interface: one sentence with task and step, in time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from mapo_lightning.data.replay import Replay, ReplaySpec
from mapo_lightning.data.settings import ReplayConfig
from mapo_lightning.envs.collector import Collector
from mapo_lightning.envs.episodes import RandomPolicy
from mapo_lightning.envs.factory import make_env, make_vector_env, probed_action_dim
from mapo_lightning.envs.live_labels import LiveLabeler
from mapo_lightning.envs.settings import EnvConfig
from mapo_lightning.envs.wrappers import PixelEnv
from mapo_lightning.semantics.factory import build_labeler
from mapo_lightning.semantics.settings import VlmConfig
from mapo_lightning.types import EnvironmentSetupError

CUTS = 4
"""Steps of an episode of `Odd`."""


class Odd(gym.Env[Any, Any]):
    """A plain environment; every keyword replaces one thing that it does."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space = spaces.Box(0.0, 1.0, (1,))
    action_space: spaces.Space[Any] = spaces.Discrete(2)

    def __init__(self, render_mode: str | None = None, **odd: Any) -> None:
        self.render_mode, self.odd, self.steps = render_mode, odd, 0
        if "constructor" in odd:
            raise odd["constructor"]

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        fresh = np.zeros(1, np.float32)
        return self.odd["reset"](fresh) if "reset" in self.odd else (fresh, {})

    def step(self, action: Any) -> Any:
        self.steps += 1
        if self.steps >= self.odd.get("from_step", 1):
            if "step" in self.odd:
                return self.odd["step"](np.zeros(1, np.float32))
            reward = self.odd.get("reward", 1.0)
        else:
            reward = 1.0
        return np.zeros(1, np.float32), reward, False, self.steps == CUTS, self.odd.get("info", {})

    def render(self) -> Any:
        return self.odd.get("render", np.full((20, 30, 3), 9, np.uint8))


def raising(error: Exception) -> Any:
    def fail(*_: Any) -> Any:
        raise error

    return fail


gym.register("Odd-v0", Odd, max_episode_steps=9)
gym.register("OddEndless-v0", Odd, disable_env_checker=True)


def config(monkeypatch: pytest.MonkeyPatch, name: str = "Odd-v0", **odd: Any) -> EnvConfig:
    """The settings of an `Odd` with these oddities."""
    monkeypatch.setattr(gym.spec(name), "kwargs", odd)
    return EnvConfig(kind="gym", name=name, time_limit=8)


def built(monkeypatch: pytest.MonkeyPatch, **odd: Any) -> PixelEnv:
    return make_env(config(monkeypatch, **odd), seed=0)


PICTURE = r"render must return an \(H, W, 3\) uint8 array.*it returned "
FOUR = r"step must return observation, reward, terminated, truncated and an info dict"
# Gymnasium's own checker finds some faults first, where an id is registered with it.
CHECKED_RESET = "reset must return an observation and an info|second element returned by"
CHECKED_STEP = f"{FOUR}|Expects step result to be a tuple"
BEFORE_ANY_WORK = {
    "value_error": ({"constructor": ValueError("no such map")}, "ValueError: no such map"),
    "runtime_error": ({"constructor": RuntimeError()}, "RuntimeError: no message"),
    "os_error": ({"constructor": OSError(2, "gone")}, "gone"),
    "old_reset": ({"reset": lambda x: x}, r"at reset: reset must return.*an array \(1,\)"),
    "no_info": ({"reset": lambda x: (x, None)}, CHECKED_RESET),
    "reset_fails": ({"reset": raising(KeyError("x"))}, "failed at reset: KeyError: 'x' .*line "),
    "old_step": ({"step": lambda x: (x, 1.0, False, {})}, f"at step 1 of an episode: {FOUR}"),
    "scalar_step": ({"step": lambda x: x}, CHECKED_STEP),
    "step_fails": ({"step": raising(ZeroDivisionError("a\nb"))}, "ZeroDivisionError: a b"),
    "grey": ({"render": np.zeros((5, 5, 1), np.uint8)}, PICTURE + r"an array \(5, 5, 1\)"),
    "flat": ({"render": np.zeros((5, 5), np.uint8)}, PICTURE + r"an array \(5, 5\) of uint8"),
    "alpha": ({"render": np.zeros((5, 5, 4), np.uint8)}, PICTURE + r"an array \(5, 5, 4\)"),
    "floats": ({"render": np.zeros((5, 5, 3))}, PICTURE + r"an array \(5, 5, 3\) of float64"),
    "empty": ({"render": np.zeros((0, 5, 3), np.uint8)}, PICTURE + r"an array \(0, 5, 3\)"),
    "none": ({"render": None}, PICTURE + "None"),
    "list": ({"render": [np.zeros((5, 5, 3), np.uint8)]}, PICTURE + "a list of 1"),
    "rewards": ({"reward": np.ones(2)}, r"the reward must be one number, got an array \(2,\)"),
    "no_reward": ({"reward": None}, "the reward must be one number, got None"),
    "words": ({"reward": "1.0"}, "the reward must be one number"),
    "nan": ({"reward": float("nan")}, "the reward must be a finite number, got nan"),
    "success": ({"info": {"success": np.nan}}, r"info\['success'\] must be a finite number"),
}


@pytest.mark.parametrize(("odd", "message"), BEFORE_ANY_WORK.values(), ids=BEFORE_ANY_WORK.keys())
@pytest.mark.parametrize("name", ["Odd-v0", "OddEndless-v0"])
def test_what_one_step_shows_is_said_before_the_run_begins(
    name: str, odd: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EnvironmentSetupError, match=message) as caught:
        probed_action_dim(config(monkeypatch, name, **odd))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sound_environment_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probed_action_dim(config(monkeypatch)) == 2


@pytest.mark.parametrize("reward", [np.array([2.0]), np.float32(2.0), np.array(2), 2])
def test_an_array_of_one_number_is_that_number(
    reward: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = built(monkeypatch, reward=reward, info={"success": np.array([True])})
    env.reset()
    found = env.step(np.zeros(2, np.float32))
    assert (found[1], type(found[1]), found[4]) == (2.0, float, {"success": 1.0})


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_a_reward_that_is_no_number_never_gets_into_replay(
    reward: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replay keeps float32, in which 1e39 is infinite."""
    cfg = config(monkeypatch, reward=reward, from_step=3)
    vlm = VlmConfig(kind="none")
    labels = LiveLabeler(build_labeler(vlm, tmp_path, "t"), vlm.window, vlm.collect, 1, "odd")
    replay = Replay(tmp_path / "replay", ReplayConfig(), ReplaySpec((64, 64, 3), 2, 320))
    collector = Collector(make_vector_env(cfg, seed=0), labels, replay, seed=0)
    with pytest.raises(EnvironmentSetupError, match=r"gym/Odd-v0 at step 3 of an episode: the rew"):
        collector.collect(RandomPolicy(2, seed=0), 5)
    state = replay.state()
    assert state["open"] == [[0, 3, 0]]  # the first observation and two steps
    assert Replay(replay.root, ReplayConfig(), replay.spec).restore(state) == 0
    collector.close()


def test_a_package_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(EnvironmentSetupError, match="'no_such_package:Task-v0'"):
        make_env(EnvConfig(kind="gym", name="no_such_package:Task-v0"), seed=0)
