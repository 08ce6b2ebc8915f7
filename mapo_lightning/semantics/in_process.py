"""Describes windows with a vision-language model in this process, of whichever family."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mapo_lightning.semantics.answers import MORE_ROOM, read_answer
from mapo_lightning.semantics.describer import NoAnswer, Reply, Usage
from mapo_lightning.semantics.image_text import ImageTextModel
from mapo_lightning.semantics.phrase import PROMPT
from mapo_lightning.semantics.qwen import LoadedModel, Said, identity, loading, locate
from mapo_lightning.semantics.settings import VlmConfig
from mapo_lightning.types import Frames

_VIDEO = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")  # families that see the frames as a video here
_loading_lock = threading.Lock()


class InProcessDescriber:
    """Queries a vision-language model, decoding greedily, in batches of windows of one size.

    Only windows of the same size share a batch, so that nothing is padded: padding changes the
    answers of these models.

    Args:
        cfg: Model, device and batch size.
    """

    in_worker = False  # one copy of the weights per training process, not one per worker

    def __init__(self, cfg: VlmConfig) -> None:
        self.cfg, self.usage = cfg, Usage()
        prompt = hashlib.blake2b(PROMPT.encode(), digest_size=4).hexdigest()
        weights = identity(cfg.model, cfg.revision)
        self.name = f"transformers {weights} prompt {prompt} tokens {cfg.max_new_tokens}"

    def __getstate__(self) -> dict[str, object]:
        """Leave out the weights."""
        return {"cfg": self.cfg, "name": self.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load the weights at the first query."""
        self.cfg, self.name, self.usage = state["cfg"], state["name"], Usage()

    def describe(self, clips: Sequence[Frames]) -> list[Reply | NoAnswer]:
        """Describe each window; the hidden state is the mean of the last layer over the answer.

        Raises:
            DescriberError: The model is not available, or is of another kind.
        """
        replies: dict[int, Reply | NoAnswer] = {}
        again: list[int] = []
        for number, said in self._say(clips, range(len(clips)), self.cfg.max_new_tokens):
            replies[number] = _reply(said)
            if said.cut and isinstance(replies[number], NoAnswer):
                again.append(number)
        for number, said in self._say(clips, again, MORE_ROOM * self.cfg.max_new_tokens):
            replies[number] = _reply(said)
        return [replies[number] for number in range(len(clips))]

    def _say(
        self, clips: Sequence[Frames], wanted: Sequence[int], tokens: int
    ) -> Iterator[tuple[int, Said]]:
        """Ask the model about some of the clips, in batches of one size."""
        by_size: dict[tuple[int, ...], list[int]] = {}
        for number in wanted:
            by_size.setdefault(clips[number].shape, []).append(number)
        for numbers in by_size.values():
            for first in range(0, len(numbers), self.cfg.batch_size):
                batch = numbers[first : first + self.cfg.batch_size]
                said = self.model.answer([clips[n] for n in batch], tokens)
                self.usage = functools.reduce(Usage.plus, (one.usage for one in said), self.usage)
                yield from zip(batch, said, strict=True)

    @property
    def model(self) -> LoadedModel:
        """The model in memory; loaded on first use, and shared by all describers of a process."""
        with _loading_lock:
            return _load(self.cfg.model, self.cfg.revision, _device(self.cfg.device))


@functools.lru_cache(maxsize=2)
def _load(source: str, revision: str | None, device: torch.device) -> LoadedModel:
    from transformers import AutoConfig

    with loading(source, "vlm.model"):
        family = AutoConfig.from_pretrained(**locate(source, revision)).model_type
    return (LoadedModel if family in _VIDEO else ImageTextModel)(source, revision, device)


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _reply(said: Said) -> Reply | NoAnswer:
    answer = read_answer(said.text, said.cut)
    return answer if isinstance(answer, NoAnswer) else Reply(answer, said.hidden)
