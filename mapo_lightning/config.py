"""One run, as nested dataclasses. Every room owns its own settings; this file only nests them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mapo_lightning.data.replay import ReplayConfig
from mapo_lightning.data.windows import VideoDataConfig
from mapo_lightning.envs.spec import EnvConfig
from mapo_lightning.finetune import FinetuneConfig
from mapo_lightning.models.actor_critic import AgentConfig
from mapo_lightning.models.world_model import WorldModelConfig
from mapo_lightning.pretrain import PretrainConfig
from mapo_lightning.semantics.describer import VlmConfig
from mapo_lightning.tracking import TrackingConfig
from mapo_lightning.types import ConfigError


@dataclass
class DemoConfig:
    """Videos that ``data=demo`` renders once; no actions are stored with them."""

    scenes: list[str] = field(default_factory=list)
    """Scenes as kind/name, for example dmc/walker_run, metaworld/door-open, toy/disc."""
    clips_per_scene: int = 4
    """Videos per scene."""
    frames: int = 75
    """Frames per video, at 25 frames per second."""
    size: int = 256
    """Height and width of the videos, in pixels."""

    def __post_init__(self) -> None:
        for name in ("clips_per_scene", "frames"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.size < 64 or self.size % 2:
            raise ConfigError(f"size must be even and at least 64 pixels, got {self.size}")


@dataclass
class EvaluateConfig:
    """Greedy episodes from a fixed list of reset seeds (O33)."""

    episodes: int = 10
    """Episodes per evaluation."""
    seed: int = 1000
    """First reset seed; the others follow it."""
    every: int = 10_000
    """Updates between evaluations in training; one more is made at the end."""
    keep_best: bool = False
    """Keep the agent of the best evaluation as best.ckpt and sum up with it, on reset seeds that no
    evaluation has seen: those after ``seed + episodes``. False: the last agent counts, as
    published."""
    num_envs: int = 2
    """Environments that play side by side."""
    videos: int = 3
    """Episodes that stage=evaluate films; evaluations in training film one."""

    def __post_init__(self) -> None:
        for name in ("episodes", "every", "num_envs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seed", "videos"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")

    @property
    def seeds(self) -> tuple[int, ...]:
        """Reset seed of every episode."""
        return tuple(range(self.seed, self.seed + self.episodes))

    @property
    def unseen(self) -> EvaluateConfig:
        """The same with the seeds after these, for an agent that these have chosen."""
        return replace(self, seed=self.seed + self.episodes)


@dataclass
class CallbacksConfig:
    """What happens around training."""

    codebook: bool = True
    """Move the codebook after each update; must be off for methods without one."""
    rollout_every: int = 5000
    """Updates between imagination rollouts; one more is made at the end."""
    checkpoint_every: int = 5000
    """Updates between checkpoints; one more is made at the end."""
    phrases: int = 24
    """Windows in the table of phrases that is recorded at the end of pre-training."""
    gallery: int = 200
    """Windows in the page of labels that is recorded at the end of pre-training; 0: no page."""
    quality: int = 48
    """Windows by which the labels are judged at the end of pre-training; each costs four more
    questions to the describer. 0: not at all."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        for name in ("gallery", "quality"):
            if not 0 <= getattr(self, name) <= 2000:
                raise ConfigError(f"{name} must lie in [0, 2000], got {getattr(self, name)}")
        for name in ("rollout_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass
class TrainerConfig:
    """Hardware, and what Lightning's Trainer is told of it."""

    accelerator: str = "auto"
    """cpu, gpu, or auto."""
    devices: int = 1
    """Processes per node: one per device."""
    num_nodes: int = 1
    """Machines."""
    strategy: str = "auto"
    """auto, or ddp."""
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
    """Replay each update as one CUDA graph, on one GPU; never run on a device yet
    (docs/performance.md)."""
    deterministic: bool = False
    """Refuse operations whose result depends on the order of threads."""
    log_every: int = 50
    """Updates between two points of a curve."""

    @property
    def processes(self) -> int:
        """Processes on all machines."""
        return self.devices * self.num_nodes

    def __post_init__(self) -> None:
        for name in ("devices", "num_nodes", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.threads < 0:
            raise ConfigError(f"threads must not be negative, got {self.threads}")


@dataclass
class LabelConfig:
    """What stage=label does: every window of all videos gets its label."""

    shard: str = "0/1"
    """Which part of the corpus, as i/n with i from 0: for jobs on several machines. Processes that
    torchrun starts share a part out among themselves."""
    dry: bool = False
    """Only say how many windows and questions there are, and how long they would take."""
    probe: int = 16
    """Questions that dry=true asks to measure the rate; their answers are kept. 0: none."""

    def __post_init__(self) -> None:
        if self.probe < 0:
            raise ConfigError(f"probe must not be negative, got {self.probe}")
        self.part()

    def part(self) -> tuple[int, int]:
        """The shard as (number, count)."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", self.shard)
        if not match or not int(match[1]) < int(match[2]):
            raise ConfigError(f"shard must be i/n with i from 0 to n-1, got '{self.shard}'")
        return int(match[1]), int(match[2])


@dataclass
class RunConfig:
    """One run of train.py."""

    stage: Literal["all", "pretrain", "finetune", "evaluate", "label"] = "all"
    """all: pre-train, fine-tune and evaluate in one go; or one of them; label: only fill the label
    store with every window of the videos."""
    method: str = "mapo"
    """Published system, for the record; chosen with method=NAME."""
    seed: int = 0
    """Of initialisation, sampling and environments."""
    run_dir: str = ""
    """Folder of this run; empty: runs/<date>-<method>-<task>."""
    work_dir: str = "runs/cache"
    """Folder that runs share: scanned videos and the label store."""
    init_from: str | None = None
    """Pre-training checkpoint that fine-tuning starts from; null starts fresh."""
    checkpoint: str | None = None
    """Fine-tuning checkpoint that stage=evaluate plays, with the settings it was made with."""
    resume: str | None = None
    """Checkpoint, or folder of a run, whose training goes on: with its settings, optimiser, replay,
    counters and MLflow runs."""
    data: VideoDataConfig = field(default_factory=VideoDataConfig)
    """Videos."""
    demo: DemoConfig = field(default_factory=DemoConfig)
    """Videos that the demo renders."""
    vlm: VlmConfig = field(default_factory=VlmConfig)
    """Who describes them."""
    label: LabelConfig = field(default_factory=LabelConfig)
    """Labelling a whole corpus."""
    env: EnvConfig = field(default_factory=EnvConfig)
    """Task."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    """Experience."""
    world_model: WorldModelConfig = field(default_factory=WorldModelConfig)
    """Plugs and sizes."""
    agent: AgentConfig = field(default_factory=AgentConfig)
    """Behaviour learning."""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """Stage 1."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Stage 2."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Test episodes."""
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    """What happens around training."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Hardware."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""

    @property
    def about(self) -> dict[str, Any]:
        """What its evaluations are of."""
        task = f"{self.env.kind}/{self.env.name}"
        return {"method": self.method, "task": task, "seed": self.seed}

    def __post_init__(self) -> None:
        if self.stage == "evaluate" and not self.checkpoint:
            raise ConfigError("stage=evaluate needs checkpoint=PATH of a fine-tuned agent")
        if self.data.image_size != self.env.size:
            raise ConfigError(
                f"data.image_size and env.size must agree, got {self.data.image_size} and "
                f"{self.env.size}"
            )
        if self.env.size != 64:
            raise ConfigError(
                f"env.size must be 64, the side the networks have, got {self.env.size}"
            )
