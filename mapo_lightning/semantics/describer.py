"""Describers: anything that captions a few frames with what happens in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mapo_lightning.semantics.phrase import Phrase
from mapo_lightning.types import Frames


class Reply(NamedTuple):
    """A describer's answer about one window."""

    text: str
    """The raw answer; read by `answers.read_answer` and `phrase.parse_reply`."""
    hidden: NDArray[np.float16] | None = None
    """Mean hidden state of the answer, (hidden_dim,), if the backend exposes it."""
    phrase: Phrase | None = None
    """The five slots, where more is known about them than the text says; they replace what is read
    from a text that is not null."""


class NoAnswer(NamedTuple):
    """What a describer returns about a window that it gives no answer about.

    Such a window has no label: it counts as null for now, is not stored, and is queried again by
    the next run.
    """

    reason: str
    """For people: refused, cut short, no server ..."""
    outage: bool = False
    """True if nobody could be queried; this is reported where it is noticed, once for all."""


class Usage(NamedTuple):
    """What a describer has used in this process."""

    queries: int = 0
    """Queries that a model has answered, repeated ones included."""
    counted: int = 0
    """Those whose tokens are known: not every server tells."""
    tokens_in: int = 0
    """Tokens of the questions that are counted, frames included."""
    tokens_out: int = 0
    """Tokens of their answers, thoughts included."""

    def plus(self, other: Usage) -> Usage:
        """Return the sum."""
        return Usage(*map(sum, zip(self, other, strict=True)))

    def since(self, earlier: Usage) -> Usage:
        """Return what was used after ``earlier`` was."""
        return Usage(*(now - then for now, then in zip(self, earlier, strict=True)))


@runtime_checkable
class Metered(Protocol):
    """A describer that counts what it uses; not every describer has tokens."""

    @property
    def usage(self) -> Usage:
        """What it has used so far in this process."""
        ...


@runtime_checkable
class Describer(Protocol):
    """Captions windows of frames: says what happens from the first frame to the last."""

    name: str
    """Identity of model, weights, prompt and thresholds; part of every label's key."""
    in_worker: bool
    """True if it may run inside a DataLoader worker (CPU or HTTP), False if it needs the GPU."""

    def describe(self, clips: Sequence[Frames]) -> Sequence[Reply | NoAnswer]:
        """Describe each window on its own.

        Args:
            clips: Windows of RGB frames, each (T, H, W, 3) uint8 with T >= 1, oldest first.

        Returns:
            One reply per window, in order, or why there is none. A reply must not depend on the
            other windows.
        """
        ...


@runtime_checkable
class StreamingDescriber(Describer, Protocol):
    """A describer that waits for a server, and hands over answers as they arrive."""

    @property
    def concurrency(self) -> int:
        """Largest number of queries in flight; a query is in flight until its answer is stored."""
        ...

    def describe_each(self, clips: Sequence[Frames]) -> Iterator[Mapping[int, Reply | NoAnswer]]:
        """Yield the answers that have arrived: number of the window -> reply.

        Args:
            clips: As for `describe`.

        Yields:
            Every window once.
        """
        ...


@runtime_checkable
class CaptionReader(Describer, Protocol):
    """A describer that reads sentences which came with the videos, and no frames."""

    def read(self, captions: Sequence[str]) -> Sequence[Reply]:
        """Answer for windows whose sentences are known.

        Args:
            captions: The sentence about each window; empty where there is none.

        Returns:
            One reply per window, in order.
        """
        ...


class NullDescriber:
    """Labels every window null: the ablation without semantic actions."""

    name = "none-v1"
    in_worker = True

    def describe(self, clips: Sequence[Frames]) -> list[Reply]:
        """Answer ``null`` to every window."""
        return [Reply("null") for _ in clips]
