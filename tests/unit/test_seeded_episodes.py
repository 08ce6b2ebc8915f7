"""Episodes are taken up where they were: by seed and actions, in every suite."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mapo_lightning.envs.factory import make_env
from mapo_lightning.envs.seeded_episodes import GO_ON, OpenEpisode, SeededEpisodes, episode_seed
from mapo_lightning.envs.settings import EnvConfig
from mapo_lightning.envs.wrappers import BLIND

METAWORLD = ("door-open", "drawer-close", "lever-pull", "dial-turn")
SEED, STEPS, EPISODES = 11, 12, 3


def make(kind: str, name: str) -> SeededEpisodes:
    return SeededEpisodes(make_env(EnvConfig(kind=kind, name=name, time_limit=30), SEED), SEED)  # type: ignore[arg-type]


def actions(env: SeededEpisodes) -> NDArray[np.float32]:
    assert env.action_space.shape is not None
    shape = (STEPS, *env.action_space.shape)
    return np.random.default_rng(3).uniform(-1, 1, shape).astype(np.float32)


def goals(name: str) -> list[list[float]]:
    """Goal of every episode of a task of Meta-World, as a fresh process draws them."""
    env = make("metaworld", name)
    found = []
    for _ in range(EPISODES):
        env.reset()
        for action in actions(env)[: len(found)]:  # however long the episodes before it were
            env.step(action)
        found.append([float(x) for x in env.env.simulator.goal])  # type: ignore[attr-defined]
    env.close()
    return found


def play(env: SeededEpisodes, taken: NDArray[np.float32]) -> list[tuple[bytes, float]]:
    return [(obs["image"].tobytes(), float(reward)) for obs, reward, *_ in map(env.step, taken)]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("toy", "disc_anywhere"),
        pytest.param("dmc", "cartpole_balance", marks=pytest.mark.slow),
        pytest.param("dmc", "walker_run", marks=pytest.mark.slow),
        *[pytest.param("metaworld", name, marks=pytest.mark.slow) for name in METAWORLD],
    ],
)
def test_an_episode_is_taken_up_in_its_middle(kind: str, name: str) -> None:
    env, other = make(kind, name), make(kind, name)
    taken = actions(env)
    for _ in range(EPISODES):
        env.reset()
        seen = play(env, taken)
    other.reset()  # whatever it did before
    play(other, taken[:5])
    other.episode = OpenEpisode(SEED, EPISODES - 1, taken[:8])
    obs, info = other.reset(options={GO_ON: True})
    assert (obs["image"].tobytes(), info["reward"]) == seen[7]
    assert info["repeated"]
    assert play(other, taken[8:]) == seen[8:]
    assert env.reset()[0]["image"].tobytes() == other.reset()[0]["image"].tobytes()
    if kind == "metaworld":
        inner: Any = env.env
        assert inner.simulator.goal.tolist() == other.env.simulator.goal.tolist()  # type: ignore[attr-defined]
    env.close()
    other.close()


@pytest.mark.slow
def test_goals_of_metaworld_are_the_same_in_every_process() -> None:
    here = {name: goals(name) for name in METAWORLD}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for _ in range(2):
            assert dict(zip(METAWORLD, pool.map(goals, METAWORLD), strict=True)) == here
    for found in here.values():
        assert len({tuple(goal) for goal in found}) == EPISODES


def test_every_episode_has_a_seed_of_its_own() -> None:
    seeds = {episode_seed(first, number) for first in range(50) for number in range(50)}
    assert len(seeds) == 2500
    env = make("toy", "disc")
    first = env.reset(seed=5)[0]["image"]
    assert not np.array_equal(env.reset()[0]["image"], first)
    assert np.array_equal(env.reset(seed=5)[0]["image"], first)
    assert np.array_equal(make_env(EnvConfig(), 5).reset()[0]["image"], first)


def test_a_withheld_frame_is_shown_at_the_next_step() -> None:
    env = make("toy", "disc")
    env.episode = OpenEpisode(SEED, 4, np.zeros((0, 2), np.float32), withheld=True)
    first, _ = env.reset(options={GO_ON: True})
    obs, reward, terminated, truncated, _ = env.step(np.ones(2, np.float32))
    assert np.array_equal(obs["image"], first["image"])
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert not np.array_equal(env.step(np.ones(2, np.float32))[0]["image"], first["image"])


def test_episodes_that_nobody_looks_at_are_followed_by_such() -> None:
    env = make("toy", "disc")
    env.reset(seed=5, options={BLIND: True})
    assert not env.reset()[0]["image"].any()  # as where another environment plays on
    env.reset(seed=5)
    assert env.reset()[0]["image"].any()
    env.reset(seed=5, options={BLIND: True})
    env.episode = OpenEpisode(SEED, 1, np.zeros((0, 2), np.float32))
    env.reset(options={GO_ON: True})
    assert env.reset()[0]["image"].any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lqr_lqr_2_1", "reacher_easy"])
def test_two_robots_of_a_task_are_the_same(name: str) -> None:
    """The masses and springs of some tasks are drawn, too."""
    envs = [make("dmc", name), make("dmc", name)]
    taken = actions(envs[0])
    for env in envs:
        env.reset()
    assert play(envs[0], taken) == play(envs[1], taken)
