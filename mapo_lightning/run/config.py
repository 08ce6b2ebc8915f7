"""One run, as nested dataclasses. Every subpackage has its own settings; this file nests them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from callbacks.settings import CallbacksConfig
from mapo_lightning.data.settings import LabelConfig, ReplayConfig, VideoDataConfig
from mapo_lightning.envs.settings import DemoConfig, EnvConfig
from mapo_lightning.models.agents.settings import AgentConfig
from mapo_lightning.models.rssm_world.settings import WorldModelConfig
from mapo_lightning.models.token_world.settings import TokenWorldConfig
from mapo_lightning.playing.settings import PlayConfig
from mapo_lightning.run.sweep.settings import LaunchConfig
from mapo_lightning.semantics.settings import VlmConfig
from mapo_lightning.tracking.settings import TrackingConfig
from mapo_lightning.training.settings import (
    EvaluateConfig,
    FinetuneConfig,
    PhaseConfig,
    PretrainConfig,
    TrainerConfig,
)
from mapo_lightning.types import SEEDS, ConfigError


@dataclass
class RunConfig:
    """One run of train.py."""

    stage: Literal["all", "pretrain", "finetune", "evaluate", "label"] = "all"
    """all: pre-train, fine-tune and evaluate, one after the other; or one of the three. label: only
    fill the label store with every window of the videos."""
    method: str = "mapo"
    """Name of the method, which is recorded with the run; method=NAME chooses it."""
    seed: int = 0
    """Seed of initialisation, sampling and environments."""
    run_dir: str = ""
    """Folder of this run; empty: runs/<date>-<method>-<task>."""
    work_dir: str = "runs/cache"
    """Folder that runs share: scanned videos and the label store."""
    init_from: str | None = None
    """Pre-training checkpoint that fine-tuning starts from; null starts fresh."""
    checkpoint: str | None = None
    """Fine-tuning checkpoint that stage=evaluate evaluates, with the checkpoint's own settings."""
    resume: str | None = None
    """Checkpoint, or folder of a run, from which training continues, with its settings, optimiser,
    replay, counters and MLflow runs."""
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
    """Plugs and sizes of the RSSM world model, and which world model there is."""
    token_world: TokenWorldConfig = field(default_factory=TokenWorldConfig)
    """iVideoGPT's world model; read with world_model.kind=tokens."""
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
    play: PlayConfig = field(default_factory=PlayConfig)
    """The page of mapo-play."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Hardware."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """How the runs of a sweep are started."""

    @property
    def tokens(self) -> bool:
        """Whether the world model is iVideoGPT's."""
        return self.world_model.kind == "tokens"

    @property
    def reads_phrases(self) -> bool:
        """Whether the world model learns from phrases."""
        if self.tokens:
            return self.token_world.phrases
        return self.world_model.lower is not None and self.world_model.source.kind == "semantic"

    @property
    def acts_on_phrases(self) -> bool:
        """Whether the agent's beliefs depend on phrases: iVideoGPT's agent sees frames only."""
        return self.reads_phrases and not self.tokens

    @property
    def pretraining(self) -> tuple[str, ...]:
        """Phases of learning from videos, in their order; none for a method without."""
        if self.tokens:
            return ("tokenizer", "pretrain")
        return ("pretrain",) if self.world_model.lower is not None else ()

    def section(self, name: str) -> str:
        """Key under which the settings of a phase stand."""
        if name == "finetune" or not self.tokens:
            return name
        return "pretrain.tokenizer" if name == "tokenizer" else "pretrain.transformer"

    def phase(self, name: str) -> PhaseConfig:
        """Settings of a phase of learning from videos."""
        if not self.tokens:
            return self.pretrain
        return self.pretrain.tokenizer if name == "tokenizer" else self.pretrain.transformer

    @property
    def about(self) -> dict[str, Any]:
        """What its evaluations are of."""
        task = f"{self.env.kind}/{self.env.name}"
        about = {"method": self.method, "task": task, "seed": self.seed}
        plan = self.agent.plan
        return about | ({"plan": plan.kind} if plan.holds(explore=False) else {})

    def __post_init__(self) -> None:
        if not 0 <= self.seed < SEEDS:
            raise ConfigError(f"seed must lie in [0, {SEEDS}), got {self.seed}")
        window = self.world_model.bonus.window
        if self.world_model.bonus.beta and self.finetune.chunk_length < window:
            raise ConfigError(
                f"finetune.chunk_length must be at least world_model.bonus.window, got "
                f"{self.finetune.chunk_length} and {window}"
            )
        self._check_pair()
        plan = self.agent.plan
        if plan.kind != "none" and plan.caution and not self.world_model.ensemble.members:
            raise ConfigError(
                f"agent.plan.caution={plan.caution} subtracts the uncertainty of dreams, and this "
                "world model was, or will be, trained without: train one with "
                "world_model.ensemble.members=5, or set agent.plan.caution=0"
            )
        self._check_windows()
        if self.stage == "evaluate" and not self.checkpoint:
            raise ConfigError("stage=evaluate needs checkpoint=PATH of a fine-tuned agent")
        if self.checkpoint and self.stage != "evaluate":
            raise ConfigError(
                f"checkpoint= is for stage=evaluate, and stage={self.stage} does not read it; "
                "resume= continues a training, init_from= fine-tunes a pre-trained model"
            )
        if self.init_from and self.stage != "finetune" and not self.resume:
            raise ConfigError(
                f"init_from= is what stage=finetune starts from, and stage={self.stage} does not "
                "read it; add stage=finetune, or leave it out"
            )
        size = self.world_model.image.size
        sizes = {"data.image_size": self.data.image_size, "env.size": self.env.size}
        if self.tokens:
            sizes["token_world.tokenizer.size"] = self.token_world.tokenizer.size
        for name, value in sizes.items():
            if value != size:
                raise ConfigError(
                    f"{name} must be world_model.image.size, the side that the networks have: "
                    f"got {value} and {size}; set world_model.image.size only, which the others "
                    "follow; where the settings come from a checkpoint, leave out size= too"
                )

    def _check_windows(self) -> None:
        """See that transformers look no further back than they learn to."""
        chunk, clip = self.finetune.chunk_length, self.data.clip_length
        for name, learned, sizes in (
            ("lower", max(chunk, clip), self.world_model.lower),
            ("upper", chunk, self.world_model.upper),
        ):
            if sizes is None:
                continue
            if sizes.transformer.window < 1:
                raise ConfigError(
                    f"world_model.{name}.transformer.window must be at least 1, got "
                    f"{sizes.transformer.window}"
                )
            if sizes.kind != "transformer":
                continue
            if sizes.transformer.window > learned:
                raise ConfigError(
                    f"world_model.{name}.transformer.window must not exceed {learned}, the longest "
                    f"sequence that it learns from (finetune.chunk_length={chunk}"
                    f"{f', data.clip_length={clip}' if name == 'lower' else ''}), got "
                    f"{sizes.transformer.window}: what lies further back is never learned"
                )

    def _check_pair(self) -> None:
        """See that world model and agent fit, and that chunks and clips are long enough."""
        if self.tokens != (self.agent.kind == "mbpo"):
            raise ConfigError(
                f"world_model.kind={self.world_model.kind} goes with "
                f"agent={'mbpo' if self.tokens else 'dreamerv2'}, got agent.kind={self.agent.kind}"
            )
        if not self.tokens:
            return
        self.token_world.check_room()
        shown, steps = self.token_world.tokenizer.context_frames, self.agent.mbpo.n_step
        if self.finetune.chunk_length < max(shown, steps) + 1:
            raise ConfigError(
                f"finetune.chunk_length must be at least {max(shown, steps) + 1}: the "
                f"{shown} frames of the context and one more, and {steps} steps of one episode; "
                f"got {self.finetune.chunk_length}"
            )
        if self.data.clip_length <= shown:
            raise ConfigError(
                f"data.clip_length must be above token_world.tokenizer.context_frames={shown}, "
                f"got {self.data.clip_length}"
            )
        if self.token_world.lpips and not self.token_world.vgg and self._learns_to_draw:
            raise ConfigError(
                "token_world.lpips needs VGG16, and nothing is downloaded: give torchvision's "
                "vgg16-397923af.pth with token_world.vgg=FILE, or leave LPIPS out with "
                "token_world.lpips=false, which is not as published"
            )

    @property
    def _learns_to_draw(self) -> bool:
        """Whether this run trains a tokenizer; resuming does only where it trained one before."""
        return self.stage in ("all", "pretrain", "finetune")


def conf_folder() -> Path:
    """Folder of the group files: inside the installed package, or beside it in a checkout.

    Raises:
        ConfigError: It is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(
        f"there is no configuration folder in '{package}' or beside it: install the package again"
    )
