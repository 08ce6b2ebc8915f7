"""Where things are in a dream: do they rest, move without jumps, and come back?

The simulator knows where its bodies are seen. A small network learns to read these places off real
frames, and then reads them off true and dreamt frames alike.

Shapes: C contexts, K action sequences, H steps, P places, h w image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mapo_lightning.envs.live_labels import Step
from mapo_lightning.envs.wrappers import PixelEnv
from mapo_lightning.judging.branches import Sequences, random_sequences
from mapo_lightning.judging.regression import Reader, fit
from mapo_lightning.types import Frames

SEQUENCES = ("still", "acting", "back")
"""No action; one random action, held; the same for half of the steps, and then its opposite."""
_MOVES = 0.02  # a body moves if its place varies by more than this share of the image's side

Values = NDArray[np.float64]


@runtime_checkable
class Sighted(Protocol):
    """A simulator that knows where its bodies are seen."""

    def landmarks(self, size: int) -> Mapping[str, tuple[float, float]]:
        """Name -> (right, down), in pixels of a picture with this side."""
        ...


class Eyes(NamedTuple):
    """Reads places off frames."""

    reader: Reader
    names: tuple[str, ...]
    """Of the bodies that move, P / 2 of them."""
    error: float
    """Mean distance of what it reads from the truth on frames it has not learned from, in pixels
    of the frames."""

    def places(self, frames: Frames) -> Values:
        """Places in frames (..., h, w, 3) uint8, as (..., P / 2, 2) in pixels of the frames."""
        *lead, side, _, _ = frames.shape
        flat = torch.from_numpy(frames.reshape(-1, side, side, 3))
        with torch.no_grad():
            read = [self.reader(_pictures(part, self.reader)) for part in torch.split(flat, 512)]
        found: Values = torch.cat(read).double().cpu().numpy() * side
        return found.reshape(*lead, len(self.names), 2)


def learn_to_see(
    env: PixelEnv, episodes: int, seed: int, device: torch.device | None = None
) -> Eyes | None:
    """Train a reader on episodes of random actions, each held for four steps.

    Args:
        env: Whose simulator is `Sighted`.
        episodes: Played for it; every fourth one judges it.
        seed: Of the episodes and of the training.
        device: Where it is trained.

    Returns:
        None where the simulator does not know where its bodies are seen, or none of them moves.
    """
    simulator: Any = env.simulator
    if not isinstance(simulator, Sighted) or episodes < 4:
        return None
    films, marks = zip(
        *(_seen(env, simulator, seed + number) for number in range(episodes)), strict=True
    )
    side = films[0].shape[1]
    names = sorted(set.intersection(*(set(each[0]) for each in marks)))
    places = [np.array([[one[n] for n in names] for one in each]) / side for each in marks]
    moving = np.concatenate(places).std(axis=0).max(axis=-1) > _MOVES
    if not moving.any():
        return None
    kept = [place[:, moving].reshape(len(place), -1) for place in places]
    learned = [number for number in range(episodes) if number % 4]
    pictures = torch.from_numpy(np.concatenate([films[n] for n in learned])).movedim(-1, 1)
    targets = torch.from_numpy(np.concatenate([kept[n] for n in learned])).float()
    where = device or torch.device("cpu")
    reader = fit((pictures.float() / 255.0).to(where), targets.to(where), seed)
    eyes = Eyes(reader, tuple(n for n, m in zip(names, moving, strict=True) if m), 0.0)
    errors = [
        np.linalg.norm(eyes.places(films[n]) - side * places[n][:, moving], axis=-1).mean()
        for n in range(0, episodes, 4)
    ]
    return eyes._replace(error=float(np.mean(errors)))


def physical_sequences(steps: int, width: int) -> Sequences:
    """The three sequences of `SEQUENCES`, (3, H, A)."""
    held = random_sequences(1, steps, width, hold=steps)

    def draw(shown: Step, rng: np.random.Generator) -> NDArray[np.float32]:
        acting = held(shown, rng)[0]
        back = acting.copy()
        back[(steps + 1) // 2 :] *= -1.0
        return np.stack([np.zeros_like(acting), acting, back])

    return draw


def physics(truth: Values, dream: Values) -> Mapping[str, Values]:
    """How far dreamt bodies are from where the true ones are, in units of the places.

    - ``still``: without action. A body at rest must rest.
    - ``acting``: under one held action.
    - ``back``: while the action is held and then turned round: a body that came back must.
    - ``jump``: how far the largest step so far, under the held action, is beyond the largest true
      one of any context, at least 0: motion must be continuous. (Beside a wall the true step of
      the same context may be nothing, so it is no measure.)

    All are mean distances over the bodies that move. They compare places, so they see neither
    colours nor shapes, nor a body that fades: the reader then guesses, which counts as an error.
    A dream in which nothing moves has no jumps.

    Args:
        truth: Places in the true futures, (C, 3, H + 1, P / 2, 2), sequences as `SEQUENCES`.
        dream: Places in the dreams, of the same shape.

    Returns:
        Name -> (C, H).
    """
    away = np.linalg.norm(dream - truth, axis=-1).mean(axis=-1)[:, :, 1:]
    found = {name: away[:, number] for number, name in enumerate(SEQUENCES)}
    steps = (np.linalg.norm(np.diff(x, axis=2), axis=-1).mean(axis=-1) for x in (dream, truth))
    dreamt, real = steps
    largest = np.maximum.accumulate(dreamt[:, 1], axis=1)
    return {**found, "jump": np.maximum(largest - real.max(), 0.0)}


def spread(truth: Values) -> Mapping[str, Values]:
    """How far apart true takes are: the unit in which errors of places mean something.

    Every context is a take of its own. A dream as far from its truth as another take is knows the
    rules of motion at most, and nothing of this state.

    Args:
        truth: Places in the true futures, (C, 3, H + 1, P / 2, 2), C at least 2.

    Returns:
        Name of each of `SEQUENCES` -> mean distance of each take from all others, (C, H).
    """
    apart = np.linalg.norm(truth[:, None] - truth[None], axis=-1).mean(axis=-1)
    others = apart.sum(axis=1)[..., 1:] / (len(truth) - 1)
    return {name: others[:, number] for number, name in enumerate(SEQUENCES)}


def _seen(
    env: PixelEnv, simulator: Sighted, seed: int
) -> tuple[Frames, list[Mapping[str, tuple[float, float]]]]:
    """Frames and landmarks of one episode of held random actions, of at most 200 steps."""
    rng = np.random.default_rng(seed)
    obs, _ = env.reset(seed=seed)
    side = obs["image"].shape[0]
    frames, marks = [obs["image"]], [simulator.landmarks(side)]
    ended, action = False, np.zeros(env.action_space.shape, np.float32)
    while not ended and len(frames) < 200:
        if (len(frames) - 1) % 4 == 0:
            action = rng.uniform(-1.0, 1.0, env.action_space.shape).astype(np.float32)
        obs, _, terminated, truncated, _ = env.step(action)
        frames.append(obs["image"])
        marks.append(simulator.landmarks(side))
        ended = terminated or truncated
    return np.stack(frames), marks


def _pictures(frames: Tensor, reader: Reader) -> Tensor:
    """(N, h, w, 3) uint8 -> (N, 3, h, w) in [0, 1], where the reader is."""
    return frames.to(reader.mean.device).movedim(-1, 1).float() / 255.0
