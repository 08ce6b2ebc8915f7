"""Meta-World's manipulation tasks; the only file that imports its environments."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from mapo_lightning.envs.gl import OffscreenCamera, moving_parts, prepare_gl, tint_scenery
from mapo_lightning.envs.mujoco_state import memory_of, restore_mujoco, save_mujoco
from mapo_lightning.envs.snapshots import Freezer, Snapshot, attributes, set_attributes
from mapo_lightning.envs.wrappers import Outcome, no_such_task
from mapo_lightning.types import EnvironmentSetupError, Frames

_LIVE = ("model", "data", "mujoco_renderer")


class MetaWorldTask:
    """One task with a fresh goal in every episode, reward version 2, 500 frames.

    Success does not end an episode; the score of an episode is its largest success.

    Args:
        name: ``door-open``; the version suffix ``-v3`` may be left out.
        camera: Id or name; None: ``corner``, the published one (facts 6.1).
        quality: ``full`` or ``fast``.

    Raises:
        EnvironmentSetupError: No such task or camera, or no renderer.
    """

    def __init__(self, name: str, camera: int | str | None = None, quality: str = "fast") -> None:
        prepare_gl()
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS as TASKS

        self.name = name.removesuffix("-v3")
        if f"{self.name}-v3" not in TASKS:
            raise no_such_task("metaworld", name, (key.removesuffix("-v3") for key in TASKS))
        self._env: Any = TASKS[f"{self.name}-v3"](reward_function_version="v2")
        # Without these three the goal is frozen, or drawn from numpy's global random state.
        self._env._set_task_called = True
        self._env._freeze_rand_vec = False
        self._env.seeded_rand_vec = True
        self._camera = OffscreenCamera(
            self._env.model, "corner" if camera is None else camera, quality
        )
        self.action_space: spaces.Space[Any] = spaces.Box(-1.0, 1.0, (4,), np.float32)
        self.frame_rate = 1.0 / float(self._env.dt)
        self.frame_limit: int | None = int(self._env.max_path_length)
        self.state: NDArray[np.float64] = np.zeros(39)
        """State that the scripted experts act on, (39,), the goal included; not shown to the
        agent."""

    def reset(self, seed: int | None) -> None:
        """Start an episode with a new goal; a seed restarts the random stream."""
        if seed is not None:
            self._env.seed(seed)
        self.state = self._with_goal(self._env.reset()[0])

    def step(self, action: NDArray[np.float32]) -> Outcome:
        """Advance one control frame; ``action`` (4,): hand dx, dy, dz and grip, in [-1, 1]."""
        state, reward, _, truncated, info = self._env.step(action)
        self.state = self._with_goal(state)
        return Outcome(float(reward), False, bool(truncated), float(info["success"]))

    def frame(self, size: int) -> Frames:
        """Draw the current state, upright, (size, size, 3) uint8."""
        return self._camera.frame(self._env.data, size)

    def save(self) -> Snapshot:
        """The whole state; see `Restorable`."""
        return self._freezer.freeze(
            {
                "mujoco": save_mujoco(self._env.model, self._env.data),
                "task": attributes(self._env, _LIVE),
                "state": self.state,
            }
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a saved state; see `Restorable`."""
        saved = self._freezer.thaw(snapshot)
        restore_mujoco(self._env.model, self._env.data, saved["mujoco"])
        set_attributes(self._env, saved["task"], _LIVE)
        self.state = saved["state"]

    @property
    def _freezer(self) -> Freezer:
        live = {name: getattr(self._env, name) for name in _LIVE}
        memory = memory_of(self._env.model, self._env.data)
        return Freezer(f"metaworld/{self.name}", {"environment": self._env, **live}, memory)

    def close(self) -> None:
        """Free the OpenGL contexts and the simulation."""
        self._camera.close()
        self._env.close()

    def _with_goal(self, state: NDArray[np.float64]) -> NDArray[np.float64]:
        """Meta-World hides the goal, the last three numbers, but many of its experts need it."""
        return np.concatenate([state[:-3], self._env._get_pos_goal()])

    @property
    def goal(self) -> NDArray[np.float64]:
        """Random vector of this episode: places of objects and goal, metres, layout per task."""
        return np.array(self._env._last_rand_vec)

    def landmarks(self, size: int) -> dict[str, tuple[float, float]]:
        """Where the middles of all bodies are seen: name -> (right, down), in pixels."""
        return moving_parts(self._env.model, self._env.data, self._camera, size)

    def tint(self, rng: np.random.Generator) -> None:
        """Give the scenery another hue; call before the first frame."""
        tint_scenery(self._env.model, rng)


def scripted_expert(name: str) -> Any:
    """Meta-World's own expert for a task; ``get_action(state)`` gives an action (4,).

    Raises:
        EnvironmentSetupError: The task has no expert.
    """
    prepare_gl()  # the import below brings MuJoCo along
    from metaworld.policies import ENV_POLICY_MAP

    expert: Any = ENV_POLICY_MAP.get(f"{name.removesuffix('-v3')}-v3")
    if expert is None:
        raise EnvironmentSetupError(f"metaworld has no scripted expert for '{name}'")
    return expert()
