"""An evaluation whose environment's process dies is played again, with the same results."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from numpy.typing import NDArray

from mapo_lightning.config.compose import compose
from mapo_lightning.envs.episodes import Policy, StillPolicy
from mapo_lightning.envs.factory import make_env
from mapo_lightning.envs.live_labels import Step
from mapo_lightning.envs.replacement import Deaths
from mapo_lightning.envs.seeded_episodes import SeededEpisodes
from mapo_lightning.run import stages
from mapo_lightning.run.config import RunConfig
from mapo_lightning.types import EnvironmentSetupError

CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.slow
def test_an_evaluation_is_played_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["env=toy", "vlm=none", f"work_dir={tmp_path}", "evaluate.episodes=3"]
    words += ["env.deaths_per_hour=2"]
    cfg = compose(words, RunConfig, CONF).config
    made: list[AsyncVectorEnv] = []

    def in_processes(env: Any, seed: int, count: int) -> AsyncVectorEnv:
        makers = [lambda: SeededEpisodes(functools.partial(make_env, env, seed)())] * count
        made.append(
            AsyncVectorEnv(makers, context="fork", autoreset_mode=AutoresetMode.NEXT_STEP)  # type: ignore[arg-type]
        )
        return made[-1]

    def fatal(lives: int) -> Any:
        """Policies under which one process dies in the third step, as often as asked."""

        def policy_of(seed: int) -> Policy:
            count = 0

            def policy(step: Step) -> NDArray[np.float32]:
                nonlocal count
                count += 1
                if count == 3 and 0 < len(made) <= lives:
                    made[-1].processes[0].kill()
                    made[-1].processes[0].join()
                return StillPolicy(2)(step)

            return policy

        return policy_of

    expected, _ = stages.play_episodes(cfg, fatal(0), 0)
    monkeypatch.setattr(stages, "make_vector_env", in_processes)
    deaths = Deaths(cfg.env.deaths_per_hour, clock=lambda: 0.0)
    assert stages.play_episodes(cfg, fatal(2), 0, deaths)[0] == expected
    assert (deaths.count, len(made)) == (2, 3)
    with pytest.raises(EnvironmentSetupError, match=r"3 processes .*deaths_per_hour allows 2"):
        stages.play_episodes(cfg, fatal(4), 0, deaths)
    assert not any(process.is_alive() for envs in made for process in envs.processes)
