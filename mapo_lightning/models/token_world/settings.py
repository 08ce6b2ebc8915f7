"""Settings of the token world model; free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from mapo_lightning.types import ConfigError, check_at_least


@dataclass
class TokenizerConfig:
    """The conditional tokenizer of frames (facts 7.5)."""

    size: int = 64
    """Side of the frames, in pixels."""
    channels: list[int] = field(default_factory=lambda: [128, 256, 512])
    """Width of each level; every level but the last halves the side."""
    blocks: int = 2
    """Residual blocks per level of an encoder; a decoder has one more."""
    groups: int = 32
    """Groups of the norms; those before cross-attention always have 32."""
    latent: int = 64
    """Width of a code."""
    context_codes: int = 8192
    """Codes for what context frames show."""
    future_codes: int = 8192
    """Codes for what changes in the frames after them."""
    context_frames: int = 2
    """Frames that the others are decoded from."""
    patch: int = 4
    """Side of the square of latent places that one code of a future frame stands for."""
    dropout: float = 0.1
    """Of cross-attention."""

    def __post_init__(self) -> None:
        check_at_least(self, blocks=1, latent=1, context_codes=1, future_codes=1, context_frames=1)
        if not self.channels or any(width % self.groups for width in self.channels):
            raise ConfigError(
                f"channels must be multiples of groups={self.groups}, got {self.channels}"
            )
        step = 2 ** (len(self.channels) - 1) * self.patch
        if self.size % step:
            raise ConfigError(
                f"size must be a multiple of {step} with {len(self.channels)} levels and patches "
                f"of {self.patch}, got {self.size}"
            )

    @property
    def side(self) -> int:
        """Side of the latent map."""
        return self.size >> (len(self.channels) - 1)

    @property
    def context_tokens(self) -> int:
        """Codes of one context frame."""
        return self.side**2

    @property
    def future_tokens(self) -> int:
        """Codes of one frame after the context."""
        return (self.side // self.patch) ** 2


@dataclass
class TransformerConfig:
    """The causal transformer over tokens (facts 7.5)."""

    layers: int = 12
    """Decoder layers."""
    width: int = 768
    """Width of a token's embedding."""
    heads: int = 12
    """Attention heads."""
    mlp: int = 3072
    """Width of the gated perceptron."""
    positions: int = 1024
    """Longest sequence, in tokens."""
    dropout: float = 0.1
    """Of attention weights, while training."""

    def __post_init__(self) -> None:
        check_at_least(self, layers=1, width=1, heads=1, mlp=1, positions=1)
        if self.width % self.heads or self.width // self.heads % 2:
            raise ConfigError(
                f"width / heads must be an even whole number, got {self.width} / {self.heads}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout must lie in [0, 1), got {self.dropout}")
