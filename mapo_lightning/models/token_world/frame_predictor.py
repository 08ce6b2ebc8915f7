"""Predicts the tokens of the next frames from those of the frames before, and from actions.

Shapes: B clips, K context frames, T future frames, P codes of a context frame, Q codes of a future
frame, L = K (P + 1) - 1 + T (Q + 1) tokens, V vocabulary, A action, D width.

Source: iVideoGPT, arXiv:2405.15223; facts 7.5, 7.6.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mapo_lightning.models.token_world.layout import Layout
from mapo_lightning.models.token_world.settings import TokenizerConfig, TransformerConfig
from mapo_lightning.models.token_world.transformer import Cache, TokenTransformer


class Prediction(NamedTuple):
    """What the transformer says of whole clips."""

    loss: Tensor  # scalar, cross-entropy over the tokens after the first mark
    logits: Tensor  # (B, L, V) of the token after each
    reward: Tensor | None  # (B, T) on reaching each future frame, in symlog


class FramePredictor(nn.Module):
    """The transformer, the places of actions and rewards, and generation frame by frame.

    Args:
        cfg: Sizes of the transformer.
        tokenizer: Sizes of the tokenizer.
        action_dim: Width A of an action; None: neither actions nor rewards, as in pre-training.
    """

    def __init__(
        self, cfg: TransformerConfig, tokenizer: TokenizerConfig, action_dim: int | None
    ) -> None:
        super().__init__()
        self.layout = Layout.of(tokenizer)
        self.transformer = TokenTransformer(cfg, self.layout.vocabulary, action_dim)

    def forward(self, tokens: Tensor, action: Tensor | None = None) -> Prediction:
        """Predict every token of whole clips.

        Args:
            tokens: (B, L).
            action: (B, K + T, A), entry i is taken in frame i; the last one, and those before the
                last context frame, are not read. None: of no action.
        """
        layout, model = self.layout, self.transformer
        frames = layout.frames_in(tokens)
        embedded = model.embed(tokens)
        if action is not None:
            first = layout.context_frames - 1
            embedded = self._with_actions(embedded, action[:, first : first + frames])
        hidden, _ = model.hidden(embedded)
        logits: Tensor = model.head(hidden)
        begin = layout.first_mark
        loss = F.cross_entropy(logits[:, begin:-1].flatten(0, 1), tokens[:, begin + 1 :].flatten())
        reward = None
        if model.reward is not None:
            ends = hidden[:, begin + layout.future_tokens :: layout.future_tokens + 1]
            reward = model.reward(ends).squeeze(-1)
        return Prediction(loss, logits, reward)

    def _with_actions(self, embedded: Tensor, action: Tensor) -> Tensor:
        """Add actions (B, T, A) to the marks of the frames that they lead to."""
        assert self.transformer.action is not None, "this transformer takes no actions"
        driven = embedded.clone()
        driven[:, self.layout.marks(action.shape[1])] += self.transformer.action(action)
        return driven

    @torch.no_grad()
    def start(self, context: Tensor) -> Cache:
        """A cache that has read the context's codes (B, K, P)."""
        nothing = context.new_zeros(len(context), 0, self.layout.future_tokens)
        tokens = self.layout.join(context, nothing)
        cache = self.transformer.empty_cache(len(context))
        _, cache_after = self.transformer.hidden(self.transformer.embed(tokens), cache)
        assert cache_after is not None
        return cache_after

    @torch.no_grad()
    def next_frame(
        self, cache: Cache, action: Tensor | None, temperature: float = 1.0, top: int = 100
    ) -> tuple[Tensor, Tensor | None, Cache]:
        """Draw the codes of one frame; each token costs one pass, whatever came before.

        Args:
            cache: Has read everything before.
            action: (B, A), taken in the frame before; None: of no action.
            temperature: Of the draws; 0 takes the likeliest token.
            top: Only so many of the likeliest tokens are drawn from.

        Returns:
            Tokens (B, Q) as drawn, which `Layout.codes` turns into codes; reward on reaching the
            frame (B,) in symlog; and the cache after it.
        """
        model, layout = self.transformer, self.layout
        batch = cache.storage.shape[2]
        mark = torch.full((batch, 1), layout.future_follows, device=cache.storage.device)
        embedded = model.embed(mark)
        if action is not None:
            assert model.action is not None, "this transformer takes no actions"
            embedded = embedded + model.action(action)[:, None]
        drawn: list[Tensor] = []
        for _ in range(layout.future_tokens):
            hidden, after = model.hidden(embedded, cache)
            assert after is not None
            cache = after
            drawn.append(_draw(model.head(hidden[:, -1]), temperature, top))
            embedded = model.embed(drawn[-1])
        hidden, after = model.hidden(embedded, cache)
        assert after is not None
        reward = None if model.reward is None else model.reward(hidden[:, -1]).squeeze(-1)
        return torch.cat(drawn, dim=1), reward, after


def _draw(logits: Tensor, temperature: float, top: int) -> Tensor:
    """One token of each row, (B, V) -> (B, 1)."""
    if temperature == 0.0:
        return logits.argmax(dim=-1, keepdim=True)
    best, number = logits.topk(min(top, logits.shape[-1]))
    chosen = torch.multinomial((best / temperature).softmax(dim=-1), 1)
    return number.gather(1, chosen)
