"""A disc, a pad and a patterned floor: learnable in minutes, known optimum, numpy alone.

The agent sets the disc's velocity and is rewarded, every frame, for being near the pad. The
floor's pattern and colours change with the episode and carry no information: they are the context
that the world model should separate from what moves.

Lengths are shares of the image side; x points right, y down.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from mapo_lightning.envs.snapshots import Freezer, Snapshot, attributes, set_attributes
from mapo_lightning.envs.wrappers import Outcome
from mapo_lightning.types import EnvironmentSetupError, Frames

Point = NDArray[np.float64]

DISC_RADIUS, PAD_RADIUS = 0.12, 0.16
SPEED = 0.06
"""Distance covered in one frame by an action of length 1."""
START_DISTANCE = 0.36
"""Distance from disc to pad at the start of every episode; all have the same optimum."""
FRAMES = 50
"""Frames of an episode."""
_REACH = 0.55  # distance at which the reward has fallen to 0

DISC_COLOUR, PAD_COLOUR = (240.0, 60.0, 50.0), (250.0, 250.0, 250.0)


def reward_at(distance: float) -> float:
    """Reward of one frame, in [0, 1]: 1 on the pad's middle, falling to 0 at 0.55 image sides."""
    return max(0.0, 1.0 - distance / _REACH) ** 2


OPTIMAL_RETURN = sum(
    reward_at(max(0.0, START_DISTANCE - SPEED * frame)) for frame in range(1, FRAMES + 1)
)
"""Return of the straight way to the pad, the same in every episode."""


class ToyDisc:
    """Push the disc onto the pad; 50 frames, reward in [0, 1] per frame, two actions (x, y).

    Actions longer than 1 are scaled to length 1, so the straight way is the fastest in any
    direction. Success means that the disc's middle lies on the pad.

    Args:
        name: ``disc``: the pad is in the middle; ``disc_anywhere``: elsewhere in each episode.

    Raises:
        EnvironmentSetupError: No such task.
    """

    frame_rate = 10.0
    frame_limit: int | None = FRAMES
    optimal_return = OPTIMAL_RETURN

    def __init__(self, name: str = "disc") -> None:
        if name not in ("disc", "disc_anywhere"):
            raise EnvironmentSetupError(f"toy has no task '{name}'; it has: disc, disc_anywhere")
        self.name, self._pad_moves = name, name == "disc_anywhere"
        self.action_space: spaces.Space[Any] = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self._rng = np.random.default_rng()
        self.disc: Point = np.array([0.5, 0.5])
        """Middle of the disc, (2,) as (x, y)."""
        self.pad: Point = np.array([0.5, 0.5])
        """Middle of the pad, (2,) as (x, y)."""
        self._floor, self._frames = Floor(self._rng), 0

    def reset(self, seed: int | None) -> None:
        """Start an episode; a seed restarts the random stream, None continues it."""
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        self._floor, self._frames = Floor(self._rng), 0
        while True:
            if self._pad_moves:
                self.pad = self._rng.uniform(PAD_RADIUS, 1.0 - PAD_RADIUS, 2)
            angle = self._rng.uniform(0.0, 2.0 * np.pi)
            self.disc = self.pad + START_DISTANCE * np.array([np.cos(angle), np.sin(angle)])
            if (self.disc == _inside(self.disc)).all():
                return

    def step(self, action: NDArray[np.floating]) -> Outcome:
        """Advance one frame; ``action`` (2,) is the velocity in units of `SPEED`."""
        velocity = np.asarray(action, np.float64)
        velocity = velocity / max(1.0, float(np.hypot(*velocity)))
        self.disc = _inside(self.disc + SPEED * velocity)
        self._frames += 1
        distance = float(np.hypot(*(self.pad - self.disc)))
        return Outcome(
            reward_at(distance),
            truncated=self._frames >= FRAMES,
            success=float(distance <= PAD_RADIUS),
        )

    def optimal_action(self) -> NDArray[np.float32]:
        """The action (2,) in [-1, 1] that earns `optimal_return` when always followed."""
        way = (self.pad - self.disc) / SPEED
        return (way / max(1.0, float(np.hypot(*way)))).astype(np.float32)

    def frame(self, size: int) -> Frames:
        """Draw the current state, (size, size, 3) uint8; the same picture at every size."""
        image = self._floor.draw(size).copy()
        ring = _cover(self.pad, PAD_RADIUS, size) - _cover(self.pad, 0.75 * PAD_RADIUS, size)
        for cover, colour in (
            (ring, PAD_COLOUR),
            (_cover(self.disc, DISC_RADIUS, size), DISC_COLOUR),
        ):
            image += cover[..., None] * (np.array(colour, np.float32) - image)
        return np.clip(np.rint(image), 0, 255).astype(np.uint8)

    def landmarks(self, size: int) -> dict[str, tuple[float, float]]:
        """Where disc and pad are seen: name -> (right, down), in pixels."""
        return {
            name: (float(point[0] * size), float(point[1] * size))
            for name, point in (("disc", self.disc), ("pad", self.pad))
        }

    def save(self) -> Snapshot:
        """The whole state; see `Restorable`."""
        return self._freezer.freeze(attributes(self))

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a saved state; see `Restorable`."""
        set_attributes(self, self._freezer.thaw(snapshot))

    @property
    def _freezer(self) -> Freezer:
        return Freezer(f"toy/{self.name}", {})

    def close(self) -> None:
        """Nothing to free."""


class Floor:
    """A soft random pattern of two similar dark colours, of one of four families, at any size."""

    def __init__(self, rng: np.random.Generator) -> None:
        base = rng.uniform(20.0, 110.0, 3)
        self._colours = np.stack([base, base + rng.uniform(-30.0, 30.0, 3)]).astype(np.float32)
        # The disc is red: a red floor would hide it.
        self._colours[:, 0] *= 0.6
        self._family = int(rng.integers(4))
        self._wave = rng.uniform(1.0, 3.0, 3) * rng.choice([-1.0, 1.0], 3)
        self._phase = rng.uniform(0.0, 2.0 * np.pi, 3)
        self._pictures: dict[int, NDArray[np.float32]] = {}

    def draw(self, size: int) -> NDArray[np.float32]:
        """The floor alone, (size, size, 3) in [0, 255]; kept, so do not write into it."""
        if size not in self._pictures:
            x, y = _grid(size)
            p, q, r = 2.0 * np.pi * self._wave
            a, b, c = self._phase
            pattern = (
                np.sin(p * x + q * y + a),  # stripes
                np.sin(p * x + a) * np.sin(q * y + b),  # checks
                np.sin(abs(r) * np.hypot(x - 0.5 + 0.3 * np.sin(a), y - 0.5) + c),  # rings
                (np.sin(p * x + a + np.sin(q * y)) + np.sin(r * y + b + np.sin(q * x))) / 2.0,
            )[self._family]
            share = (0.5 + 0.5 * pattern)[..., None].astype(np.float32)
            self._pictures[size] = self._colours[0] + share * (self._colours[1] - self._colours[0])
        return self._pictures[size]


def _inside(point: Point) -> Point:
    return np.clip(point, DISC_RADIUS, 1.0 - DISC_RADIUS)


@functools.lru_cache(maxsize=8)
def _grid(size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Pixel middles x (1, size) and y (size, 1)."""
    middle = ((np.arange(size) + 0.5) / size).astype(np.float32)
    return middle[None, :], middle[:, None]


def _cover(centre: Point, radius: float, size: int) -> NDArray[np.float32]:
    """How much of each pixel a disc covers, (size, size) in [0, 1]; soft at its edge."""
    x, y = _grid(size)
    distance = np.hypot(x - np.float32(centre[0]), y - np.float32(centre[1]))
    cover: NDArray[np.float32] = (np.float32(radius) - distance) * size + 0.5
    return cover.clip(0.0, 1.0)
