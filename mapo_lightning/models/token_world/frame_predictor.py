"""Predicts the tokens of the next frames from those before, and from what is put between them.

Shapes: B clips, K context frames, T future frames, P codes of a context frame, Q codes of a future
frame, L = K (P + 1) - 1 + T (Q + 1) tokens, N vocabulary, A action, V semantic vector, D width.

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
    logits: Tensor  # (B, L, N) of the token after each
    reward: Tensor | None  # (B, T) on reaching each future frame, in symlog
    semantic: Tensor | None  # (B, T, V) expected phrase of the way to each future frame


class Told(NamedTuple):
    """Phrases of the way to each of T future frames, or to the next one (no axis T)."""

    semantic: Tensor  # (B, T, V)
    known: Tensor  # (B, T) bool; where there is none, nothing is put in


class Reading(NamedTuple):
    """How far generation has come."""

    cache: Cache
    hidden: Tensor  # (B, D) after the last token that was read

    def repeat(self, times: int) -> Reading:
        """Every sequence ``times`` times, one after the other, in storage of its own."""
        return Reading(self.cache.repeat(times), self.hidden.repeat_interleave(times, dim=0))


class Control(nn.Module):
    """What fine-tuning adds to a transformer that was pre-trained without actions.

    Args:
        action_dim: Width A of an action.
        width: Width D of the transformer.
        phrases: Whether an action also counts in the guess of the phrase.
    """

    def __init__(self, action_dim: int, width: int, phrases: bool) -> None:
        super().__init__()
        self.action = nn.Linear(action_dim, width)
        self.reward = nn.Linear(width, 1)
        nn.init.zeros_(self.action.weight)  # at first an action changes nothing
        nn.init.zeros_(self.action.bias)
        self.intend = None
        if phrases:
            self.intend = nn.Linear(action_dim, width, bias=False)
            nn.init.zeros_(self.intend.weight)


class PhraseSlot(nn.Module):
    """The phrase in the slot that pre-training without actions leaves empty, and its own guess.

    Ours; iVideoGPT has neither. The guess comes from what the transformer knows before the slot,
    and in fine-tuning from the action too: in a dream nobody describes what will happen.

    Args:
        semantic_dim: Width V of a semantic vector.
        width: Width D of the transformer.
    """

    def __init__(self, semantic_dim: int, width: int) -> None:
        super().__init__()
        self.put = nn.Linear(semantic_dim, width, bias=False)
        self.know = nn.Linear(width, width)
        self.say = nn.Linear(width, semantic_dim)
        nn.init.zeros_(self.put.weight)  # at first a phrase changes nothing

    def forward(self, told: Told) -> Tensor:
        """What phrases (..., V) add to their slots, (..., D); nothing where there is none."""
        added: Tensor = self.put(told.semantic) * told.known[..., None]
        return added

    def guess(self, hidden: Tensor, intended: Tensor | None) -> Tensor:
        """Phrase (..., V) from hidden states before the slot, and what actions add, (..., D)."""
        known = self.know(hidden)
        guessed: Tensor = self.say(F.silu(known if intended is None else known + intended))
        return guessed


class FramePredictor(nn.Module):
    """The transformer, the slots of actions and phrases, and generation frame by frame.

    Args:
        cfg: Sizes of the transformer.
        tokenizer: Sizes of the tokenizer.
        action_dim: Width A of an action; None: neither actions nor rewards, as in pre-training.
        semantic_dim: Width V of a semantic vector; None: no phrases.
    """

    def __init__(
        self,
        cfg: TransformerConfig,
        tokenizer: TokenizerConfig,
        action_dim: int | None,
        semantic_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.layout = Layout.of(tokenizer)
        self.transformer = TokenTransformer(cfg, self.layout.vocabulary)
        told = semantic_dim is not None
        self.control = None if action_dim is None else Control(action_dim, cfg.width, told)
        self.phrases = None if semantic_dim is None else PhraseSlot(semantic_dim, cfg.width)

    def forward(
        self, tokens: Tensor, action: Tensor | None = None, told: Told | None = None
    ) -> Prediction:
        """Predict every token of whole clips.

        Args:
            tokens: (B, L).
            action: (B, T, A), those that lead to the future frames. None: of no action.
            told: Phrases of the way there. None: of no phrase.
        """
        layout, model = self.layout, self.transformer
        slots = layout.marks(layout.frames_in(tokens))
        embedded = model.embed(tokens)
        added = self._added(action, told)
        if added is not None:
            embedded = embedded.clone()
            embedded[:, slots] += added
        hidden, _ = model.hidden(embedded)
        logits: Tensor = model.head(hidden)
        begin, step = layout.first_mark, layout.future_tokens + 1
        loss = F.cross_entropy(logits[:, begin:-1].flatten(0, 1), tokens[:, begin + 1 :].flatten())
        reward = semantic = None
        if self.control is not None:
            reward = self.control.reward(hidden[:, begin + layout.future_tokens :: step])[..., 0]
        if self.phrases is not None:
            semantic = self.guess(hidden[:, begin - 1 : -1 : step], action)
        return Prediction(loss, logits, reward, semantic)

    def guess(self, hidden: Tensor, action: Tensor | None) -> Tensor:
        """Phrase (..., V) that is expected after hidden states (..., D), for actions (..., A)."""
        assert self.phrases is not None, "this transformer takes no phrases"
        intended = None
        if action is not None and self.control is not None and self.control.intend is not None:
            intended = self.control.intend(action)
        return self.phrases.guess(hidden, intended)

    def _added(self, action: Tensor | None, told: Told | None) -> Tensor | None:
        """What is added to the embeddings of the slots, (B, T, D) or (B, D)."""
        added: Tensor | None = None
        if action is not None:
            assert self.control is not None, "this transformer takes no actions"
            added = self.control.action(action)
        if told is not None:
            assert self.phrases is not None, "this transformer takes no phrases"
            phrase = self.phrases(told)
            added = phrase if added is None else added + phrase
        return added

    @torch.no_grad()
    def start(self, context: Tensor) -> Reading:
        """Read the context's codes (B, K, P)."""
        nothing = context.new_zeros(len(context), 0, self.layout.future_tokens)
        tokens = self.layout.join(context, nothing)
        cache = self.transformer.empty_cache(len(context))
        return self._read(self.transformer.embed(tokens), cache)

    @torch.no_grad()
    def next_frame(
        self,
        reading: Reading,
        action: Tensor | None,
        temperature: float = 1.0,
        top: int = 100,
        told: Told | None = None,
    ) -> tuple[Tensor, Tensor | None, Reading]:
        """Draw the codes of one frame; each token costs one pass, whatever came before.

        Args:
            reading: Of everything before.
            action: (B, A), taken in the frame before; None: of no action.
            temperature: Of the draws; 0 takes the likeliest token.
            top: Only so many of the likeliest tokens are drawn from.
            told: Phrase of the way to the frame, (B, V) and (B,); None: of no phrase.

        Returns:
            Tokens (B, Q) as drawn, which `Layout.codes` turns into codes; reward on reaching the
            frame (B,) in symlog; and the reading after it.
        """
        model, layout = self.transformer, self.layout
        count, device = reading.hidden.shape[0], reading.hidden.device
        embedded = model.embed(torch.full((count, 1), layout.future_follows, device=device))
        added = self._added(action, told)
        if added is not None:
            embedded = embedded + added[:, None]
        drawn: list[Tensor] = []
        for _ in range(layout.future_tokens):
            reading = self._read(embedded, reading.cache)
            drawn.append(_draw(model.head(reading.hidden), temperature, top))
            embedded = model.embed(drawn[-1])
        reading = self._read(embedded, reading.cache)
        reward = None
        if self.control is not None:
            reward = self.control.reward(reading.hidden).squeeze(-1)
        return torch.cat(drawn, dim=1), reward, reading

    def _read(self, embedded: Tensor, cache: Cache) -> Reading:
        """Follow embedded tokens (B, L, D)."""
        hidden, after = self.transformer.hidden(embedded, cache)
        assert after is not None
        return Reading(after, hidden[:, -1])


def _draw(logits: Tensor, temperature: float, top: int) -> Tensor:
    """One token of each row, (B, N) -> (B, 1)."""
    if temperature == 0.0:
        return logits.argmax(dim=-1, keepdim=True)
    best, number = logits.topk(min(top, logits.shape[-1]))
    chosen = torch.multinomial((best / temperature).softmax(dim=-1), 1)
    return number.gather(1, chosen)
