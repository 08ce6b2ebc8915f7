"""Films one scene: with smooth random motion, or with Meta-World's scripted experts."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from mapo_lightning.envs.actions import action_width, to_space
from mapo_lightning.envs.factory import make_simulator
from mapo_lightning.envs.settings import EnvConfig
from mapo_lightning.envs.wrappers import Simulator
from mapo_lightning.types import Frames

T = TypeVar("T")

CAMERAS: dict[str, tuple[int | str | None, ...]] = {
    "metaworld/": ("corner", "corner3", "topview", "corner2"),
    "dmc/walker_": (0, 0, 1),
    "dmc/hopper_": (0, 0, 1),
    "dmc/quadruped_": (2, 1),
    "dmc/finger_": (0, 1),
    "dmc/ball_in_cup_": (0, 1),
    "dmc/swimmer_": (0, 1),
}
"""Cameras that the clips of a scene take in turn, by the beginning of ``kind/name``."""

HERTZ = {"toy/": (0.1, 0.35), "dmc/cartpole_": (0.6, 1.2), "": (0.25, 1.2)}
"""Slowest and fastest control, Hz, by the beginning of ``kind/name``.

The toy and the cart-pole have ranges of their own, with which nothing leaves the picture."""


NOISE = 0.15
"""How far smooth random motion moves the actions of an expert away, of actions in [-1, 1]."""


class FilmedClip(NamedTuple):
    """A video with the paths of its moving parts."""

    frames: Frames
    """(T, H, W, 3) uint8."""
    paths: dict[str, list[list[int]]]
    """Where each part that visibly moves is seen in every frame: name -> T x [right, down], px."""
    success: int | None = None
    """First frame in which the task is solved; None if it never is, or the suite does not say."""


class SmoothActions:
    """Random controls that change smoothly: a sum of three sines per control.

    They move things far; white noise averages out before heavy limbs have moved.

    Args:
        dim: Number A of controls.
        rng: Draws frequencies, phases and weights.
        hertz: Slowest and fastest sine, in Hz.
    """

    def __init__(self, dim: int, rng: np.random.Generator, hertz: tuple[float, float]) -> None:
        self._turns = 2.0 * np.pi * rng.uniform(*hertz, (dim, 3))
        # A force that starts at its peak gives a velocity of mean zero: nothing drifts away.
        self._phases = np.pi * (rng.integers(2, size=(dim, 3)) + 0.5)
        self._weights = rng.uniform(0.3, 1.0, (dim, 3))

    def at(self, seconds: float) -> NDArray[np.float64]:
        """Controls (A,) in [-1, 1] at a time."""
        waves = self._weights * np.sin(self._turns * seconds + self._phases)
        controls: NDArray[np.float64] = waves.sum(axis=1).clip(-1.0, 1.0)
        return controls


def film(
    scene: EnvConfig,
    clip: int,
    frames: int,
    size: int,
    fps: int,
    seed: int,
    scenery: int = 0,
    noise: float = NOISE,
) -> FilmedClip:
    """Film one clip of a scene; the same arguments give the same pixels.

    Args:
        scene: Task; where ``camera`` is null, the clips take the task's cameras in turn; where
            ``action_repeat`` is null, time runs about as fast as in the simulator.
        clip: Number of the clip; clips differ in start, motion, camera and colours.
        frames: Length T.
        size: Height and width, in pixels.
        fps: Frames per second.
        seed: Of the whole set of videos.
        scenery: Colourings of the scene that its clips take in turn, the simulator's own first; 0:
            every clip has its own.
        noise: See `NOISE`.
    """
    label = f"{scene.kind}/{scene.name}"
    shots, seen, success = [], [], None
    simulator = make_simulator(_with_camera(scene, clip))
    try:
        tint = getattr(simulator, "tint", None)
        colouring = clip % scenery if scenery else clip
        if tint is not None and colouring:  # 0 is what an agent sees
            tint(np.random.default_rng([seed, zlib.crc32(label.encode()), colouring, 1]))
        for frame, solved in enumerate(_perform(simulator, scene, clip, frames, fps, seed, noise)):
            success = frame if solved and success is None else success
            shots.append(simulator.frame(size))
            seen.append(_landmarks(simulator, size))
    finally:
        simulator.close()
    return FilmedClip(np.stack(shots), _paths(seen, least=size / 50), success)


def rehearse(
    scene: EnvConfig, clip: int, frames: int, fps: int, seed: int, noise: float = NOISE
) -> int | None:
    """Play the clip that `film` films, without drawing it.

    Returns:
        First frame in which the task is solved; None if it never is.
    """
    simulator = make_simulator(_with_camera(scene, clip))
    try:
        played = _perform(simulator, scene, clip, frames, fps, seed, noise)
        return next((frame for frame, solved in enumerate(played) if solved), None)
    finally:
        simulator.close()


def _perform(
    simulator: Simulator,
    scene: EnvConfig,
    clip: int,
    frames: int,
    fps: int,
    seed: int,
    noise: float,
) -> Iterator[bool]:
    """Play a clip; yields at every frame whether the task has been solved."""
    name = zlib.crc32(f"{scene.kind}/{scene.name}".encode())
    rng = np.random.default_rng([seed, name, clip])
    simulator.reset(int(rng.integers(2**31)))
    actor = _Actor(simulator, scene, rng, noise)
    repeat = scene.action_repeat or max(1, round(simulator.frame_rate / fps))
    yield False
    for _ in range(frames - 1):
        for _ in range(repeat):
            actor.advance()
        yield actor.since > 0


class _Actor:
    """Moves a simulator frame by frame, across the ends of episodes too."""

    def __init__(
        self, simulator: Simulator, scene: EnvConfig, rng: np.random.Generator, noise: float
    ) -> None:
        self._simulator, self._time, self._done = simulator, 0.0, False
        self._noise, self.since = noise, 0  # steps in which the task was solved
        dim = action_width(simulator.action_space)
        self._smooth = SmoothActions(dim, rng, _choice(HERTZ, scene))
        # The toy's clock stops nothing but the agent's episode: no cut is needed.
        self._timeless = scene.kind == "toy"
        self._expert: Any = None
        if scene.kind == "metaworld":
            from mapo_lightning.envs.metaworld import scripted_expert

            self._expert = scripted_expert(scene.name)

    def advance(self) -> None:
        if self._done:  # a cut; rare, since clips are shorter than episodes
            self._simulator.reset(None)
            self._done = False
        self._time += 1.0 / self._simulator.frame_rate
        outcome = self._simulator.step(self._action())
        self._done = outcome.terminated or (outcome.truncated and not self._timeless)
        self.since += bool(outcome.success)

    def _action(self) -> Any:
        smooth = self._smooth.at(self._time)
        if self._expert is not None and self.since < 20:
            # An expert stands still after its success; from then on the arm moves at random.
            expert = self._expert.get_action(self._simulator.state)  # type: ignore[attr-defined]
            return np.clip(expert + self._noise * smooth, -1.0, 1.0).astype(np.float32)
        return to_space(self._simulator.action_space, smooth)


def _with_camera(scene: EnvConfig, clip: int) -> EnvConfig:
    if scene.camera is not None:
        return scene
    cameras = _choice({**CAMERAS, "": (None,)}, scene)
    return replace(scene, camera=cameras[clip % len(cameras)])


def _choice(table: Mapping[str, T], scene: EnvConfig) -> T:
    label = f"{scene.kind}/{scene.name}"
    return next(value for start, value in table.items() if label.startswith(start))


def _landmarks(simulator: Simulator, size: int) -> dict[str, tuple[float, float]]:
    find = getattr(simulator, "landmarks", None)
    return {} if find is None else find(size)


def _paths(seen: list[dict[str, tuple[float, float]]], least: float) -> dict[str, list[list[int]]]:
    """Paths of the parts that are seen in every frame and move at least ``least`` pixels."""
    always = set.intersection(*(set(moment) for moment in seen))
    paths = {name: np.array([moment[name] for moment in seen]) for name in sorted(always)}
    return {
        name: np.rint(path).astype(int).tolist()
        for name, path in paths.items()
        if np.ptp(path, axis=0).max() >= least
    }
