"""The toy: known optimum, real seeds, the same picture at every size."""

from __future__ import annotations

import numpy as np
import pytest

from mapo_lightning.envs.factory import make_env
from mapo_lightning.envs.settings import EnvConfig
from mapo_lightning.envs.toy import OPTIMAL_RETURN, PAD_RADIUS, ToyDisc, reward_at
from mapo_lightning.envs.wrappers import resize_area
from mapo_lightning.types import EnvironmentSetupError

TASKS = ("disc", "disc_anywhere")


def play(name: str, policy: str, episodes: int) -> list[float]:
    env = make_env(EnvConfig(name=name), seed=7)
    rng = np.random.default_rng(0)
    returns = []
    for _ in range(episodes):
        env.reset()
        total, over = 0.0, False
        while not over:
            if policy == "optimal":
                action = env.simulator.optimal_action()
            else:
                action = rng.uniform(-1.0, 1.0, 2).astype(np.float32)
            _, reward, terminated, truncated, _ = env.step(action)
            assert 0.0 <= reward <= 1.0
            total, over = total + reward, terminated or truncated
        returns.append(total)
    return returns


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_optimal_actions_earn_the_documented_return_in_every_episode(name: str) -> None:
    np.testing.assert_allclose(play(name, "optimal", 20), OPTIMAL_RETURN, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_random_actions_earn_less_than_a_quarter_of_it(name: str) -> None:
    assert np.mean(play(name, "random", 50)) < OPTIMAL_RETURN / 4


def test_no_action_is_better_than_the_optimal_one() -> None:
    task, rng = ToyDisc("disc_anywhere"), np.random.default_rng(3)
    for seed in range(20):
        task.reset(seed)
        best = task.optimal_action()
        after_best = task.step(best).reward
        for _ in range(20):
            task.reset(seed)
            assert task.step(rng.uniform(-1.0, 1.0, 2)).reward <= after_best + 1e-6


def test_reward_falls_with_distance_from_one_to_zero() -> None:
    rewards = [reward_at(d) for d in np.linspace(0.0, 0.6, 30)]
    assert rewards[0] == 1.0
    assert rewards[-1] == 0.0
    assert rewards == sorted(rewards, reverse=True)


def test_success_is_being_on_the_pad() -> None:
    task = ToyDisc()
    task.reset(0)
    assert task.step(np.zeros(2)).success == 0.0
    for _ in range(10):
        outcome = task.step(task.optimal_action())
    assert outcome.success == 1.0
    assert np.hypot(*(task.disc - task.pad)) <= PAD_RADIUS


def test_a_long_action_is_no_faster_than_one_of_length_one() -> None:
    task, straight = ToyDisc(), ToyDisc()
    task.reset(0)
    straight.reset(0)
    before = task.disc
    task.step(np.array([1.0, 1.0]))
    straight.step(np.array([1.0, 0.0]))
    np.testing.assert_allclose(
        np.hypot(*(task.disc - before)), np.hypot(*(straight.disc - before)), rtol=1e-9
    )


def test_the_disc_is_drawn_where_it_is() -> None:
    task = ToyDisc()
    task.reset(1)
    image = task.frame(64).astype(int)
    red = (image[..., 0] > 200) & (image[..., 1] < 90)
    down, right = np.argwhere(red).mean(axis=0)
    np.testing.assert_allclose([right + 0.5, down + 0.5], task.landmarks(64)["disc"], atol=1.0)


def test_the_floor_changes_with_the_episode_and_not_within_it() -> None:
    task = ToyDisc("disc")
    task.reset(0)
    first = task.frame(64)
    task.step(task.optimal_action())
    corner = np.s_[:4, :4]
    np.testing.assert_array_equal(task.frame(64)[corner], first[corner])
    task.reset(None)
    assert (task.frame(64)[corner] != first[corner]).any()


def test_large_and_small_pictures_show_the_same() -> None:
    task = ToyDisc("disc_anywhere")
    task.reset(5)
    difference = resize_area(task.frame(256), 64).astype(int) - task.frame(64)
    assert np.abs(difference).mean() < 2.0


def test_an_unknown_task_names_the_known_ones() -> None:
    with pytest.raises(EnvironmentSetupError, match=r"toy has no task 'disk'.*disc_anywhere"):
        ToyDisc("disk")
