"""What a describer is: anything that says, in words, what happens in a few frames."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mapo_lightning.types import Frames


class Reply(NamedTuple):
    """What a describer says about one clip."""

    text: str
    """The answer as it was given; read by `phrase.parse_reply`."""
    hidden: NDArray[np.float16] | None = None
    """Mean hidden state of the answer, (hidden_dim,), where the backend exposes it."""


@runtime_checkable
class Describer(Protocol):
    """Anything that can say what happens between the first and the last of a few frames."""

    name: str
    """Identity of model, weights, prompt and thresholds; part of every label's key."""
    in_worker: bool
    """True if it may run inside a DataLoader worker (CPU or HTTP), False if it needs the GPU."""

    def describe(self, clips: Sequence[Frames]) -> list[Reply]:
        """Describe each clip on its own.

        Args:
            clips: Windows of RGB frames, each (T, H, W, 3) uint8 with T >= 1, oldest first.

        Returns:
            One reply per clip, in order. A reply must not depend on the other clips.
        """
        ...


@runtime_checkable
class StreamingDescriber(Describer, Protocol):
    """A describer that waits for others, such as a server, and hands over answers as they come."""

    @property
    def concurrency(self) -> int:
        """Questions in flight at most; one is until its answer is stored."""
        ...

    def describe_each(self, clips: Sequence[Frames]) -> Iterator[Mapping[int, Reply | None]]:
        """Yield what has been answered meanwhile: number of the clip -> reply.

        Args:
            clips: As for `describe`.

        Yields:
            Every clip once; None where no answer is to be had now.
        """
        ...


class NullDescriber:
    """Sees nothing: the ablation without semantic actions, and the smallest real describer."""

    name = "none-v1"
    in_worker = True

    def describe(self, clips: Sequence[Frames]) -> list[Reply]:
        """Answer ``null`` to every clip."""
        return [Reply("null") for _ in clips]
