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
from mapo_lightning.semantics.settings import VlmConfig
from mapo_lightning.tracking.settings import TrackingConfig
from mapo_lightning.training.settings import (
    EvaluateConfig,
    FinetuneConfig,
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
        if not 0 <= self.seed < SEEDS:
            raise ConfigError(f"seed must lie in [0, {SEEDS}), got {self.seed}")
        window = self.world_model.bonus.window
        if self.world_model.bonus.beta and self.finetune.chunk_length < window:
            raise ConfigError(
                f"finetune.chunk_length must be at least world_model.bonus.window, got "
                f"{self.finetune.chunk_length} and {window}"
            )
        chunk, clip = self.finetune.chunk_length, self.data.clip_length
        for name, learned, sizes in (
            ("lower", max(chunk, clip), self.world_model.lower),
            ("upper", chunk, self.world_model.upper),
        ):
            if sizes is None or sizes.kind != "transformer":
                continue
            if sizes.transformer.window > learned:
                raise ConfigError(
                    f"world_model.{name}.transformer.window must not exceed {learned}, the longest "
                    f"sequence that it learns from (finetune.chunk_length={chunk}"
                    f"{f', data.clip_length={clip}' if name == 'lower' else ''}), got "
                    f"{sizes.transformer.window}: what lies further back is never learned"
                )
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
        for name, value in (("data.image_size", self.data.image_size), ("env.size", self.env.size)):
            if value != size:
                raise ConfigError(
                    f"{name} must be world_model.image.size, the side that the networks have: "
                    f"got {value} and {size}; set world_model.image.size only, which the others "
                    "follow; where the settings come from a checkpoint, leave out size= too"
                )


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
