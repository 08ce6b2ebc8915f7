"""Tasks of the DeepMind Control Suite; the only file that imports ``dm_control``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from mapo_lightning.envs.gl import OffscreenCamera, moving_parts, prepare_gl, tint_scenery
from mapo_lightning.envs.mujoco_state import memory_of, restore_mujoco, save_mujoco
from mapo_lightning.envs.snapshots import Freezer, Snapshot, attributes, set_attributes
from mapo_lightning.envs.wrappers import Outcome, no_such_task
from mapo_lightning.types import Frames

# No public names for them.
_CLOCK = ("_step_count", "_reset_next_step")
_SHARED = ("_random",)  # this object's own random stream

log = logging.getLogger(__name__)


class DmcTask:
    """One task, its own reward in [0, 1] per frame and its own clock of 1000 frames.

    Args:
        name: ``domain_task``, for example ``walker_run`` or ``ball_in_cup_catch``.
        camera: Id or name; None: 0, but 2 for the quadruped (facts 6.1).
        quality: ``full`` or ``fast``.

    Raises:
        EnvironmentSetupError: No such task or camera, or no renderer.
    """

    def __init__(self, name: str, camera: int | str | None = None, quality: str = "fast") -> None:
        prepare_gl()
        from dm_control import suite

        # The suite keeps this object, so seeding it seeds every later episode. A few tasks (LQR)
        # draw their robot from it before the first one: always the same.
        self.name, self._random = name, np.random.RandomState(0)
        domain, task = _split(name, suite.ALL_TASKS)
        with _notes_of_the_suite():
            self._env = suite.load(domain, task, task_kwargs={"random": self._random})
        self.physics = self._env.physics
        if camera is None:
            camera = 2 if domain == "quadruped" else 0
        self._camera = OffscreenCamera(self.physics.model.ptr, camera, quality)
        spec = self._env.action_spec()
        low, high = (
            np.broadcast_to(bound, spec.shape).astype(np.float64)
            for bound in (spec.minimum, spec.maximum)
        )
        self.action_space: spaces.Space[Any] = spaces.Box(low, high, dtype=np.float64)
        self.frame_rate = 1.0 / self._env.control_timestep()
        steps = self._env._step_limit  # no public name for it; infinite in the LQR tasks
        self.frame_limit = int(steps) if np.isfinite(steps) else None

    def reset(self, seed: int | None) -> None:
        """Start an episode; a seed restarts the random stream, None continues it."""
        if seed is not None:
            self._random.seed(np.random.SeedSequence(seed).generate_state(4))
        self._env.reset()
        self._camera.renew_terrain()

    def step(self, action: NDArray[np.float64]) -> Outcome:
        """Advance one control frame; ``action`` (A,) in the task's own bounds."""
        now = self._env.step(action)
        ended = bool(now.last())
        # Discount 0 says that the task ended, 1 that the clock did.
        terminated = ended and now.discount == 0.0
        return Outcome(float(now.reward or 0.0), terminated, ended and not terminated)

    def frame(self, size: int) -> Frames:
        """Draw the current state, (size, size, 3) uint8."""
        return self._camera.frame(self.physics.data.ptr, size)

    def save(self) -> Snapshot:
        """The whole state; see `Restorable`."""
        return self._freezer.freeze(
            {
                "mujoco": save_mujoco(self.physics.model.ptr, self.physics.data.ptr),
                "random": self._random.get_state(),
                "clock": {name: getattr(self._env, name) for name in _CLOCK},
                "task": attributes(self._env.task, _SHARED),
            }
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a saved state; see `Restorable`."""
        saved = self._freezer.thaw(snapshot)
        restore_mujoco(self.physics.model.ptr, self.physics.data.ptr, saved["mujoco"])
        self._random.set_state(saved["random"])
        for name, value in saved["clock"].items():
            setattr(self._env, name, value)
        set_attributes(self._env.task, saved["task"], _SHARED)
        self._camera.renew_terrain()

    @property
    def _freezer(self) -> Freezer:
        memory = memory_of(self.physics.model.ptr, self.physics.data.ptr)
        live = {"physics": self.physics, "task": self._env.task}
        return Freezer(f"dmc/{self.name}", live, memory)

    def close(self) -> None:
        """Free the OpenGL contexts and the simulation."""
        self._camera.close()
        self._env.close()

    def landmarks(self, size: int) -> dict[str, tuple[float, float]]:
        """Where the middles of all bodies are seen: name -> (right, down), in pixels."""
        return moving_parts(self.physics.model.ptr, self.physics.data.ptr, self._camera, size)

    def tint(self, rng: np.random.Generator) -> None:
        """Give the scenery another hue; call before the first frame."""
        tint_scenery(self.physics.model.ptr, rng)


@contextmanager
def _notes_of_the_suite() -> Iterator[None]:
    """Pass on as debug messages which attributes of the suite's own files MuJoCo calls outdated.

    It does so once for every environment, of the cheetah for one; there is nothing that a user
    could do about it. Everything else that it says passes.
    """
    absl = logging.getLogger("absl")

    def lowered(record: logging.LogRecord) -> bool:
        outdated = "attribute" in record.getMessage() and "is deprecated" in record.getMessage()
        if outdated:
            log.debug("%s", record.getMessage())
        return not outdated

    absl.addFilter(lowered)
    try:
        yield
    finally:
        absl.removeFilter(lowered)


def _split(name: str, known: tuple[tuple[str, str], ...]) -> tuple[str, str]:
    """``ball_in_cup_catch`` -> ("ball_in_cup", "catch"): both halves may hold underscores."""
    for domain, task in known:
        if name == f"{domain}_{task}":
            return domain, task
    raise no_such_task("dm_control", name, (f"{domain}_{task}" for domain, task in known))
