"""One configuration and two factories for every environment.

A suite is one file with a `Simulator` (see `wrappers.py`) and one entry in `make_simulator` below.
Simulator packages are imported only when an environment of their suite is built, and OpenGL is
initialised only for suites that draw with it.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from mapo_lightning.envs.seeded_episodes import SeededEpisodes
from mapo_lightning.envs.settings import EnvConfig
from mapo_lightning.envs.wrappers import PixelEnv, Simulator
from mapo_lightning.stopping import leave_to_parent
from mapo_lightning.types import ConfigError
from mapo_lightning.waiting import waiting


def make_env(cfg: EnvConfig, seed: int) -> PixelEnv:
    """Build one environment.

    Args:
        cfg: The task and its camera.
        seed: Seed of the first reset; the same seed gives the same sequence of episodes.

    Returns:
        A Gymnasium environment. Observations: ``image`` (size, size, 3) uint8 and, if requested,
        ``label_image`` (label_size, label_size, 3) uint8. Actions: Box [-1, 1], (A,), float32.
        Rewards are summed over the repeated action; ``info["success"]`` is 0.0 or 1.0 where
        the suite knows success.

    Raises:
        EnvironmentSetupError: The task or the camera does not exist, a package is missing, or
            nothing on this machine can render.
    """
    return PixelEnv(
        make_simulator(cfg),
        name=f"{cfg.kind}/{cfg.name}",
        size=cfg.size,
        label_size=cfg.label_size,
        action_repeat=cfg.frames_per_step,
        time_limit=cfg.time_limit,
        seed=seed,
    )


def _make_seeded(cfg: EnvConfig, seed: int, parent: int) -> SeededEpisodes:
    """Build an environment; one in a process of its own is ended by process ``parent`` alone."""
    # Gymnasium also builds one in the parent itself, to see its spaces.
    if os.getpid() != parent:
        leave_to_parent()
    return SeededEpisodes(make_env(cfg, seed), seed)


def probed_action_dim(cfg: EnvConfig) -> int:
    """Width of the action of an environment, which is built for that and closed again.

    A Gymnasium environment is other people's code: it has to take one step as well.

    Raises:
        EnvironmentSetupError: As `make_env`; or it cannot be reset, stepped or drawn.
    """
    env = make_env(cfg, seed=0)
    try:
        if cfg.kind == "gym":
            env.reset()
            env.step(np.zeros(env.action_space.shape, np.float32))
        return int(np.prod(env.action_space.shape))
    finally:
        env.close()


def make_vector_env(cfg: EnvConfig, seed: int, num_envs: int | None = None) -> VectorEnv:
    """Build several environments that act side by side.

    Each environment that draws with OpenGL gets a spawned process. Forked ones would hang at their
    first frame, with EGL and with OSMesa, if the parent has rendered before. With ``kind=gym``
    programs therefore need the usual ``if __name__ == "__main__"``.

    Args:
        cfg: The task and its camera.
        seed: Environment i is seeded from (seed, i).
        num_envs: Number of environments; None: ``cfg.num_envs``.

    Returns:
        A Gymnasium vector environment of `SeededEpisodes`, with autoreset in the step after the
        end (NEXT_STEP): that step ignores its action, has reward 0, and shows the first frame of
        the new episode.

    Raises:
        EnvironmentSetupError: As `make_env`.
    """
    count = cfg.num_envs if num_envs is None else num_envs
    if count < 1:
        raise ConfigError(f"num_envs must be at least 1, got {count}")
    makers: list[Callable[[], gym.Env[Any, Any]]] = [
        functools.partial(_make_seeded, cfg, env_seed(seed, index), os.getpid())
        for index in range(count)
    ]
    if count == 1 or not needs_gl(cfg):
        return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP)
    # A task that the program itself registers is known only in processes that import the program.
    start = nullcontext() if cfg.kind == "gym" else light_start()
    with start, waiting(f"the processes of {count} environments to start"):
        return AsyncVectorEnv(
            makers, shared_memory=True, context="spawn", autoreset_mode=AutoresetMode.NEXT_STEP
        )


@contextmanager
def light_start() -> Iterator[None]:
    """Keep processes that are spawned in this block from importing the main program.

    Python would have each import the main module with all its imports, which takes seconds.
    """
    main = sys.modules["__main__"]
    spec, file = main.__spec__, main.__dict__.pop("__file__", None)
    main.__spec__ = None
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


def env_seed(seed: int, index: int) -> int:
    """Seed of environment ``index``; (1, 0) and (0, 1) do not share their episodes."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


def needs_gl(cfg: EnvConfig) -> bool:
    """Whether environments of this configuration draw with OpenGL."""
    if cfg.kind == "gym":
        from mapo_lightning.envs.gymnasium_env import draws_with_mujoco

        return draws_with_mujoco(cfg.name)
    return cfg.kind in ("dmc", "metaworld")


def make_simulator(cfg: EnvConfig) -> Simulator:
    """Build the task in its own units, without what `PixelEnv` adds."""
    if not cfg.name:
        raise ConfigError(f"env.name must name a task of {cfg.kind}, got an empty string")
    if cfg.kind == "toy":
        from mapo_lightning.envs.toy import ToyDisc

        return ToyDisc(cfg.name)
    if cfg.kind == "dmc":
        from mapo_lightning.envs.dmc import DmcTask

        return DmcTask(cfg.name, cfg.camera, cfg.render_quality)
    if cfg.kind == "metaworld":
        from mapo_lightning.envs.metaworld import MetaWorldTask

        return MetaWorldTask(cfg.name, cfg.camera, cfg.render_quality)
    from mapo_lightning.envs.gymnasium_env import GymnasiumTask

    return GymnasiumTask(cfg.name, cfg.render_quality, bounded=cfg.time_limit is not None)
