"""Settings of both trainings, of evaluation and of the hardware; free of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from mapo_lightning.models.settings import ObjectiveConfig
from mapo_lightning.types import SEEDS, ConfigError, check_at_least


@dataclass
class OptimizerConfig:
    """Adam as every system of the family uses it (facts 4, 5)."""

    eps: float = 1e-5
    """Added to the root of the second moment."""
    weight_decay: float = 1e-6
    """L2 penalty inside Adam, as in the PyTorch ports. Deviation: adam-l2. APV and DreamerV2 in
    TensorFlow shrink all weights by this factor instead, whatever the learning rate."""
    decoupled: bool = False
    """Take the weight decay out of the gradient, times the learning rate (AdamW, as iVideoGPT
    has it), and spare biases, norms and embeddings."""
    max_grad_norm: float = 100.0
    """Global norm to which the gradient of each group is clipped; 0: not clipped."""

    def __post_init__(self) -> None:
        if not 0.0 < self.eps < math.inf:
            raise ConfigError(f"eps must be positive and finite, got {self.eps}")
        for name in ("weight_decay", "max_grad_norm"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"{name} must be finite and not negative, got {getattr(self, name)}"
                )


@dataclass
class PhaseConfig:
    """One phase of learning from videos (facts 5, 7.5, O27, O28)."""

    updates: int = 600_000
    """Optimiser updates: 600,000 for a first result, 1,200,000 for parity (O27)."""
    batch_size: int = 16
    """Clips per update and rank (O28)."""
    lr: float = 3e-4
    """Learning rate (O28)."""
    warmup: int = 0
    """First updates, in which the learning rate rises from zero in a straight line."""
    schedule: Literal["constant", "cosine"] = "constant"
    """What the learning rate does after that: stay, or fall to zero at the last update."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Adam's other numbers."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Loss weights; the method's file names them."""
    validate_every: int = 5000
    """Updates between passes over the held-out clips."""
    swap_phrases: bool = False
    """Give every clip the phrases of the next one in its batch, which is nearly always of another
    video: a control, from whose phrases nothing can be learned. Held-out clips keep theirs."""

    def __post_init__(self) -> None:
        check_at_least(self, updates=1, batch_size=1, validate_every=1, warmup=0)
        if not 0.0 < self.lr < math.inf:
            raise ConfigError(f"lr must be positive and finite, got {self.lr}")
        if self.swap_phrases and self.batch_size < 2:
            raise ConfigError(
                f"swap_phrases needs a batch_size of two clips at least, got {self.batch_size}"
            )

    def rate(self, update: int) -> float:
        """Factor of the learning rate at an update, counted from zero."""
        if update < self.warmup:
            return update / self.warmup
        if self.schedule == "constant":
            return 1.0
        done = (update - self.warmup) / max(1, self.updates - self.warmup)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def _tokenizer_phase() -> PhaseConfig:
    """iVideoGPT's, for 64 pixels (facts 7.5)."""
    return PhaseConfig(
        updates=500_000, lr=5e-4, warmup=500,
        optimizer=OptimizerConfig(eps=1e-8, weight_decay=0.0, max_grad_norm=1.0),
        objective=ObjectiveConfig({"context": 1.0, "future": 1.0, "codes": 1.0, "lpips": 1.0}),
    )  # fmt: skip


def _transformer_phase() -> PhaseConfig:
    """iVideoGPT's, with the term that ivideogpt_semantic adds (facts 7.5)."""
    return PhaseConfig(
        updates=1_000_000, lr=1e-4, warmup=5000, schedule="cosine",
        optimizer=OptimizerConfig(eps=1e-8, weight_decay=0.01, decoupled=True, max_grad_norm=0.0),
        objective=ObjectiveConfig({"tokens": 1.0, "phrase": 1.0}),
    )  # fmt: skip


@dataclass
class PretrainConfig(PhaseConfig):
    """Pre-training on videos: of RSSM world models in one phase, of iVideoGPT's in two."""

    tokenizer: PhaseConfig = field(default_factory=_tokenizer_phase)
    """iVideoGPT's first phase; read with world_model.kind=tokens, as the next one."""
    transformer: PhaseConfig = field(default_factory=_transformer_phase)
    """iVideoGPT's second phase, in place of the keys beside it."""


HANDED_OVER = (
    "encoder", "context", "source", "lower", "decoder", "tokenizer", "transformer", "phrases",
)  # fmt: skip
"""Parts that fine-tuning takes over from pre-training, as far as a method has them (O23)."""


@dataclass
class FinetuneConfig:
    """Learning in an environment (facts 6.1; the suites' numbers stand in conf/env/)."""

    agent_steps: int = 502_000
    """Agent steps in all, prefill included; times the action repeat gives frames (O30)."""
    prefill: int = 1000
    """Agent steps of uniformly random behaviour before learning starts."""
    prefill_hold: int = 1
    """Agent steps for which each random action of the prefill is held; 1 as published. Sustained
    actions show what single ones, which cancel out, do not."""
    initial_updates: int = 100
    """Updates on the prefill before the agent acts."""
    train_every: int = 5
    """Agent steps between updates."""
    collect_ahead: bool = True
    """The environments simulate and draw a step while the next update runs, which hides all of it
    if ``env.num_envs`` is at least ``train_every``. Replay gets that step one update later; the
    order of everything stays fixed. Off with ``trainer.deterministic``."""
    batch_size: int = 16
    """Replayed chunks per update and rank."""
    chunk_length: int = 50
    """Length T of a replayed chunk; shorter episodes are joined to one."""
    lr_model: float = 3e-4
    """Learning rate of upper dynamics, decoder, heads and ensemble."""
    lr_lower: float = 3e-4
    """Learning rate of encoder, context and lower dynamics."""
    agent_updates: int = 1
    """Updates of the agent per update of the world model, each in dreams of its own. 1 as
    published; a dream costs a fraction of the world model's update."""
    hold_lower: int = 0
    """First updates in which the lower learning rate is zero: 100 on Meta-World (facts 2.5)."""
    hold_actor: int = 0
    """First updates in which the actor's learning rate is zero: an actor that trusts a model which
    has seen nothing yet saturates. 0 as published, with its low learning rate."""
    lr_actor: float = 8e-5
    """Learning rate of the actor."""
    lr_critic: float = 8e-5
    """Learning rate of the critic."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Adam's other numbers."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Loss weights; the method's file names them, the environment's sets free nats."""
    load: list[str] = field(default_factory=lambda: list(HANDED_OVER))
    """Parts taken over from pre-training (O23); PreLAR drops its source."""
    freeze: list[str] = field(default_factory=list)
    """Parts of the world model whose weights stay as they are, such as encoder and decoder; the
    published systems train them all (O23). Batch norm goes on following its inputs."""

    def __post_init__(self) -> None:
        check_at_least(self, agent_steps=1, prefill=1, prefill_hold=1, train_every=1, batch_size=1)
        check_at_least(self, agent_updates=1, chunk_length=2)
        for name in ("initial_updates", "hold_lower", "hold_actor"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("lr_model", "lr_lower", "lr_actor", "lr_critic"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if self.prefill >= self.agent_steps:
            raise ConfigError(
                f"prefill must be below agent_steps, got {self.prefill} of {self.agent_steps}"
            )

    @property
    def rates(self) -> dict[str, float]:
        """Learning rate of every group of parameters."""
        return {
            "lower": self.lr_lower,
            "model": self.lr_model,
            "ensemble": self.lr_model,
            "actor": self.lr_actor,
            "critic": self.lr_critic,
        }

    def updates(self, ranks: int) -> int:
        """Optimiser updates of the whole run when ``ranks`` processes collect together."""
        return self.initial_updates + (self.agent_steps - self.prefill) // (
            self.train_every * ranks
        )


@dataclass
class EvaluateConfig:
    """Greedy episodes from a fixed list of reset seeds (O33)."""

    episodes: int = 10
    """Episodes per evaluation."""
    seed: int = 1000
    """First reset seed; the others follow it."""
    every: int = 10_000
    """Updates between evaluations in training; one more is made at the end."""
    first: int = 0
    """Updates before which the agent is not evaluated, since it has hardly learned anything."""
    keep_best: bool = False
    """Keep the agent of the best evaluation as best.ckpt and sum up with it, on reset seeds that no
    evaluation has seen: those after ``seed + episodes``. False: the last agent counts, as
    published."""
    num_envs: int = 2
    """Environments that play side by side."""
    videos: int = 3
    """Episodes that stage=evaluate films; evaluations in training film one."""
    dreams: int = 0
    """Fresh episodes on which stage=evaluate judges the model's dreams, beside as many for its
    inverse model; 0 judges none. mapo-dreams takes 48 then."""
    rollouts: str = ""
    """Folder for the judged dreams and what really happened, in the layout that the scorer
    worldproof reads; empty: they are not kept."""
    decisions: int = 0
    """States from which stage=evaluate plays and dreams five random action sequences, to see
    whether the dream knows the best of them (docs/evaluate.md); 0: none."""

    def __post_init__(self) -> None:
        check_at_least(self, episodes=1, every=1, num_envs=1)
        for name in ("first", "videos", "dreams", "decisions"):
            if (value := getattr(self, name)) < 0:
                raise ConfigError(f"{name} must not be negative, got {value}")
        if not 0 <= self.seed <= SEEDS - self.episodes:
            raise ConfigError(
                f"seed must lie in [0, {SEEDS} - episodes], got {self.seed} with "
                f"episodes={self.episodes}"
            )

    @property
    def seeds(self) -> tuple[int, ...]:
        """Reset seed of every episode."""
        return tuple(range(self.seed, self.seed + self.episodes))

    @property
    def unseen(self) -> EvaluateConfig:
        """The same with the seeds after these, for an agent that these have chosen."""
        return replace(self, seed=seed_after(self.seed, self.episodes))


def seed_after(seed: int, episodes: int) -> int:
    """First reset seed behind those of so many episodes; 0 where not as many again are left."""
    following = seed + episodes
    return following if following + episodes <= SEEDS else 0


@dataclass
class TrainerConfig:
    """Hardware, and what Lightning's Trainer is told of it."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda"] = "auto"
    """auto takes a GPU where there is one; gpu and cuda are the same."""
    devices: int = 1
    """Processes per node: one per device."""
    num_nodes: int = 1
    """Machines."""
    strategy: Literal["auto", "ddp"] = "auto"
    """ddp: several processes train together; auto: ddp where there are several."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """Numbers in the networks; KL terms, returns and distributions stay in float32.
    Deviation: bf16. The published code has fp16 with a loss scaler; bf16 needs none."""
    threads: int = 0
    """Torch threads of each process; 0 leaves torch's choice. Tiny models want 1 or 2."""
    keep_memory: bool = True
    """Keep freed blocks in the process instead of returning them: no page faults in an update on a
    CPU, for the peak of one update in resident memory."""
    compile: bool = False
    """Let torch compile encoder and decoder: about a minute at the start, for GPUs; on a CPU it
    gains nothing (docs/performance.md). Where the compiler fails, they run as they are."""
    capture: bool = False
    """Replay each update as one CUDA graph, on one GPU; chunks of replay then lie in one episode
    each. An update that cannot be recorded ends the run. Never run on a device yet: mapo-gpu-check
    tries it (docs/performance.md)."""
    deterministic: bool = False
    """Refuse operations whose result depends on the order of threads."""
    log_every: int = 50
    """Updates between two points of a curve."""
    requeue: bool = False
    """In a job of SLURM: after SIGUSR1 or SIGUSR2, the run itself calls ``scontrol requeue``. With
    false, the job's script does (docs/cluster.md)."""

    @property
    def processes(self) -> int:
        """Processes on all machines."""
        return self.devices * self.num_nodes

    def __post_init__(self) -> None:
        check_at_least(self, devices=1, num_nodes=1, log_every=1)
        if self.threads < 0:
            raise ConfigError(f"threads must not be negative, got {self.threads}")
