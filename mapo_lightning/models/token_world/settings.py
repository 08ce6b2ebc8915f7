"""Settings of the token world model; free of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

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
    revive: int = 0
    """In pre-training, updates after which codes that nothing has chosen are moved to latents of
    the next batch; 0: never, as published. A short training may end with a handful of codes."""

    def __post_init__(self) -> None:
        check_at_least(
            self, blocks=1, revive=0, latent=1, context_codes=1, future_codes=1, context_frames=1
        )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout must lie in [0, 1), got {self.dropout}")
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


@dataclass
class TokenWorldConfig:
    """The token world model (facts 7.5, 7.6)."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    error: Literal["absolute", "squared"] = "absolute"
    """How the tokenizer's pictures are compared with the truth: by the mean absolute error, as
    published, or by ten times the mean squared error. With the absolute error and without `lpips`,
    a short training leaves out small things that move: without them, few places are wrong.
    Deviation: squared-error."""
    lpips: bool = True
    """Train the tokenizer with LPIPS too, which needs `vgg`; without it, it draws blurred textures.
    A deviation where it is off (facts 7.5)."""
    vgg: str = ""
    """File with VGG16's weights, torchvision's ``vgg16-397923af.pth``; nothing is downloaded."""
    augment: bool = True
    """In pre-training, crop every clip and change its colours at random, as published."""
    pretrain_frames: int = 6
    """Frames of a clip after its context, drawn at random, that one update of the tokenizer looks
    at in pre-training."""
    tokenizer_frames: int = 5
    """The same in fine-tuning."""
    tokenizer_every: int = 4
    """In fine-tuning, the tokenizer learns in one of so many updates."""
    rate: float = 1e-4
    """Learning rate of tokenizer and transformer in fine-tuning, which agent=mbpo gives to
    finetune.lr_model and finetune.lr_lower."""
    clips: int = 16
    """In fine-tuning, chunks of a batch that this model learns from; the agent gets all."""
    codes_in_clip: bool = False
    """Count the gradients of the frozen codes when those of the tokenizer are clipped, and never
    clear them, as the released code does."""
    phrases: bool = False
    """Put the phrase of the way to each frame into the slot that pre-training leaves empty, and
    learn to guess it for dreams. Ours, not iVideoGPT's."""
    phrase_dropout: float = 0.2
    """Share of phrases that are left out while learning, in [0, 1]."""
    stacked: int = 3
    """Frames that a belief holds; the last of them are a dream's context."""
    temperature: float = 1.0
    """Of the tokens that are drawn in a dream; 0 takes the likeliest."""
    top: int = 100
    """Only so many of the likeliest tokens are drawn from."""
    late_reward: bool = False
    """Learn the reward that comes one step later, as the released code does."""
    blind_policy: bool = False
    """Show pictures in a dream to the policy divided by 255 twice, as the released code does."""
    dream_dropout: bool = False
    """Drop attention weights in dreams too, as the released code does."""

    def __post_init__(self) -> None:
        check_at_least(self, tokenizer_every=1, tokenizer_frames=1, pretrain_frames=1)
        check_at_least(self, clips=1, top=1)
        if not 0.0 < self.rate < math.inf:
            raise ConfigError(f"rate must be positive and finite, got {self.rate}")
        if not 0.0 <= self.phrase_dropout <= 1.0:
            raise ConfigError(f"phrase_dropout must lie in [0, 1], got {self.phrase_dropout}")
        if self.stacked < self.tokenizer.context_frames:
            raise ConfigError(
                f"stacked must be at least context_frames={self.tokenizer.context_frames}, so that "
                f"a dream has its context, got {self.stacked}"
            )
        if self.temperature < 0.0:
            raise ConfigError(f"temperature must not be negative, got {self.temperature}")

    def check_room(self) -> None:
        """See that sequences fit: the tokenizer's size follows that of all pictures.

        Raises:
            ConfigError: There are too few positions.
        """
        room = self.transformer.positions - self.tokenizer.context_frames * (
            self.tokenizer.context_tokens + 1
        )
        if room < self.tokenizer.future_tokens + 1:
            raise ConfigError(
                f"token_world.transformer.positions must hold the context and one frame, "
                f"{self.transformer.positions - room + self.tokenizer.future_tokens + 1} tokens, "
                f"got {self.transformer.positions}"
            )
