"""Motion of a region of the picture: fits it to the flow of its points, and puts it into words."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mapo_lightning.semantics.phrase import Phrase
from mapo_lightning.semantics.vocabulary import compass_word

_COLOURS = {0: "red", 20: "orange", 33: "yellow", 45: "green", 85: "cyan", 100: "blue"}
_COLOURS |= {130: "purple", 150: "pink", 172: "red"}  # first hue of each, of 180


class Similarity(NamedTuple):
    """Motion of a region of the picture: shift, growth and turn about its centre."""

    shift: NDArray[np.float64]  # (2,) pixels of the working size, x right and y down
    growth: float  # 0.1: a tenth larger
    turn: float  # radians, positive clockwise on the screen
    centre: NDArray[np.float64]  # (2,) pixels

    def at(self, points_N2: NDArray[np.float64]) -> NDArray[np.float64]:
        """Displacement (N, 2) that this motion gives to points (N, 2)."""
        away = points_N2 - self.centre
        across = np.stack([-away[:, 1], away[:, 0]], axis=1)
        return self.shift + self.growth * away + self.turn * across


def fit(
    points_N2: NDArray[np.float64], flow_N2: NDArray[np.float64]
) -> tuple[Similarity, NDArray[np.bool_]]:
    """Fit the motion that most points share.

    Args:
        points_N2: Places (x, y) before the motion, (N, 2), pixels.
        flow_N2: Displacement of each, (N, 2), pixels.

    Returns:
        The motion, and which points agree with it, (N,).
    """
    # As complex numbers x + iy, in which growth and turn are one factor.
    place_N, flow_N = _complex(points_N2), _complex(flow_N2)
    centre = place_N.mean()
    away_N = place_N - centre
    moved_N = np.full_like(flow_N, complex(np.median(flow_N.real), np.median(flow_N.imag)))
    for _ in range(6):
        error_N = np.abs(flow_N - moved_N)
        scale = max(0.25, 1.48 * float(np.median(error_N)))
        share_N = 1.0 / (1.0 + (error_N / scale) ** 2) ** 2
        share_N /= share_N.sum()
        middle, shift = (share_N * away_N).sum(), (share_N * flow_N).sum()
        from_N = away_N - middle
        pull_N = share_N * from_N.conj()
        spread = float((pull_N * from_N).real.sum()) + 1e-6
        factor = (pull_N * (flow_N - shift)).sum() / spread
        moved_N = shift + factor * from_N
    shift -= factor * middle
    size = float(np.median(np.abs(moved_N)))
    agree_N = np.abs(flow_N - moved_N) < max(0.5, 0.3 * size)
    at = np.array([centre.real, centre.imag])
    by = np.array([shift.real, shift.imag])
    return Similarity(by, float(factor.real), float(factor.imag), at), agree_N


def _complex(pairs_N2: NDArray[np.float64]) -> NDArray[np.complex128]:
    return np.ascontiguousarray(pairs_N2, np.float64).view(np.complex128)[:, 0]


def put_into_words(
    motion: Similarity, body: str, target: str, least: float, size: float, width: float
) -> Phrase:
    """Put a motion into the five slots: shift, growth or turn, whichever moves pixels most.

    Args:
        motion: Motion of the region.
        body: Its name; starts with ``whole`` if it is the whole scene.
        target: What it moves against.
        least: Smallest growth or turn that counts, as mean displacement in pixels.
        size: Side of a square with the region's area, pixels.
        width: Width of the frame, pixels.
    """
    shift = float(np.linalg.norm(motion.shift))
    arm = 0.38 * size  # mean distance of a square's points from its centre
    grown, turned = abs(motion.growth) * arm, abs(motion.turn) * arm
    scene = body.startswith("whole")
    if max(grown, turned) > max(1.2 * shift, least):
        if grown >= turned:
            closer = motion.growth > 0
            action = (
                ("zooms in" if closer else "zooms out")
                if scene
                else ("approaches" if closer else "recedes")
            )
            way = "towards the camera" if closer else "away from the camera"
            return Phrase(
                body,
                action,
                target,
                way,
                f"{_number(100 * abs(motion.growth))} percent of its size",
            )
        way = "clockwise" if motion.turn > 0 else "counter-clockwise"
        return Phrase(
            body, "turns", target, way, f"{_number(np.degrees(abs(motion.turn)))} degrees"
        )
    way = compass_word(motion.shift)
    percent = 100.0 * shift / width
    action = (
        "shifts" if scene else "slides" if percent < 3 else "moves" if percent < 8 else "sweeps"
    )
    return Phrase(body, action, target, way, f"{_number(percent)} percent of the frame width")


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 2 else f"{value:.0f}"


def colour_name(hue: int, saturation: int, value: int) -> str:
    """Name a colour given as hue in [0, 180), saturation and value in [0, 255]."""
    if value < 50:
        return "black"
    if saturation < 45:
        return "white" if value > 190 else "grey"
    name = [word for first, word in _COLOURS.items() if hue >= first][-1]
    dull = value < 140 and saturation < 200
    return "brown" if dull and name in ("red", "orange", "yellow") else name
