"""Settings of the stacked world model; free of torch, so that a command line answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mapo_lightning.models.settings import MLPStyle, Recompute, ScalarKind
from mapo_lightning.types import ConfigError, check_at_least

IMAGE_SIZES = (32, 64, 128)
"""Sides of frames for which there are networks, in pixels."""


@dataclass
class ImageConfig:
    """Sizes of the image encoder and of the decoder that mirrors it (facts 3)."""

    kind: Literal["resnet", "cnn"] = "resnet"
    """Residual network with batch norm, or DreamerV2's plain CNN."""
    size: int = 64
    """Height and width of the frames, in pixels: 32, 64 (published) or 128. The networks are one
    layer or stage shallower or deeper; data.image_size and env.size follow."""
    channels: list[int] = field(default_factory=lambda: [48, 96, 192])
    """Channels of the residual stages, the last one on an 8x8 map: two at 32 pixels, three at 64,
    four at 128. The CNN takes 1, 2, 4 ... times the first."""
    layers: int = 2
    """Residual layers per stage; the CNN ignores it."""
    recompute: Recompute = "none"
    """What a residual stage computes again in the backward, to use less memory for more time
    (docs/performance.md): ``cheap``: norms, activations and attention weights, but no convolution
    and no projection; ``all``: everything, from what enters the stage. The CNN ignores it."""

    def __post_init__(self) -> None:
        if self.size not in IMAGE_SIZES:
            raise ConfigError(f"size must be 32, 64 or 128 pixels, got {self.size}")
        if not self.channels or min(self.channels) < 4 or any(c % 4 for c in self.channels):
            raise ConfigError(f"channels must be multiples of 4, got {list(self.channels)}")
        sides = [8 * 2**i for i in reversed(range(self.halvings - 1))]
        if self.kind == "resnet" and len(self.channels) != len(sides):
            maps = ", ".join(f"{side}x{side}" for side in sides)
            raise ConfigError(
                f"channels must be {len(sides)} numbers at size={self.size}, for maps of {maps}, "
                f"got {list(self.channels)}"
            )
        check_at_least(self, layers=1)

    @property
    def halvings(self) -> int:
        """Convolutions of stride 2 in the plain CNN: three at 32 pixels, four at 64 ..."""
        return self.size.bit_length() - 3


@dataclass
class QuantizerConfig:
    """Codebook of the context code; the paper names the rule (VQ-VAE's) but no numbers."""

    codes: int = 512
    """Number M of codes in each codebook (O12)."""
    shape: Literal["spatial", "global"] = "spatial"
    """``spatial``: every location of the 16x16 and of the 8x8 map has its code, one codebook per
    scale; ``global``: one code per frame, nearest to the pooled features of both scales (O11)."""
    decay: float = 0.99
    """Share of the moving averages that survives one update (O13)."""
    dead_below: float = 0.01
    """A code with a moving-average count below this many rows is given a new place (O13)."""
    frozen: bool = False
    """Keep the codes as they are, for example in fine-tuning (O16)."""

    def __post_init__(self) -> None:
        check_at_least(self, codes=2)
        if not 0.0 < self.decay < 1.0:
            raise ConfigError(f"decay must lie in (0, 1), got {self.decay}")
        if self.dead_below < 0.0:
            raise ConfigError(f"dead_below must not be negative, got {self.dead_below}")


@dataclass
class ContextConfig:
    """The context path from one frame to the decoder (facts 3.2, O11, O15, O17, O18)."""

    kind: Literal["none", "features", "quantized"] = "quantized"
    """No context (APV), the feature maps (ContextWM), or their nearest codes (MAPO)."""
    frame: Literal["random", "first", "last"] = "random"
    """Which frame of the clip is looked at; the published choice is a random one (O17)."""
    erase: float = 0.0
    """Probability to grey out a random rectangle in fine-tuning: ContextWM has 0.5 on Meta-World,
    except for drawer open, and 0 elsewhere (facts 3.2)."""
    key_mask: float = 0.75
    """Share of context tokens hidden from the decoder, drawn anew for every frame (O15)."""
    heads: int = 4
    """Attention heads; must divide the channels at 16x16 and 8x8."""
    dropout: float = 0.1
    """Dropout of the cross-attention's weights and output."""
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    """Codebook; read only when ``kind`` is ``quantized``."""

    def __post_init__(self) -> None:
        for name in ("erase", "dropout"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        check_at_least(self, heads=1)
        if not 0.0 <= self.key_mask < 1.0:
            raise ConfigError(f"key_mask must lie in [0, 1), got {self.key_mask}")


Consistency = Literal["published", "fixed"]


@dataclass
class SourceConfig:
    """Where the lower dynamics takes its actions from."""

    kind: Literal["null", "semantic", "inverse"] = "semantic"
    """Zeros (APV, ContextWM), the embedded phrase (MAPO), or inferred from two frames (PreLAR).
    Without upper dynamics the environment's action takes their place in fine-tuning: encoded where
    it was inferred, padded with zeros where it was null (O36)."""
    width: int = 64
    """Width of the action vector: d_a = 64 (O1); APV and ContextWM give zeros of width 50 (O37)."""
    position: bool = True
    """Add the sine-cosine position code to the phrase vector (O9)."""
    prior_std: float = 1.2449187
    """PreLAR: standard deviation of the action prior. Published: 2·sigmoid(1/2) = 1.245, because
    the released code transforms the prior's 1 as well; intended: 1 (facts 7.4)."""
    consistency: Consistency = "published"
    """PreLAR: the term that compares the order of action and state changes. published: signs, no
    gradient, as released; fixed: one of the two signs is smooth (facts 7.4)."""
    sampled: bool = True
    """PreLAR: draw the inferred action; false takes its mean (published ablation)."""

    def __post_init__(self) -> None:
        check_at_least(self, width=1)
        if self.prior_std <= 0.0:
            raise ConfigError(f"prior_std must be positive, got {self.prior_std}")


@dataclass
class LatentTransformerConfig:
    """Sizes of a transformer over the steps of a sequence."""

    layers: int = 2
    """Number of layers."""
    width: int = 512
    """Width of a token; the perceptrons between are four times as wide."""
    heads: int = 8
    """Attention heads; they divide the width into even parts."""
    window: int = 25
    """Steps that a step may look at, itself among them. Sequences this long must be learned from:
    conf/config.yaml makes it those of videos in the lower dynamics, chunks in the upper one."""
    dropout: float = 0.1
    """Dropout of attention's weights and of what every layer adds, in training on sequences; dreams
    have none."""

    def __post_init__(self) -> None:
        check_at_least(self, layers=1, width=2, heads=1)
        if self.width % (2 * self.heads):
            raise ConfigError(
                f"heads must divide width into even parts, got {self.heads} heads for a width of "
                f"{self.width}; choose a multiple of {2 * self.heads} as width, or other heads"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout must lie in [0, 1), got {self.dropout}")


@dataclass
class RSSMConfig:
    """Sizes of one state-space model, and how its KL term is shaped (facts 2.1, 2.3)."""

    kind: Literal["gru", "transformer"] = "gru"
    """What carries the past: the GRU of all published systems here, or a transformer that looks
    back at the steps of the episode (docs/methods.md)."""
    deter: int = 1024
    """Width D of the recurrent state, or of what stands in its place: 1024, or DreamerV2's own 200
    (O19, O38)."""
    hidden: int = 1024
    """Width U of the hidden layers."""
    stoch: int = 32
    """Number S of categorical variables in the stochastic state."""
    classes: int = 32
    """Number K of classes of each variable."""
    action_slot: int = 0
    """Width of the action input; shorter actions are padded with zeros. 0: the action's own."""
    kl_balance: float = 0.8
    """Share of the KL gradient that moves the prior towards the posterior, in [0, 1] (O20)."""
    transformer: LatentTransformerConfig = field(default_factory=LatentTransformerConfig)
    """Further sizes of a transformer; read only where ``kind`` is transformer."""

    def __post_init__(self) -> None:
        check_at_least(self, deter=1, hidden=1, stoch=1, classes=1)
        if self.action_slot < 0:
            raise ConfigError(f"action_slot must not be negative, got {self.action_slot}")
        if not 0.0 <= self.kl_balance <= 1.0:
            raise ConfigError(f"kl_balance must lie in [0, 1], got {self.kl_balance}")

    @property
    def feat(self) -> int:
        """Width F of the flat feature."""
        return self.deter + self.stoch * self.classes


@dataclass
class BonusConfig:
    """The bonus of APV, ContextWM, PreLAR and MAPO (facts 4.1, O25)."""

    beta: float = 0.0
    """Weight of the bonus in the reward: 0.1 on DMC, 1.0 on Meta-World, 0 switches it off."""
    window: int = 5
    """Number of consecutive states whose mean is compared."""
    width: int = 128
    """Width P of the fixed random projection."""
    queue: int = 4096
    """Number Q of remembered vectors, first in, first out."""
    neighbours: int = 16
    """Mean distance to this many nearest remembered vectors, the vector itself among them."""
    momentum: float = 0.99
    """Of the moving average of the bonus that normalises it."""

    def __post_init__(self) -> None:
        if self.beta < 0.0:
            raise ConfigError(f"beta must not be negative, got {self.beta}")
        check_at_least(self, window=1, width=1, queue=1, neighbours=1)
        if self.neighbours > self.queue:
            raise ConfigError(f"neighbours must not exceed queue, got {self.neighbours}")
        if not 0.0 <= self.momentum < 1.0:
            raise ConfigError(f"momentum must lie in [0, 1), got {self.momentum}")


@dataclass
class EnsembleConfig:
    """Predictors whose disagreement says how little is known of a dreamt step.

    Source: Plan2Explore, arXiv:2005.05960.
    """

    members: int = 0
    """Number M of predictors, trained beside the world model in fine-tuning; 0: none. They change
    nothing else that is learned."""
    hidden: int = 400
    """Width of their hidden layers."""
    layers: int = 2
    """Hidden layers of each."""

    def __post_init__(self) -> None:
        check_at_least(self, members=0, hidden=1, layers=1)
        if self.members == 1:
            raise ConfigError("members must be 0 or at least 2, got 1: one cannot disagree")


@dataclass
class WorldModelConfig:
    """The plugs and sizes of the world model (docs/methods.md has the table)."""

    kind: Literal["rssm", "tokens"] = "rssm"
    """rssm: recurrent state-space models, which the keys below are of. tokens: iVideoGPT's
    transformer over the tokens of frames, which has its settings in token_world; of the keys below
    it reads image.size only."""
    recurrence: Literal["fused", "plain"] = "fused"
    """How GRUs run: with a backward pass through time written by hand, or as the plain loop that
    specifies it. The results are equal within rounding. A transformer has no such backward: it runs
    in ordinary autograd, whatever is chosen here."""
    image: ImageConfig = field(default_factory=ImageConfig)
    """Encoder and decoder of frames."""
    context: ContextConfig = field(default_factory=ContextConfig)
    """Scene context handed to the decoder."""
    source: SourceConfig = field(default_factory=SourceConfig)
    """What drives the lower dynamics."""
    lower: RSSMConfig | None = field(default_factory=RSSMConfig)
    """Semantic-action network φ, learned from videos; null leaves it out (DreamerV2)."""
    upper: RSSMConfig | None = field(default_factory=RSSMConfig)
    """Environment-action network θ, new in fine-tuning; null lets the lower one go on (PreLAR)."""
    concat_embed: bool = False
    """The upper dynamics sees the frame's embedding beside the lower state: true on DMC (O24)."""
    head_layers: int = 4
    """Hidden layers of reward, actor and critic networks."""
    head_units: int = 400
    """Width U of those layers."""
    head_style: MLPStyle = "elu"
    """What follows each of those layers: ELU, as in DreamerV2, or RMS norm and SiLU, as in
    DreamerV3."""
    rewards: ScalarKind = "normal"
    """How the reward heads say a number: as the mean of a unit normal, as in DreamerV2, or by
    weights of 255 fixed values on a symlog scale, as in DreamerV3."""
    unimix: float = 0.0
    """Share of the uniform distribution in every categorical of the stochastic states, in [0, 1):
    0.01 in DreamerV3."""
    aux_reward: bool = False
    """Second reward head, trained on the reward without bonus (O25)."""
    discount_head: bool = False
    """Predict whether an episode goes on; the published systems do without."""
    bonus: BonusConfig = field(default_factory=BonusConfig)
    """Intrinsic bonus."""
    ensemble: EnsembleConfig = field(default_factory=EnsembleConfig)
    """Uncertainty of dreams; `agent.plan.caution` reads it."""

    def __post_init__(self) -> None:
        if self.lower is None and self.upper is None:
            raise ConfigError("world_model.lower and world_model.upper must not both be null")
        if self.lower is None and (self.bonus.beta > 0.0 or self.concat_embed):
            raise ConfigError(
                "world_model.bonus and world_model.concat_embed read the lower dynamics, "
                "which is null; set bonus.beta=0 and concat_embed=false"
            )
        if self.upper is None and self.source.kind == "semantic":
            raise ConfigError(
                "world_model.upper is null, so the environment's action must drive the lower "
                "dynamics, but world_model.source.kind is semantic; set it to inverse or null"
            )
        if not 0.0 <= self.unimix < 1.0:
            raise ConfigError(f"world_model.unimix must lie in [0, 1), got {self.unimix}")
        if self.head_layers < 1 or self.head_units < 1:
            raise ConfigError("head_layers and head_units must be at least 1")
