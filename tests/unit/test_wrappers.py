"""Configuration, repeat, normalisation, limits, resizing: all that the suites share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from mapo_lightning.envs.factory import env_seed, make_env, make_vector_env
from mapo_lightning.envs.settings import EnvConfig
from mapo_lightning.envs.wrappers import BLIND, Outcome, PixelEnv, resize_area
from mapo_lightning.types import ConfigError, MapoError


class Recorder:
    """A real simulator of nothing: remembers its actions, ends when told to."""

    frame_rate = 40.0

    def __init__(
        self,
        space: spaces.Space[Any],
        terminate_at: int | None = None,
        frame_limit: int | None = 20,
    ) -> None:
        self.action_space, self.terminate_at, self.frame_limit = space, terminate_at, frame_limit
        self.actions: list[object] = []
        self.seeds: list[int | None] = []
        self.frames = 0

    def reset(self, seed: int | None) -> None:
        self.seeds.append(seed)
        self.frames = 0

    def step(self, action: object) -> Outcome:
        self.actions.append(action)
        self.frames += 1
        return Outcome(
            reward=float(self.frames),
            terminated=self.frames == self.terminate_at,
            truncated=self.frames == self.frame_limit,
            success=float(self.frames == 2),
        )

    def frame(self, size: int) -> np.ndarray:
        return np.full((size, size, 3), self.frames, np.uint8)

    def close(self) -> None: ...


UNEQUAL = spaces.Box(np.array([-1.0, 0.0]), np.array([1.1, 4.0]), dtype=np.float64)


def test_the_reward_is_summed_and_success_kept_over_a_repeat() -> None:
    env = PixelEnv(Recorder(UNEQUAL), action_repeat=3)
    env.reset()
    _, reward, *_, info = env.step(np.zeros(2, np.float32))
    assert reward == 1 + 2 + 3
    assert info == {"success": 1.0}
    *_, info = env.step(np.zeros(2, np.float32))
    assert info == {"success": 0.0}


def test_a_repeat_stops_where_the_task_ends() -> None:
    simulator = Recorder(UNEQUAL, terminate_at=2)
    env = PixelEnv(simulator, action_repeat=5)
    env.reset()
    _, reward, terminated, truncated, _ = env.step(np.zeros(2, np.float32))
    assert (reward, terminated, truncated) == (3.0, True, False)
    assert simulator.frames == 2


@pytest.mark.parametrize(
    ("action", "raw"),
    [((-1, -1), (-1.0, 0.0)), ((1, 1), (1.1, 4.0)), ((0, 0), (0.05, 2.0)), ((-9, 9), (-1.0, 4.0))],
)
def test_actions_are_scaled_to_unequal_bounds_and_clipped(
    action: tuple[float, float], raw: tuple[float, float]
) -> None:
    simulator = Recorder(UNEQUAL)
    env = PixelEnv(simulator)
    env.reset()
    env.step(np.array(action, np.float32))
    np.testing.assert_allclose(simulator.actions[0], raw)
    assert UNEQUAL.contains(simulator.actions[0])


def test_of_discrete_choices_the_most_preferred_is_taken() -> None:
    simulator = Recorder(spaces.Discrete(3, start=5))
    env = PixelEnv(simulator)
    assert env.action_space == spaces.Box(-1.0, 1.0, (3,), np.float32)
    env.reset()
    env.step(np.array([-0.2, 0.9, 0.1], np.float32))
    assert simulator.actions == [6]


@pytest.mark.parametrize("bad", [np.zeros(3), np.array([np.nan, 0.0]), np.zeros((1, 2))])
def test_wrong_actions_are_refused(bad: np.ndarray) -> None:
    env = PixelEnv(Recorder(UNEQUAL))
    env.reset()
    with pytest.raises(MapoError, match=r"shape \(2,\) with finite values"):
        env.step(bad)


@pytest.mark.parametrize(
    ("repeat", "time_limit", "expected"), [(1, None, 20), (2, None, 10), (3, None, 7), (2, 4, 4)]
)
def test_episodes_are_truncated_at_the_limit(
    repeat: int, time_limit: int | None, expected: int
) -> None:
    env = PixelEnv(Recorder(UNEQUAL), action_repeat=repeat, time_limit=time_limit)
    assert env.steps_limit == expected
    env.reset()
    ends = [env.step(np.zeros(2))[2:4] for _ in range(expected)]
    assert ends == [(False, False)] * (expected - 1) + [(False, True)]
    with pytest.raises(MapoError, match="call reset first"):
        env.step(np.zeros(2))


def test_an_end_in_the_last_step_is_an_end_and_no_truncation() -> None:
    env = PixelEnv(Recorder(UNEQUAL, terminate_at=4), time_limit=4)
    env.reset()
    for _ in range(3):
        env.step(np.zeros(2))
    assert env.step(np.zeros(2))[2:4] == (True, False)


def test_the_first_reset_uses_the_seed_of_the_environment() -> None:
    simulator = Recorder(UNEQUAL)
    env = PixelEnv(simulator, seed=11)
    env.reset()
    env.reset()
    env.reset(seed=3)
    assert simulator.seeds == [11, None, 3]


def test_a_second_image_is_drawn_at_its_own_size() -> None:
    env = PixelEnv(Recorder(UNEQUAL), size=64, label_size=96)
    observation, _ = env.reset()
    assert {k: v.shape for k, v in observation.items()} == {
        "image": (64, 64, 3),
        "label_image": (96, 96, 3),
    }
    assert env.observation_space.contains(observation)
    assert env.render().shape == (96, 96, 3)


def test_in_a_blind_episode_nothing_is_drawn() -> None:
    simulator = Recorder(UNEQUAL, frame_limit=2)
    env = PixelEnv(simulator, size=4, label_size=8)
    seen, _ = env.reset(options={BLIND: True})
    simulator.frames = 7  # what a picture would show
    after, *_ = env.step(np.zeros(2, np.float32))
    for obs in (seen, after):
        assert {name: image.shape for name, image in obs.items()} == {
            "image": (4, 4, 3),
            "label_image": (8, 8, 3),
        }
        assert not any(image.any() for image in obs.values())
    env.reset()
    obs, *_ = env.step(np.zeros(2, np.float32))
    assert {int(image.max()) for image in obs.values()} == {1}  # the next episode is seen again


def test_resizing_averages_areas_exactly_where_sizes_divide() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (12, 8, 3), np.uint8)
    expected = np.rint(image.reshape(4, 3, 4, 2, 3).mean(axis=(1, 3)))
    np.testing.assert_allclose(resize_area(image, 4), expected, atol=1)


@pytest.mark.parametrize("shape", [(400, 600), (63, 65), (64, 64), (10, 7)])
def test_resizing_keeps_the_mean_and_never_shares_memory(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    small = resize_area(image, 64)
    assert small.shape == (64, 64, 3)
    assert not np.shares_memory(small, image)
    np.testing.assert_allclose(small.mean(axis=(0, 1)), image.mean(axis=(0, 1)), atol=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "atari"}, "kind must be one of toy, dmc, metaworld, gym, got 'atari'"),
        ({"action_repeat": 0}, "action_repeat must be at least 1, got 0"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"num_envs": 0}, "num_envs must be at least 1, got 0"),
        ({"render_quality": "best"}, "render_quality must be full or fast, got 'best'"),
        ({"kind": "metaworld", "name": "door-open", "time_limit": 501}, "time_limit must fit"),
        ({"kind": "dmc", "name": "walker_run", "time_limit": 501}, "time_limit must fit"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EnvConfig(**change)  # type: ignore[arg-type]


def test_an_empty_name_is_refused_when_the_environment_is_built() -> None:
    with pytest.raises(ConfigError, match=r"env\.name must name a task of gym"):
        make_env(EnvConfig(kind="gym", name=""), 0)


def test_suites_have_the_published_action_repeat() -> None:
    assert EnvConfig(kind="dmc", name="walker_run").frames_per_step == 2
    assert EnvConfig(kind="metaworld", name="door-open").frames_per_step == 1
    assert EnvConfig(kind="dmc", name="walker_run", action_repeat=4).frames_per_step == 4


@pytest.fixture
def two_toys() -> Iterator[gym.vector.VectorEnv]:
    envs = make_vector_env(EnvConfig(), seed=0, num_envs=2)
    yield envs
    envs.close()


def test_a_vector_has_different_episodes_and_resets_in_the_step_after_the_end(
    two_toys: gym.vector.VectorEnv,
) -> None:
    observation, _ = two_toys.reset()
    assert observation["image"].shape == (2, 64, 64, 3)
    assert (observation["image"][0] != observation["image"][1]).any()
    still = np.zeros((2, 2), np.float32)
    for _ in range(50):
        last, _, _, truncated, info = two_toys.step(still)
    assert truncated.all()
    assert info["success"].shape == (2,)
    fresh, reward, _, truncated, _ = two_toys.step(still)
    assert not truncated.any()
    assert (reward == 0.0).all()
    assert (fresh["image"] != last["image"]).any(axis=(1, 2, 3)).all()


def test_seeds_of_a_vector_do_not_overlap_with_those_of_the_next_seed() -> None:
    seeds = {env_seed(seed, index) for seed in range(20) for index in range(8)}
    assert len(seeds) == 160


def test_an_environment_of_a_vector_is_the_one_made_alone() -> None:
    envs = make_vector_env(EnvConfig(), seed=4, num_envs=2)
    alone = make_env(EnvConfig(), env_seed(4, 1))
    together, _ = envs.reset()
    np.testing.assert_array_equal(together["image"][1], alone.reset()[0]["image"])
    envs.close()


def test_a_vector_of_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_envs must be at least 1, got 0"):
        make_vector_env(EnvConfig(), seed=0, num_envs=0)
