"""Frames that go on after others: predicted as tokens, and drawn.

Shapes: N rows, K context frames, H W image, A action, V semantic vector.

Source: iVideoGPT, arXiv:2405.15223; facts 7.5, 7.6.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from mapo_lightning.models.token_world.frame_predictor import FramePredictor, Told
from mapo_lightning.models.token_world.settings import TokenWorldConfig
from mapo_lightning.models.token_world.tokenizer import Tokenizer


class Continuation:
    """Frames that follow a context, drawn one after the other with one cache.

    Where the transformer has no position left for another frame, the last K frames that it drew
    become the context, and it begins anew.

    Args:
        cfg: How tokens are drawn.
        tokenizer: Of frames.
        predictor: Of tokens.
        context: The K frames before, (N, K, 3, H, W) in [0, 1].
    """

    def __init__(
        self,
        cfg: TokenWorldConfig,
        tokenizer: Tokenizer,
        predictor: FramePredictor,
        context: Tensor,
    ) -> None:
        self.cfg, self.tokenizer, self.predictor = cfg, tokenizer, predictor
        self._look(context)

    def _look(self, context: Tensor) -> None:
        self.view = self.tokenizer.view(context)
        self.reading = self.predictor.start(self.view.ids)
        self.recent = list(context.unbind(1))

    def branch(self, own_storage: bool) -> Continuation:
        """The same frames, to go on from without changing this one.

        Args:
            own_storage: Copy the cache. Two branches may share it only if no more than one of them
                goes on: each writes behind the tokens that both have read.
        """
        other = copy.copy(self)
        other.recent = self.recent[-self.cfg.tokenizer.context_frames :]
        if own_storage:
            other.reading = self.reading.repeat(1)
        return other

    def next(self, action: Tensor | None, told: Told | None) -> tuple[Tensor, Tensor | None]:
        """Frame (N, 3, H, W) in [0, 1], and reward on reaching it (N,) in symlog if known.

        Where there are phrases and none is told, the model's own guess takes its place.
        """
        layout, shown = self.predictor.layout, self.cfg.tokenizer.context_frames
        if self.reading.cache.length + layout.future_tokens + 1 > self.cfg.transformer.positions:
            self._look(torch.stack(self.recent[-shown:], dim=1))
        if self.predictor.phrases is not None and told is None:
            guess = self.predictor.guess(self.reading.hidden, action)
            told = Told(guess, guess.new_ones(len(guess), dtype=torch.bool))
        tokens, reward, self.reading = self.predictor.next_frame(
            self.reading, action, self.cfg.temperature, self.cfg.top, told
        )
        drawn = self.tokenizer.detokenize(layout.codes(tokens)[:, None], self.view)
        self.recent.append(drawn[:, 0].clamp(0.0, 1.0))
        return self.recent[-1], reward
