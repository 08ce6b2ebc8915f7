"""What can be played: a reality, the dreams beside it, and moments that can be come back to.

Shapes: H W image, A action.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mapo_lightning.envs.snapshots import Snapshot
from mapo_lightning.models.interfaces import Dreaming, Driver
from mapo_lightning.semantics.phrase import Phrase
from mapo_lightning.types import Frames

_APART = 100_003  # moments of one start have random numbers of their own
_SCENERY = 25  # newest frames that the scene is told by


class Moment(NamedTuple):
    """One moment of a play; it never changes."""

    real: Frames
    """What is really seen, (H, W, 3) uint8."""
    dreams: tuple[Dreaming, ...]
    """The same moment in the dream of every model, rows (1,)."""
    frames: tuple[Frames, ...]
    """Their pictures, (H, W, 3) uint8."""
    dreamt: int = 0
    """Steps since the dreams began; 0: what is drawn is what was watched."""
    action: tuple[float, ...] = ()
    """Action, or inferred action, that led here."""
    phrase: str = ""
    """Phrase that led here, as people read it."""
    reward: float | None = None
    """Real reward on reaching this moment; None: there is none."""
    ended: str = ""
    """Why the reality stands still from here on; empty while it goes on."""
    marks: tuple[Any, ...] = ()
    """What the agents remember."""
    state: Snapshot | None = None
    """State of the simulator, now and then."""


class Drive(NamedTuple):
    """What leads from one moment to the next."""

    action: tuple[float, ...] = ()
    phrase: Phrase | None = None
    auto: bool = False
    """Let the agent, or the phrases of the clip, lead."""


class Scene(Protocol):
    """A reality and the models that dream it."""

    names: tuple[str, ...]
    """What to call the models."""
    driver: Driver
    """What leads the dreams."""
    drive_dim: int
    """Width A of an action, or inferred action."""
    reach: float
    """Largest number of an action."""
    auto: str
    """What can lead in the player's place, in words; empty: nothing can."""
    starts: int
    """Number of starts to choose from."""
    about: dict[str, Any]
    """More that the page shows."""

    def begin(self, start: int) -> list[Moment]:
        """Watch the first frames of a start, from the first one on.

        Raises:
            MapoError: The simulator failed.
        """
        ...

    def advance(self, past: Sequence[Moment], drive: Drive) -> Moment:
        """Go on from the last moment of ``past``, in reality and in every dream.

        Raises:
            MapoError: The simulator failed, or the phrase cannot be made a vector.
        """
        ...

    def dream_anew(self, past: Sequence[Moment]) -> Moment:
        """The last moment of ``past`` with dreams that begin here."""
        ...

    def close(self) -> None:
        """Free the simulator; a second call does nothing."""
        ...


@contextmanager
def dice(start: int, number: int, device: torch.device) -> Iterator[None]:
    """Random numbers of one step: the same drives make the same dream, in every model."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed((start * _APART + number) % 2**63)
        yield


def pictures(dreams: Sequence[Dreaming]) -> tuple[Frames, ...]:
    """What the only row of every dream shows, (H, W, 3) uint8."""
    return tuple((d.frame[0] * 255.0).round().to(torch.uint8).cpu().numpy() for d in dreams)


def shown(past: Sequence[Moment], device: torch.device) -> Tensor:
    """The newest real frames, as one row, (1, T, H, W, 3) uint8."""
    frames = np.stack([moment.real for moment in past[-_SCENERY:]])
    return torch.from_numpy(frames)[None].to(device)
