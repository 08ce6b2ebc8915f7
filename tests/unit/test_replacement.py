"""Test episodes go the same way in new environments, in kept ones, and after a process died."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from numpy.typing import NDArray

from mapo_lightning.config.compose import compose
from mapo_lightning.envs.episodes import Episode, Policy, RandomPolicy, StillPolicy
from mapo_lightning.envs.factory import make_env
from mapo_lightning.envs.live_labels import Step
from mapo_lightning.envs.replacement import Deaths
from mapo_lightning.envs.seeded_episodes import SeededEpisodes
from mapo_lightning.run import episode_player
from mapo_lightning.run.config import RunConfig
from mapo_lightning.run.episode_player import EpisodePlayer
from mapo_lightning.types import EnvironmentSetupError

CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture
def cfg(tmp_path: Path) -> RunConfig:
    words = ["env=toy", "vlm=none", f"work_dir={tmp_path}", "evaluate.episodes=3"]
    return compose([*words, "env.deaths_per_hour=2"], RunConfig, CONF).config


@pytest.fixture
def expected(cfg: RunConfig) -> list[Episode]:
    """What no action gets in environments as they are started without a test."""
    with EpisodePlayer(cfg) as play:
        return play(still, 0)[0]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[AsyncVectorEnv]:
    """Environments that a player starts, each in a process of its own."""
    made: list[AsyncVectorEnv] = []

    def in_processes(env: Any, seed: int, count: int) -> AsyncVectorEnv:
        makers = [lambda: SeededEpisodes(functools.partial(make_env, env, seed)())] * count
        made.append(
            AsyncVectorEnv(makers, context="fork", autoreset_mode=AutoresetMode.NEXT_STEP)  # type: ignore[arg-type]
        )
        return made[-1]

    monkeypatch.setattr(episode_player, "make_vector_env", in_processes)
    return made


def alive(made: list[AsyncVectorEnv]) -> int:
    return sum(process.is_alive() for envs in made for process in envs.processes)


def still(seed: int) -> Policy:
    return StillPolicy(2)


def random(seed: int) -> Policy:
    return RandomPolicy(2, seed)


@pytest.mark.slow
def test_an_evaluation_is_played_again(
    cfg: RunConfig, expected: list[Episode], made: list[AsyncVectorEnv]
) -> None:
    def fatal(lives: int) -> Any:
        """Policies under which one process dies in the third step, as often as asked."""

        def policy_of(seed: int) -> Policy:
            count = 0

            def policy(step: Step) -> NDArray[np.float32]:
                nonlocal count
                count += 1
                if count == 3 and len(made) <= lives:
                    made[-1].processes[0].kill()
                    made[-1].processes[0].join()
                return StillPolicy(2)(step)

            return policy

        return policy_of

    deaths = Deaths(cfg.env.deaths_per_hour, clock=lambda: 0.0)
    with EpisodePlayer(cfg, deaths) as play:
        assert play(fatal(2), 0)[0] == expected
        assert (deaths.count, len(made)) == (2, 3)
        made[-1].processes[0].kill()  # between two evaluations
        made[-1].processes[0].join()
        with pytest.raises(EnvironmentSetupError, match=r"3 processes .*deaths_per_hour allows 2"):
            play(still, 0)
    assert not alive(made)


@pytest.mark.slow
def test_environments_are_kept_and_remember_nothing(
    cfg: RunConfig, made: list[AsyncVectorEnv]
) -> None:
    def played(*policies: Any) -> list[Any]:
        with EpisodePlayer(cfg) as play:
            return [play(policy_of, 0)[0] for policy_of in policies]

    alone = [played(policy_of)[0] for policy_of in (random, still)]
    assert alone[0] != alone[1]
    made.clear()
    assert played(random, still, random) == [*alone, alone[0]]
    assert len(made) == 1
    assert not alive(made)


@pytest.mark.slow
def test_other_reset_seeds_are_played_in_the_same_environments(
    cfg: RunConfig, made: list[AsyncVectorEnv]
) -> None:
    unseen = replace(cfg, evaluate=cfg.evaluate.unseen)
    with EpisodePlayer(unseen) as play:
        expected = play(still, 0)[0]
    made.clear()
    with EpisodePlayer(cfg) as play:
        seen = play(still, 0)[0]
        play.seeds = unseen.evaluate.seeds
        assert play(still, 0)[0] == expected != seen
    assert len(made) == 1


@pytest.mark.slow
def test_a_broken_off_evaluation_leaves_no_step_behind(
    cfg: RunConfig, made: list[AsyncVectorEnv]
) -> None:
    def broken_off(seed: int) -> Policy:
        def policy(step: Step) -> NDArray[np.float32]:
            made[-1].step_async(np.zeros((2, 2), np.float32))
            raise KeyboardInterrupt

        return policy

    cfg.evaluate.num_envs = 2
    with EpisodePlayer(cfg) as play:
        expected, _ = play(random, 0)
        with pytest.raises(KeyboardInterrupt):
            play(broken_off, 0)
        assert not alive(made)
        assert play(random, 0)[0] == expected


class Tiring(gym.Env[Any, Any]):
    """Pays less from episode to episode."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space, action_space = spaces.Box(0.0, 1.0, (1,)), spaces.Box(-1.0, 1.0, (2,))

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode, self.episodes = render_mode, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.episodes += 1
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(1, np.float32), 1.0 / self.episodes, False, False, {}

    def render(self) -> Any:
        return np.full((20, 30, 3), 9, np.uint8)


gym.register("Tiring-v0", Tiring, max_episode_steps=4)


def test_an_environment_that_remembers_is_started_anew(cfg: RunConfig) -> None:
    cfg.env = replace(cfg.env, kind="gym", name="Tiring-v0")
    cfg.evaluate.num_envs = 1
    with EpisodePlayer(cfg) as play:
        first, again = (play(still, 0)[0] for _ in range(2))
    assert first == again
    assert first[0].score == 4.0 > first[1].score
