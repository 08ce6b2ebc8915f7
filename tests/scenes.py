"""Films with a known motion, drawn here: what the tests of video and flow look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import av
import cv2
import numpy as np

from mapo_lightning.data.video import VideoInfo, probe_video, write_mp4
from mapo_lightning.types import Frames

WAYS = ("right", "lower right", "down", "lower left", "left", "upper left", "up", "upper right")


def texture(rng: np.random.Generator, height: int, width: int, blur: float) -> np.ndarray:
    """Blurred noise of clear contrast, (height, width, 3) float32 around 128."""
    noise = cv2.GaussianBlur(rng.normal(size=(height, width, 3)).astype(np.float32), (0, 0), blur)
    return 128 + 35 * noise / noise.std()


def _shot(rng: np.random.Generator, picture: np.ndarray, noise: float) -> Frames:
    return np.clip(picture + rng.normal(0, noise, picture.shape), 0, 255).astype(np.uint8)


def moving_square(
    rng: np.random.Generator,
    way: int,
    percent: float,
    frames: int = 4,
    size: tuple[int, int] = (128, 170),
    background: Literal["flat", "textured"] = "textured",
    noise: float = 2.0,
) -> Frames:
    """A bright textured square that moves ``percent`` of the width, in direction ``WAYS[way]``."""
    height, width = size
    if background == "flat":
        behind = np.full((height, width, 3), 60.0, np.float32)
    else:
        behind = texture(rng, height, width, 3.0) * 0.5
    side = int(0.28 * height)
    patch = texture(rng, side, side, 2.0) * 0.4 + np.array([150, 100, 60])
    step = percent / 100 * width * np.array([np.cos(way * np.pi / 4), np.sin(way * np.pi / 4)])
    room = side / 2 + np.abs(step).max() / 2 + 2
    centre = np.array([rng.uniform(room, width - room), rng.uniform(room, height - room)])
    film = []
    for t in range(frames):
        x, y = centre + step * (t / (frames - 1) - 0.5) - side / 2
        shift = np.float32([[1, 0, x], [0, 1, y]])
        on = cv2.warpAffine(np.ones((side, side, 1), np.float32), shift, (width, height))[..., None]
        above = cv2.warpAffine(patch.astype(np.float32), shift, (width, height))
        film.append(_shot(rng, behind * (1 - on) + above * on, noise))
    return np.stack(film)


def moving_camera(
    rng: np.random.Generator, way: int, percent: float, frames: int = 4, noise: float = 2.0
) -> Frames:
    """A textured scene whose whole picture shifts in direction ``WAYS[way]``."""
    height, width = 128, 170
    scene = texture(rng, 2 * height, 2 * width, 3.0).astype(np.float32)
    step = percent / 100 * width * np.array([np.cos(way * np.pi / 4), np.sin(way * np.pi / 4)])
    film = []
    for t in range(frames):
        x, y = step * t / (frames - 1) - np.array([width / 2, height / 2])
        shift = np.float32([[1, 0, x], [0, 1, y]])
        film.append(_shot(rng, cv2.warpAffine(scene, shift, (width, height)), noise))
    return np.stack(film)


def warped(
    rng: np.random.Generator, growth: float, degrees: float, frames: int = 4, noise: float = 2.0
) -> Frames:
    """A textured scene that grows by ``growth`` and turns clockwise by ``degrees``."""
    height, width = 128, 170
    scene = texture(rng, height, width, 3.0).astype(np.float32)
    film = []
    for t in range(frames):
        done = t / (frames - 1)
        turn = cv2.getRotationMatrix2D((width / 2, height / 2), -degrees * done, 1 + growth * done)
        picture = cv2.warpAffine(scene, turn, (width, height), borderMode=cv2.BORDER_REFLECT)
        film.append(_shot(rng, picture, noise))
    return np.stack(film)


def still(rng: np.random.Generator, noise: float, frames: int = 4) -> Frames:
    """Nothing moves; the sensor flickers with a standard deviation of ``noise`` grey levels."""
    scene = texture(rng, 128, 170, rng.uniform(1, 5)) * rng.uniform(0, 1)
    return np.stack([_shot(rng, scene, noise) for _ in range(frames)])


def write_sound(path: Path, seed: int = 0) -> None:
    """Write an mp4 file that holds only sound, of another pitch for another seed."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        tone = np.sin(np.arange(16000) / (10 + seed)).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def damage(path: Path, source: bytes, start: float, end: float) -> None:
    """Write ``source`` with the bytes between two fractions of its length overwritten."""
    data = bytearray(source)
    first, last = int(start * len(data)), int(end * len(data))
    data[first:last] = np.random.default_rng(0).bytes(last - first)
    path.write_bytes(bytes(data))


def numbered(frames: int, size: int = 64) -> Frames:
    """Frames whose brightness is their number: 4, 8, 12 ..."""
    return np.stack([np.full((size, size, 3), 4 * t + 4, np.uint8) for t in range(frames)])


def cases(count: int) -> Iterator[tuple[int, float]]:
    """(way, percent) pairs: all ways in turn, distances from 2 to 12 percent of the width."""
    for number in range(count):
        yield number % 8, 2.0 + 10.0 * (number * 0.618 % 1.0)


def write_squares(folder: Path, **look: object) -> list[VideoInfo]:
    """Three films of 40 frames in which a square moves: right, then down, then left."""
    found = []
    for number, way in enumerate((0, 2, 4)):
        path = folder / f"{number}.mp4"
        film = moving_square(np.random.default_rng(number), way, 40.0, 40, **look)  # type: ignore[arg-type]
        write_mp4(path, film, 20)
        found.append(probe_video(path))
    return found
