"""What stands where in a clip's tokens.

A sequence is: the codes of each context frame, a mark before each but the first, then for every
future frame a mark and its codes. The marks say which kind of frame follows.

Shapes: B clips, K context frames, T future frames, P codes of a context frame, Q codes of a future
frame, L = K (P + 1) - 1 + T (Q + 1) tokens.

Source: iVideoGPT, arXiv:2405.15223; facts 7.5, 7.6.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mapo_lightning.models.token_world.settings import TokenizerConfig


@dataclass(frozen=True)
class Layout:
    """Where what stands in a sequence of tokens."""

    context_frames: int
    context_tokens: int
    future_tokens: int
    context_codes: int
    future_codes: int

    @classmethod
    def of(cls, cfg: TokenizerConfig) -> Layout:
        """The layout of a tokenizer's sequences."""
        return cls(
            cfg.context_frames,
            cfg.context_tokens,
            cfg.future_tokens,
            cfg.context_codes,
            cfg.future_codes,
        )

    @property
    def first_mark(self) -> int:
        """Place of the mark before the first future frame: tokens of the context."""
        return self.context_frames * (self.context_tokens + 1) - 1

    @property
    def context_follows(self) -> int:
        """The mark before a context frame."""
        return self.context_codes + self.future_codes

    @property
    def future_follows(self) -> int:
        """The mark before a future frame."""
        return self.context_follows + 1

    @property
    def vocabulary(self) -> int:
        """Number of different tokens."""
        return self.context_follows + 2

    def join(self, context: Tensor, future: Tensor) -> Tensor:
        """Codes (B, K, P) and (B, T, Q) -> tokens (B, L)."""
        before = F.pad(context, (1, 0), value=self.context_follows).flatten(1)[:, 1:]
        after = F.pad(future + self.context_codes, (1, 0), value=self.future_follows)
        return torch.cat([before, after.flatten(1)], dim=1)

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) -> codes (B, K, P) and (B, T, Q); for impossible ones see `codes`."""
        before = F.pad(tokens[:, : self.first_mark], (1, 0))
        context = torch.unflatten(before, 1, (self.context_frames, -1))[..., 1:]
        after = torch.unflatten(tokens[:, self.first_mark :], 1, (-1, self.future_tokens + 1))
        return context.clamp(0, self.context_codes - 1), self.codes(after[..., 1:])

    def codes(self, future: Tensor) -> Tensor:
        """Codes of a future frame's tokens; a token that stands for none becomes the nearest."""
        return (future - self.context_codes).clamp(0, self.future_codes - 1)

    def marks(self, frames: int) -> slice:
        """Places of the marks before ``frames`` future frames."""
        return slice(self.first_mark, self.length(frames), self.future_tokens + 1)

    def length(self, frames: int) -> int:
        """Tokens of a sequence with ``frames`` future frames."""
        return self.first_mark + frames * (self.future_tokens + 1)

    def frames_in(self, tokens: Tensor) -> int:
        """Number of future frames in tokens (B, L)."""
        return (tokens.shape[1] - self.first_mark) // (self.future_tokens + 1)
