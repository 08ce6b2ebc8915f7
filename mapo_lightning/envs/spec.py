"""One configuration and two factories for every environment.

A suite is one file with a `Simulator` (see `wrappers.py`) and one entry in `make_simulator` below.
Simulator packages are imported only when an environment of their suite is built, and nothing
that draws with OpenGL is touched for a suite that does not need it.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Optional, Union

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from mapo_lightning.envs.wrappers import PixelEnv, Simulator
from mapo_lightning.types import ConfigError

SUITE_REPEAT = {"toy": 1, "dmc": 2, "metaworld": 1, "gym": 1}
"""Action repeat of each suite in the published experiments (facts 6.1)."""

SUITE_FRAMES = {"toy": 50, "dmc": 1000, "metaworld": 500}
"""Environment frames after which the suite itself ends an episode."""


@dataclass
class EnvConfig:
    """Which task to act in, and how it is seen and clocked (O31, O32)."""

    kind: Literal["toy", "dmc", "metaworld", "gym"] = "toy"
    """Suite: ``toy`` needs numpy alone, ``dmc`` and ``metaworld`` are MuJoCo, ``gym`` is any
    registered Gymnasium id that renders as ``rgb_array``."""
    name: str = "disc"
    """Task: ``disc`` or ``disc_anywhere`` (toy), ``walker_run`` as domain_task (dmc),
    ``door-open`` (metaworld), a Gymnasium id (gym)."""
    camera: Optional[Union[int, str]] = None  # noqa: UP007, UP045 (read by OmegaConf)
    """Camera id or name; null: 0 (2 for quadruped) in dmc, ``corner`` in metaworld."""
    action_repeat: Optional[int] = None  # noqa: UP045
    """Environment frames per agent step; null: the suite's, 2 in dmc and 1 elsewhere."""
    size: int = 64
    """Height and width of the observed image, in pixels."""
    label_size: Optional[int] = None  # noqa: UP045
    """Height and width in pixels of a second image for the describer; null: none."""
    render_quality: Literal["full", "fast"] = "fast"
    """``full``: as the suite draws; ``fast``: no shadows, reflections and multisampling. Videos
    and observations of one experiment should use the same."""
    time_limit: Optional[int] = None  # noqa: UP045
    """Longest episode, in agent steps; null: the suite's (500 in dmc at repeat 2 and in
    metaworld, 50 in toy, the registered one in gym). May shorten a suite's, not lengthen it."""
    num_envs: int = 1
    """Environments that act side by side, each in its own process if it renders with OpenGL."""

    def __post_init__(self) -> None:
        if self.kind not in SUITE_REPEAT:
            raise ConfigError(f"kind must be one of {', '.join(SUITE_REPEAT)}, got '{self.kind}'")
        for field in ("action_repeat", "label_size", "time_limit", "size", "num_envs"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ConfigError(f"{field} must be at least 1, got {value}")
        if self.render_quality not in ("full", "fast"):
            raise ConfigError(f"render_quality must be full or fast, got '{self.render_quality}'")
        frames = SUITE_FRAMES.get(self.kind)
        if frames and self.time_limit and (self.time_limit - 1) * self.frames_per_step >= frames:
            raise ConfigError(
                f"time_limit must fit the {frames} frames of an episode of {self.kind}, "
                f"got {self.time_limit} agent steps of {self.frames_per_step} frames"
            )

    @property
    def frames_per_step(self) -> int:
        """Environment frames per agent step: ``action_repeat``, or what the suite uses."""
        return self.action_repeat or SUITE_REPEAT[self.kind]

    @property
    def fps(self) -> int:
        """Frames per second of an episode's video, one frame per agent step."""
        return max(5, 50 // self.frames_per_step)


def make_env(cfg: EnvConfig, seed: int) -> PixelEnv:
    """Build one environment.

    Args:
        cfg: Task and how it is seen.
        seed: Seed of the first reset; the same seed gives the same sequence of episodes.

    Returns:
        A Gymnasium environment. Observations: ``image`` (size, size, 3) uint8 and, if asked for,
        ``label_image`` (label_size, label_size, 3) uint8. Actions: Box [-1, 1], (A,), float32.
        Rewards are summed over the repeated action; ``info["success"]`` is 0.0 or 1.0 where
        the suite knows success.

    Raises:
        EnvironmentSetupError: The task or the camera does not exist, a package is missing, or
            nothing on this machine can render.
    """
    return PixelEnv(
        make_simulator(cfg),
        size=cfg.size,
        label_size=cfg.label_size,
        action_repeat=cfg.frames_per_step,
        time_limit=cfg.time_limit,
        seed=seed,
    )


def make_vector_env(cfg: EnvConfig, seed: int, num_envs: int | None = None) -> VectorEnv:
    """Build several environments that act side by side.

    Suites that draw with OpenGL get one spawned process each. Forked ones would hang at their
    first frame, with EGL and with OSMesa, if the parent has rendered before. With ``kind=gym``
    programs therefore need the usual ``if __name__ == "__main__"``.

    Args:
        cfg: Task and how it is seen.
        seed: Environment i is seeded from (seed, i).
        num_envs: Number of environments; None: ``cfg.num_envs``.

    Returns:
        A Gymnasium vector environment with autoreset in the step after the end (NEXT_STEP):
        that step ignores its action, has reward 0, and shows the first frame of the new episode.

    Raises:
        EnvironmentSetupError: As `make_env`.
    """
    count = cfg.num_envs if num_envs is None else num_envs
    if count < 1:
        raise ConfigError(f"num_envs must be at least 1, got {count}")
    makers: list[Callable[[], gym.Env[Any, Any]]] = [
        functools.partial(make_env, cfg, env_seed(seed, index)) for index in range(count)
    ]
    if count == 1 or not needs_gl(cfg):
        return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP)
    # A task registered by the program itself is known only where the program is imported.
    with nullcontext() if cfg.kind == "gym" else light_start():
        return AsyncVectorEnv(
            makers, shared_memory=True, context="spawn", autoreset_mode=AutoresetMode.NEXT_STEP
        )


@contextmanager
def light_start() -> Iterator[None]:
    """Processes that are spawned meanwhile do not import the program that spawns them.

    Python has them import its main module, with all that it imports: seconds each, for nothing.
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
    """Seed of environment ``index``: (1, 0) and (0, 1) must not share their episodes."""
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
