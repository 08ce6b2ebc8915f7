"""Lets a model say who does what to which thing, and optical flow say where and how far.

Video language models tell left from right, and up from down, hardly better than by chance, while
the flow of the same frames measures both. `fill_direction` wraps any describer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mapo_lightning.semantics.answers import read_answer
from mapo_lightning.semantics.describer import (
    Describer,
    Metered,
    NoAnswer,
    Reply,
    StreamingDescriber,
    Usage,
)
from mapo_lightning.semantics.flow import FlowDescriber
from mapo_lightning.semantics.phrase import Phrase, parse_reply
from mapo_lightning.types import Frames


class MeasuredDirection:
    """Puts the measured direction and displacement into the answers of another describer.

    - An answer in slots or prose keeps body, action and target, and gets both slots from the flow.
      They are empty where the flow sees no motion, because nothing supports a claim then.
    - An answer that is null, unreadable or none at all is left as it is: whether there is an action
      is for the model to say.

    The text and the hidden state stay the model's.

    Args:
        model: Answers about the windows.
        flow: Measures the motion in them.
    """

    def __init__(self, model: Describer, flow: FlowDescriber) -> None:
        self.model, self.flow = model, flow
        self.in_worker = model.in_worker
        self.name = f"{model.name} direction {flow.name}"

    @property
    def usage(self) -> Usage:
        """What the model has used; the flow costs no tokens."""
        return self.model.usage if isinstance(self.model, Metered) else Usage()

    def describe(self, clips: Sequence[Frames]) -> list[Reply | NoAnswer]:
        """Describe each window; see `Describer.describe`.

        Raises:
            DescriberError: As the model's `describe`, or a clip is not (T, H, W, 3) uint8.
        """
        replies = self.model.describe(clips)
        if len(replies) != len(clips):  # for the caller to complain about
            return list(replies)
        return [self._fill(*pair) for pair in zip(replies, clips, strict=True)]

    def _fill(self, reply: Reply | NoAnswer, clip: Frames) -> Reply | NoAnswer:
        answer = reply if isinstance(reply, NoAnswer) else read_answer(reply.text)
        if isinstance(reply, NoAnswer) or isinstance(answer, NoAnswer):
            return reply
        said = parse_reply(answer).phrase
        if said is None:
            return reply
        seen = parse_reply(self.flow.describe([clip])[0].text).phrase or Phrase("", "", "", "", "")
        filled = said._replace(direction=seen.direction, displacement=seen.displacement)
        return reply._replace(phrase=filled)


class StreamingMeasuredDirection(MeasuredDirection):
    """The same for a describer that waits for a server, see `StreamingDescriber`."""

    model: StreamingDescriber

    @property
    def concurrency(self) -> int:
        """The model's queries in flight."""
        return self.model.concurrency

    def describe_each(self, clips: Sequence[Frames]) -> Iterator[Mapping[int, Reply | NoAnswer]]:
        """Yield answers as they arrive; see `StreamingDescriber.describe_each`.

        Raises:
            DescriberError: As `describe`.
        """
        for answered in self.model.describe_each(clips):
            yield {number: self._fill(reply, clips[number]) for number, reply in answered.items()}


def fill_direction(model: Describer, flow: FlowDescriber) -> MeasuredDirection:
    """Wrap a describer; the result streams if it does."""
    streams = isinstance(model, StreamingDescriber)
    return (StreamingMeasuredDirection if streams else MeasuredDirection)(model, flow)
