"""Any registered Gymnasium environment that renders as ``rgb_array``."""

from __future__ import annotations

import functools
from typing import Any

import gymnasium as gym
import numpy as np

from mapo_lightning.envs.gl import prepare_gl
from mapo_lightning.envs.wrappers import Outcome, resize_area
from mapo_lightning.types import EnvironmentSetupError, Frames


class GymnasiumTask:
    """A registered task; its rendered image is scaled to a square, its observation is not used.

    Args:
        name: Registered id, for example ``InvertedPendulum-v5`` or ``package.module:Task-v0``.
        quality: ``full`` or ``fast``; only tasks drawn by MuJoCo differ.
        bounded: Whether the caller limits the length of episodes if the task does not.

    Raises:
        EnvironmentSetupError: The id is not registered, needs a missing package, or cannot
            render as ``rgb_array``; or nothing limits its episodes.
    """

    def __init__(self, name: str, quality: str = "fast", *, bounded: bool = False) -> None:
        if draws_with_mujoco(name):
            prepare_gl()
        try:
            self._env = gym.make(name, render_mode="rgb_array")
        except (gym.error.Error, ImportError, TypeError) as error:
            raise EnvironmentSetupError(
                f"cannot build the Gymnasium environment '{name}': {error}. Install the extra it "
                "names, or import the package that registers it as 'package:Id-v0'."
            ) from error
        self.action_space: Any = self._env.action_space  # PixelEnv refuses what it cannot use
        self.frame_rate = float(self._env.metadata.get("render_fps") or 30)
        self.frame_limit = self._env.spec.max_episode_steps if self._env.spec else None
        if self.frame_limit is None and not bounded:
            self._env.close()
            raise EnvironmentSetupError(
                f"'{name}' is registered without a limit, so an episode might never end and never "
                "reach the replay: set env.time_limit (agent steps)"
            )
        self._viewer: Any = self._aim(quality) if draws_with_mujoco(name) else None

    def _aim(self, quality: str) -> Any:
        """Fix where a MuJoCo task is seen from.

        Gymnasium aims its free camera at the pose of the first frame drawn. That frame is drawn
        here, from a fixed seed, so that the view is the same in every environment.
        """
        task: Any = self._env.unwrapped
        if quality == "fast":
            task.model.vis.quality.shadowsize, task.model.vis.quality.offsamples = 256, 0
        self._env.reset(seed=0)
        self._env.render()
        return task.mujoco_renderer.viewer

    def reset(self, seed: int | None) -> None:
        """Start an episode; a seed restarts the random stream, None continues it."""
        self._env.reset(seed=seed)

    def step(self, action: Any) -> Outcome:
        """Advance one frame with an action of the environment's own space."""
        _, reward, terminated, truncated, info = self._env.step(action)
        success = info.get("success", info.get("is_success"))
        return Outcome(
            float(reward),
            bool(terminated),
            bool(truncated),
            None if success is None else float(success),
        )

    def frame(self, size: int) -> Frames:
        """Draw the current state, scaled to (size, size, 3) uint8 by averaging areas."""
        if self._viewer is not None:
            # Gymnasium draws into the current OpenGL context, which may be another task's.
            self._viewer.make_context_current()
        image = self._env.render()
        if not isinstance(image, np.ndarray) or image.ndim != 3 or image.dtype != np.uint8:
            raise EnvironmentSetupError(
                f"'{self._env}' rendered {type(image).__name__}, not an (H, W, 3) uint8 array: "
                "its rgb_array mode does not follow Gymnasium's interface"
            )
        return resize_area(image[..., :3], size)

    def close(self) -> None:
        """Close the environment."""
        self._env.close()


@functools.cache
def draws_with_mujoco(name: str) -> bool:
    """Whether a registered id is one of Gymnasium's MuJoCo environments."""
    try:
        entry = gym.spec(name).entry_point
    except (gym.error.Error, ImportError):
        return False  # GymnasiumTask says what is wrong with it
    return isinstance(entry, str) and "mujoco" in entry
