"""Any registered Gymnasium environment that renders as ``rgb_array``."""

from __future__ import annotations

import functools
from typing import Any

import gymnasium as gym
import numpy as np

from mapo_lightning.envs.actions import action_width, to_space
from mapo_lightning.envs.gl import prepare_gl
from mapo_lightning.envs.mujoco_state import memory_of, restore_mujoco, save_mujoco
from mapo_lightning.envs.snapshots import Freezer, Snapshot, attributes, set_attributes
from mapo_lightning.envs.wrappers import Outcome, described, resize_area
from mapo_lightning.types import EnvironmentSetupError, Frames

_STEP = (
    "step must return observation, reward, terminated, truncated and an info dict (the old Gym "
    "interface returned four values)"
)
_LIVE = ("model", "data", "mujoco_renderer")  # of Gymnasium's MuJoCo environments
_CONSTANT = ("spec", "_cached_spec", "env")  # may hold functions, which cannot be copied
_CAMERA = ("lookat", "distance", "azimuth", "elevation")
_TRIED = 12  # steps that prove that an environment can be restored
_INTERFACE = "; gymnasium.utils.env_checker.check_env(env) tests an environment for such faults"


class GymnasiumTask:
    """A registered task; its rendered image is scaled to a square, its observation is not used.

    Args:
        name: Registered id, for example ``InvertedPendulum-v5`` or ``package.module:Task-v0``.
        quality: ``full`` or ``fast``; only tasks drawn by MuJoCo differ.
        bounded: Whether the caller limits the length of episodes if the task does not.

    Raises:
        EnvironmentSetupError: The id is not registered, needs a missing package, cannot render as
            ``rgb_array``, or fails while it is built; or nothing limits its episodes.
    """

    def __init__(self, name: str, quality: str = "fast", *, bounded: bool = False) -> None:
        if draws_with_mujoco(name):
            prepare_gl()
        try:
            self._env = gym.make(name, render_mode="rgb_array")
            self.frame_rate = float(self._env.metadata.get("render_fps") or 30)
        except (gym.error.Error, ImportError) as error:
            words = " ".join(str(error).split())
            raise EnvironmentSetupError(
                f"cannot build the Gymnasium environment '{name}': {words}. Install the extra it "
                "names, or import the package that registers it as 'package:Id-v0'."
            ) from error
        except Exception as error:  # the constructor is other people's code
            raise EnvironmentSetupError(
                f"cannot build the Gymnasium environment '{name}', because its constructor fails: "
                f"{described(error)}. gymnasium.make('{name}', render_mode='rgb_array') must work."
            ) from error
        self.action_space: Any = self._env.action_space  # PixelEnv refuses what it cannot use
        self.frame_limit = self._env.spec.max_episode_steps if self._env.spec else None
        if self.frame_limit is None and not bounded:
            self._env.close()
            raise EnvironmentSetupError(
                f"'{name}' is registered without a limit, so an episode might never end and never "
                "reach the replay: set env.time_limit (agent steps)"
            )
        self._viewer: Any = self._aim(quality) if draws_with_mujoco(name) else None
        self.name, self._proven = name, False

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
        found: Any = self._env.reset(seed=seed)
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)):
            raise EnvironmentSetupError(
                "reset must return an observation and an info dict; this one returned "
                f"{_shape_of(found)}, as in the old Gym interface{_INTERFACE}"
            )

    def step(self, action: Any) -> Outcome:
        """Advance one frame with an action of the environment's own space."""
        try:
            found: Any = self._env.step(action)
        except ValueError as error:
            # Gymnasium's own wrappers take the result apart before it gets here.
            if "to unpack" not in str(error):
                raise
            raise EnvironmentSetupError(f"{_STEP}: {error}{_INTERFACE}") from error
        if not (isinstance(found, tuple) and len(found) == 5 and isinstance(found[4], dict)):
            raise EnvironmentSetupError(f"{_STEP}; it returned {_shape_of(found)}{_INTERFACE}")
        _, reward, terminated, truncated, info = found
        success = info.get("success", info.get("is_success"))
        return Outcome(
            _number(reward, "the reward"),
            bool(_number(terminated, "terminated")),
            bool(_number(truncated, "truncated")),
            None if success is None else _number(success, "info['success']"),
        )

    def frame(self, size: int) -> Frames:
        """Draw the current state, scaled to (size, size, 3) uint8 by averaging areas."""
        if self._viewer is not None:
            # Gymnasium draws into the current OpenGL context, which may be another task's.
            self._viewer.make_context_current()
        image: Any = self._env.render()
        sound = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size
        if not sound or image.shape[2:] != (3,):
            raise EnvironmentSetupError(
                f"render must return an (H, W, 3) uint8 array where render_mode is rgb_array; it "
                f"returned {_shape_of(image)}{_INTERFACE}"
            )
        return resize_area(image, size)

    def save(self) -> Snapshot:
        """The whole state; see `Restorable`.

        An environment may hide state where Python does not see it. So the first state saved is
        tried: the steps after it must go the same way twice.

        Raises:
            EnvironmentSetupError: Something cannot be copied, or the steps differ.
        """
        snapshot = self._freezer.freeze(self._state())
        if not self._proven:
            tries = []
            for _ in range(2):
                tries.append(self._tried())
                self.restore(snapshot)
            if tries[0] != tries[1]:
                kind = type(self._env.unwrapped)
                raise EnvironmentSetupError(
                    f"the state of '{self.name}' cannot be restored: its class {kind.__module__}."
                    f"{kind.__qualname__} goes another way after the same state, because it keeps "
                    "part of it outside its attributes or draws numbers that no seed determines"
                )
            self._proven = True
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a saved state; see `Restorable`."""
        saved = self._freezer.thaw(snapshot)
        for layer, found in zip(self._layers(), saved["layers"], strict=True):
            set_attributes(layer, found, {*_left_alone(layer), *saved["left"]})
        if self._viewer is not None:
            task: Any = self._env.unwrapped
            restore_mujoco(task.model, task.data, saved["mujoco"])
            for name, value in saved["camera"].items():
                setattr(self._viewer.cam, name, value)

    def _state(self) -> dict[str, Any]:
        left = set().union(*(_left_alone(layer) for layer in self._layers()))
        layers = [attributes(layer, left) for layer in self._layers()]
        found = {"layers": layers, "left": left}
        if self._viewer is None:
            return found
        task: Any = self._env.unwrapped
        camera = {name: np.array(getattr(self._viewer.cam, name))[()] for name in _CAMERA}
        mujoco = save_mujoco(task.model, task.data)
        return found | {"mujoco": mujoco, "camera": camera}

    def _layers(self) -> list[Any]:
        """The environment and what it is wrapped in, from the outside."""
        layers: list[Any] = [self._env]
        while isinstance(layers[-1], gym.Wrapper):
            layers.append(layers[-1].env)
        return layers

    @property
    def _freezer(self) -> Freezer:
        layers = self._layers()
        live = {f"layer {number}": layer for number, layer in enumerate(layers)}
        if self._viewer is None:
            return Freezer(f"gym/{self.name}", live)
        live |= {name: getattr(layers[-1], name) for name in _LIVE}
        memory = memory_of(layers[-1].model, layers[-1].data)
        return Freezer(f"gym/{self.name}", live, memory)

    def _tried(self) -> list[bytes]:
        """What follows the present state under fixed actions: pictures, rewards, ends."""
        rng, seen = np.random.default_rng(0), [self.frame(64).tobytes()]
        width = action_width(self.action_space)
        for _ in range(_TRIED):
            outcome = self.step(to_space(self.action_space, rng.uniform(-1.0, 1.0, width)))
            seen += [repr(outcome).encode(), self.frame(64).tobytes()]
            if outcome.terminated or outcome.truncated:
                break
        return seen

    def close(self) -> None:
        """Close the environment."""
        if self._viewer is not None:
            # Gymnasium leaves this to Python, which may free it while another task's context is
            # current, and so delete the buffers that bear the same numbers there.
            self._viewer.make_context_current()
            self._viewer.con.free()
            self._viewer = None
        self._env.close()


def _left_alone(layer: Any) -> set[str]:
    """Names of attributes that are no state: constants, what is alive, and surfaces to draw on."""
    drawn_on = (n for n, x in vars(layer).items() if type(x).__module__.startswith("pygame"))
    return {*_CONSTANT, *_LIVE, *drawn_on}


@functools.cache
def draws_with_mujoco(name: str) -> bool:
    """Whether a registered id is one of Gymnasium's MuJoCo environments."""
    try:
        entry = gym.spec(name).entry_point
    except Exception:  # 'package:Id' imports that package; GymnasiumTask says what is wrong
        return False
    return isinstance(entry, str) and "mujoco" in entry


def _number(value: Any, name: str) -> float:
    """A finite number or bool, or an array of one; ``name`` says in a message what it is."""
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "biuf":
        raise EnvironmentSetupError(f"{name} must be one number, got {_shape_of(value)}")
    number = float(array.item())
    if not np.isfinite(number):
        raise EnvironmentSetupError(f"{name} must be a finite number, got {number}")
    return number


def _shape_of(value: Any) -> str:
    """What a value is, for messages."""
    if isinstance(value, np.ndarray):
        return f"an array {value.shape} of {value.dtype}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{value!r:.60}" if value is None or np.isscalar(value) else type(value).__name__
