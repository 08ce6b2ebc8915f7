"""Every environment keeps the same promises, whatever draws it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

from mapo_lightning.envs.factory import make_env, make_vector_env, needs_gl
from mapo_lightning.envs.settings import EnvConfig
from mapo_lightning.envs.snapshots import Restorable
from mapo_lightning.envs.wrappers import PixelEnv
from mapo_lightning.types import EnvironmentSetupError


class Slider(gym.Env[np.ndarray, int]):
    """A bar that moves left, right or stays; a registered id that needs no OpenGL."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.observation_space = spaces.Box(0.0, 1.0, (1,))
        self.action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, Any]:
        super().reset(seed=seed)
        self.place = int(self.np_random.integers(20, 80))
        return np.array([self.place / 100], np.float32), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.place = int(np.clip(self.place + 4 * (action - 1), 5, 94))
        near = abs(self.place - 50) < 3
        return np.array([self.place / 100], np.float32), float(near), False, False, {}

    def render(self) -> np.ndarray:
        image = np.zeros((80, 100, 3), np.uint8)
        image[:40] = 90  # brighter above: shows which way is up
        image[:, self.place - 5 : self.place + 5] = (0, 200, 255)
        return image


gym.register("Slider-v0", Slider, max_episode_steps=30)
gym.register("Endless-v0", Slider)

DMC = ("cheetah_run", "walker_run", "hopper_hop", "quadruped_run", "cartpole_balance")
METAWORLD = ("door-open", "drawer-close", "lever-pull", "dial-turn")
LIMIT = {"toy": 50, "dmc": 500, "metaworld": 500, "gym": 30}
ACTIONS = {"cheetah_run": 6, "walker_run": 6, "hopper_hop": 4, "quadruped_run": 12} | {
    "cartpole_balance": 1,
    "disc": 2,
    "disc_anywhere": 2,
    "Slider-v0": 3,
    "InvertedPendulum-v5": 1,
}
CONFIGS = [
    EnvConfig(kind="toy", name="disc"),
    EnvConfig(kind="toy", name="disc_anywhere"),
    EnvConfig(kind="gym", name="Slider-v0"),
    EnvConfig(kind="gym", name="InvertedPendulum-v5", action_repeat=2),
    *(EnvConfig(kind="dmc", name=name) for name in DMC),
    *(EnvConfig(kind="metaworld", name=name) for name in METAWORLD),
]


@cache  # building takes longer than all that is tested; every test resets with its own seed
def shared(index: int) -> PixelEnv:
    return make_env(CONFIGS[index], seed=0)


def name_of(index: int) -> str:
    return f"{CONFIGS[index].kind}-{CONFIGS[index].name}"


@pytest.fixture(params=range(len(CONFIGS)), ids=name_of)
def case(request: pytest.FixtureRequest) -> tuple[EnvConfig, PixelEnv]:
    return CONFIGS[request.param], shared(request.param)


@pytest.fixture(scope="module", autouse=True)
def close_all() -> Iterator[None]:
    yield
    for index in range(len(CONFIGS)):
        shared(index).close()
    shared.cache_clear()


def play(env: PixelEnv, seed: int | None, agent_steps: int = 4) -> tuple[list[Any], list[float]]:
    """Images and rewards under fixed random actions."""
    rng = np.random.default_rng(1)
    observation, _ = env.reset(seed=seed)
    images, rewards = [observation["image"]], []
    for _ in range(agent_steps):
        action = rng.uniform(-1.0, 1.0, env.action_space.shape).astype(np.float32)
        observation, reward, terminated, truncated, _ = env.step(action)
        images.append(observation["image"])
        rewards.append(reward)
        if terminated or truncated:
            break
    return images, rewards


@pytest.mark.slow
def test_spaces_are_the_promised_ones(case: tuple[EnvConfig, PixelEnv]) -> None:
    cfg, env = case
    assert env.observation_space == spaces.Dict({"image": spaces.Box(0, 255, (64, 64, 3), "uint8")})
    assert env.action_space == spaces.Box(-1.0, 1.0, (ACTIONS.get(cfg.name, 4),), np.float32)
    observation, info = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert info == {}
    observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
    assert env.observation_space.contains(observation)
    assert [type(x) for x in (reward, terminated, truncated)] == [float, bool, bool]
    assert ("success" in info) == (cfg.kind in ("toy", "metaworld"))
    assert all(type(value) is float and value in (0.0, 1.0) for value in info.values())


@pytest.mark.slow
def test_the_same_seed_gives_the_same_episodes(case: tuple[EnvConfig, PixelEnv]) -> None:
    _, env = case
    runs = [play(env, seed=3) + play(env, seed=None) for _ in range(2)]
    for one, two in zip(*runs, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.slow
def test_a_restored_state_goes_on_as_if_nothing_had_been_saved(
    case: tuple[EnvConfig, PixelEnv],
) -> None:
    _, env = case
    assert isinstance(env.simulator, Restorable)
    rng = np.random.default_rng(2)
    ways = rng.uniform(-0.2, 0.2, (3, 3, *env.action_space.shape)).astype(np.float32)
    env.reset(seed=3)
    for action in ways[0]:
        shown = env.step(action)[0]["image"]
    snapshot, seen = env.save(), {}
    for turn, way in enumerate((1, 2, 1, 1, 2)):
        if turn:
            np.testing.assert_array_equal(env.restore(snapshot)["image"], shown)
        found: list[Any] = []
        for action in ways[way]:
            obs, *rest = env.step(action)
            found.append((obs["image"].tobytes(), *rest))
            if rest[1] or rest[2]:  # the pendulum falls
                break
        assert seen.setdefault(way, found) == found


@pytest.mark.slow
def test_another_seed_and_the_next_episode_differ(case: tuple[EnvConfig, PixelEnv]) -> None:
    _, env = case
    first, following, other = (play(env, seed)[0] for seed in (3, None, 4))
    assert any((a != b).any() for a, b in zip(first, following, strict=True))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("index", [1, 3, 5, 9], ids=lambda i: CONFIGS[i].name)
def test_a_fresh_environment_repeats_what_its_seed_promises(index: int) -> None:
    env = make_env(CONFIGS[index], seed=3)
    fresh = play(env, seed=None)
    env.close()
    for one, two in zip(fresh, play(shared(index), seed=3), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.slow
def test_observations_share_no_memory(case: tuple[EnvConfig, PixelEnv]) -> None:
    images, _ = play(case[1], seed=0, agent_steps=3)
    for i, image in enumerate(images):
        assert image.flags.writeable
        assert image.flags.c_contiguous
        assert not any(np.shares_memory(image, other) for other in images[i + 1 :])
    before = images[0].copy()
    images[1][:] = 0
    np.testing.assert_array_equal(images[0], before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "index", [i for i, c in enumerate(CONFIGS) if c.name != "InvertedPendulum-v5"], ids=name_of
)  # the pendulum falls before its clock runs out: the next test
def test_episodes_end_with_the_clock_of_the_suite(index: int) -> None:
    cfg, env = CONFIGS[index], shared(index)
    assert env.steps_limit == LIMIT[cfg.kind]
    env.reset(seed=0)
    zero = env._denormalised(np.zeros(env.action_space.shape, np.float32))
    frames = LIMIT[cfg.kind] * cfg.frames_per_step
    for _ in range(frames - cfg.frames_per_step):  # without pictures, which take the time
        assert not env.simulator.step(zero).truncated
    *_, terminated, truncated, _ = env.step(np.zeros(env.action_space.shape, np.float32))
    assert (terminated, truncated) == (False, True)


def test_a_task_that_ends_is_terminated_and_not_truncated() -> None:
    env = shared(3)
    env.reset(seed=0)
    for _ in range(200):
        *_, terminated, truncated, _ = env.step(np.ones(1, np.float32))
        if terminated:
            break
    assert (terminated, truncated) == (True, False)


@pytest.mark.slow
def test_a_shorter_limit_is_kept_and_a_label_image_is_drawn() -> None:
    env = make_env(EnvConfig(kind="dmc", name="walker_run", time_limit=2, label_size=128), 0)
    observation, _ = env.reset()
    assert observation["label_image"].shape == (128, 128, 3)
    small = observation["label_image"].reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(small - observation["image"]).mean() < 4.0, "both show the same moment"
    ends = [env.step(np.zeros(6, np.float32))[3] for _ in range(2)]
    env.close()
    assert ends == [False, True]


def test_gymnasium_itself_accepts_the_interface() -> None:
    check_env(make_env(EnvConfig(), 0), skip_render_check=True)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [(9, 10), (3, 5), (3, 9)], ids=str)
def test_environments_in_one_process_do_not_show_each_other(pair: tuple[int, int]) -> None:
    envs = [shared(index) for index in pair]
    alone = [play(env, seed=2, agent_steps=2)[0] for env in envs]
    for env in envs:
        env.reset(seed=2)
    for _ in range(10):  # drawn in turns, at the first moment of the episode
        for env, expected in zip(envs, alone, strict=True):
            np.testing.assert_array_equal(env.simulator.frame(64), expected[0])
    others = [make_env(CONFIGS[index], seed=9) for index in pair]
    for env in others:  # two of a kind; and closing one must not hurt the other
        env.reset()
        env.close()
    for env, expected in zip(envs, alone, strict=True):
        for one, two in zip(play(env, seed=2, agent_steps=2)[0], expected, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.slow
def test_processes_render_what_one_process_renders() -> None:
    cfg = EnvConfig(kind="dmc", name="cartpole_balance", num_envs=2)
    envs = make_vector_env(cfg, seed=0)
    observation, _ = envs.reset(seed=[3, 4])
    kept = observation["image"].copy()
    later, *_ = envs.step(np.ones((2, 1), np.float32))
    assert (later["image"] != kept).any(), "the cart has moved"
    np.testing.assert_array_equal(observation["image"], kept)  # its memory is not used again
    envs.close()
    assert needs_gl(cfg)
    alone = shared(4 + DMC.index("cartpole_balance"))
    for row, seed in enumerate((3, 4)):
        np.testing.assert_array_equal(observation["image"][row], alone.reset(seed=seed)[0]["image"])


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (EnvConfig(kind="dmc", name="walker_fly"), "no task 'walker_fly', did you mean 'walker_"),
        (
            EnvConfig(kind="metaworld", name="door"),
            "no task 'door', did you mean 'door-.*door-o",
        ),
        (EnvConfig(kind="gym", name="No-v0"), "cannot build the Gymnasium environment 'No-v0'"),
        (EnvConfig(kind="gym", name="Endless-v0"), "registered without a limit.*env.time_limit"),
        (EnvConfig(kind="dmc", name="walker_run", camera=9), "no camera 9; this task has: 0 'si"),
        (EnvConfig(kind="metaworld", name="door-open", camera="x"), "no camera 'x'.*'corner'"),
    ],
    ids=lambda value: value.name if isinstance(value, EnvConfig) else "",
)
def test_what_does_not_exist_is_named_with_what_does(cfg: EnvConfig, message: str) -> None:
    with pytest.raises(EnvironmentSetupError, match=message):
        make_env(cfg, 0)


def test_an_endless_id_is_accepted_with_a_limit() -> None:
    assert make_env(EnvConfig(kind="gym", name="Endless-v0", time_limit=9), 0).steps_limit == 9
