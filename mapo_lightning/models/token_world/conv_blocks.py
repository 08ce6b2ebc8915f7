"""Convolutional blocks of the tokenizer.

Shapes: N frames, C channels, r side of a map, K context frames.

Source: facts 7.5, 7.6; the blocks are those of Stable Diffusion's auto-encoder, arXiv:2112.10752.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CROSS_GROUPS, _CROSS_HEADS = 32, 4


class ResBlock(nn.Module):
    """Two convolutions with norms before them, and a skip connection."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(inputs, groups)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = _norm(outputs, groups)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, r, r) -> (N, outputs, r, r)."""
        inner = self.conv1(F.silu(self.norm1(x)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        out: Tensor = self.skip(x) + inner
        return out


class Attention(nn.Module):
    """Self-attention over all places of a map, with one head as wide as the map."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(width, groups)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, r, r) -> the same."""
        places = self.norm(x).flatten(2).transpose(1, 2)
        read = F.scaled_dot_product_attention(
            self.query(places), self.key(places), self.value(places)
        )
        out: Tensor = x + self.out(read).transpose(1, 2).reshape(x.shape)
        return out


class Down(nn.Module):
    """Halves a map by a convolution of stride 2, padded on the right and below only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, r, r) -> (N, C, r / 2, r / 2)."""
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Up(nn.Module):
    """Doubles a map: every place four times, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, r, r) -> (N, C, 2 r, 2 r)."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Cross(nn.Module):
    """A map of a future frame reads the maps of the context frames.

    Args:
        width: Channels of both.
        side: Side of the maps.
        frames: Number K of context frames.
        dropout: Of attention weights and of what was read.
    """

    def __init__(self, width: int, side: int, frames: int, dropout: float) -> None:
        super().__init__()
        self.norm_context = nn.GroupNorm(_CROSS_GROUPS, width, eps=1e-5)
        self.norm = nn.GroupNorm(_CROSS_GROUPS, width, eps=1e-5)
        self.position_context = nn.Parameter(torch.zeros(frames * side**2, width))
        self.position = nn.Parameter(torch.zeros(side**2, width))
        self.attention = nn.MultiheadAttention(
            width, _CROSS_HEADS, dropout=dropout, batch_first=True
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Maps (N, C, r, r) and the context of each, (N, K, C, r, r) -> (N, C, r, r)."""
        # One below the other, so that the norm sees all context frames together.
        stacked = context.transpose(1, 2).flatten(2, 3)
        read_from = self.norm_context(stacked).flatten(2).transpose(1, 2) + self.position_context
        query = self.norm(x).flatten(2).transpose(1, 2) + self.position
        read, _ = self.attention(query, read_from, read_from, need_weights=False)
        return F.silu(x + self.dropout(read).transpose(1, 2).reshape(x.shape))


class Mid(nn.Module):
    """Between encoder levels and output, and between input and decoder levels."""

    def __init__(self, width: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.first, self.last = (ResBlock(width, width, groups) for _ in range(2))
        self.attention = Attention(width, groups) if attention else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, r, r) -> the same."""
        out: Tensor = self.last(self.attention(self.first(x)))
        return out


class Level(nn.Module):
    """Residual blocks at one resolution, then a change of resolution or none."""

    def __init__(self, widths: Sequence[int], groups: int, resample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ResBlock(a, b, groups) for a, b in pairwise(widths)))
        self.resample = resample or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, widths[0], r, r) -> (N, widths[-1], r or half or twice of it)."""
        out: Tensor = self.resample(self.blocks(x))
        return out


class Ending(nn.Sequential):
    """Norm, SiLU and a last convolution."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__(_norm(inputs, groups), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))


def _norm(width: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, width, eps=1e-6)
