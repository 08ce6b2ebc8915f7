"""A causal transformer over tokens.

Shapes: B sequences, L tokens, D width, H heads, V vocabulary.

Source: LLaMA, arXiv:2302.13971; iVideoGPT, arXiv:2405.15223; facts 7.5, 7.6.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mapo_lightning.models.token_world.settings import TransformerConfig

_ROTARY_BASE = 10_000.0


@dataclass(frozen=True)
class Cache:
    """Keys and values of all tokens so far, of every layer: (layers, 2, B, H, positions, D / H).

    The storage has room for every position; ``length`` tokens of it are filled. It is written in
    place by the model, so a copy that is to go its own way is taken by `repeat`.
    """

    storage: Tensor
    length: int = 0

    def cropped(self, length: int) -> Cache:
        """The same without the tokens after ``length``."""
        if length > self.length:
            raise ValueError(f"only {self.length} tokens are there, {length} were asked for")
        return replace(self, length=length)

    def repeat(self, times: int) -> Cache:
        """Every sequence ``times`` times, one after the other, in storage of its own."""
        return replace(self, storage=self.storage.repeat_interleave(times, dim=2))


class Layer(nn.Module):
    """Attention to all tokens before, then a gated perceptron."""

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        width, self.heads, self.dropout = cfg.width, cfg.heads, cfg.dropout
        self.norm_attention = nn.RMSNorm(width, eps=1e-6)
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.norm_mlp = nn.RMSNorm(width, eps=1e-6)
        self.gate = nn.Linear(width, cfg.mlp, bias=False)
        self.up = nn.Linear(width, cfg.mlp, bias=False)
        self.down = nn.Linear(cfg.mlp, width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, kept: Tensor | None, begin: int) -> Tensor:
        """Follow tokens (B, L, D); ``kept`` (2, B, H, positions, D / H) holds those before."""
        normed = self.norm_attention(x)
        query, key, value = (
            self._by_head(part(normed)) for part in (self.query, self.key, self.value)
        )
        query, key = _rotated(query, rotation), _rotated(key, rotation)
        if kept is not None:
            end = begin + x.shape[1]
            kept[0, :, :, begin:end], kept[1, :, :, begin:end] = key, value
            key, value = kept[0, :, :, :end], kept[1, :, :, :end]
        read = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=_mask(x.shape[1], begin, x.device) if begin and x.shape[1] > 1 else None,
            is_causal=begin == 0 and x.shape[1] > 1,
            dropout_p=self.dropout if self.training else 0.0,
        )
        x = x + self.out(read.transpose(1, 2).flatten(2))
        normed = self.norm_mlp(x)
        out: Tensor = x + self.down(F.silu(self.gate(normed)) * self.up(normed))
        return out

    def _by_head(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, 2, (self.heads, -1)).transpose(1, 2)


class TokenTransformer(nn.Module):
    """Predicts the next token.

    Args:
        cfg: Sizes.
        vocabulary: Number V of tokens.
    """

    rotation: Tensor

    def __init__(self, cfg: TransformerConfig, vocabulary: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.embedding = nn.Embedding(vocabulary, cfg.width)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.layers))
        self.norm = nn.RMSNorm(cfg.width, eps=1e-6)
        self.head = nn.Linear(cfg.width, vocabulary, bias=False)
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.normal_(part.weight, std=0.02)
        self.register_buffer("rotation", _rotations(cfg), persistent=False)

    def empty_cache(self, batch: int) -> Cache:
        """A cache for ``batch`` sequences, without any token."""
        cfg, weight = self.cfg, self.head.weight
        shape = (cfg.layers, 2, batch, cfg.heads, cfg.positions, cfg.width // cfg.heads)
        return Cache(weight.new_empty(shape))

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) -> embeddings (B, L, D)."""
        found: Tensor = self.embedding(tokens)
        return found

    def hidden(self, embedded: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache | None]:
        """Follow embedded tokens (B, L, D); with a cache, after those that it holds.

        Returns:
            Hidden states after the last norm (B, L, D), and the cache with these tokens.

        Raises:
            ValueError: More tokens than there are positions.
        """
        begin = 0 if cache is None else cache.length
        end = begin + embedded.shape[1]
        if end > self.cfg.positions:
            raise ValueError(f"{end} tokens do not fit {self.cfg.positions} positions")
        x, rotation = embedded, self.rotation[:, begin:end]
        for number, layer in enumerate(self.layers):
            kept = None if cache is None else cache.storage[number]
            x = layer(x, rotation, kept, begin)
        return self.norm(x), None if cache is None else replace(cache, length=end)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) -> logits of the token after each, (B, L, V)."""
        logits: Tensor = self.head(self.hidden(self.embed(tokens))[0])
        return logits


def _rotations(cfg: TransformerConfig) -> Tensor:
    """Cosine and sine of every position's angles, (2, positions, D / H)."""
    width = cfg.width // cfg.heads
    rate = _ROTARY_BASE ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(cfg.positions, dtype=torch.float64)[:, None] * rate
    both = torch.cat([angle, angle], dim=1)
    return torch.stack([both.cos(), both.sin()]).to(torch.get_default_dtype())


def _rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn pairs of entries, half a head apart, by their position's angles (RoPE)."""
    first, second = x.chunk(2, dim=-1)
    return x * rotation[0] + torch.cat([-second, first], dim=-1) * rotation[1]


def _mask(length: int, begin: int, device: torch.device) -> Tensor:
    """True where token i of ``length`` new ones may look, (length, begin + length)."""
    places = torch.arange(begin + length, device=device)
    return places <= torch.arange(begin, begin + length, device=device)[:, None]
