"""Turns a configuration into the objects of a run: the one place where kinds become classes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger

from mapo_lightning.checkpoint import LoadReport, load_pretrained, read_checkpoint
from mapo_lightning.config import RunConfig
from mapo_lightning.data.corpus import CorpusLabelling
from mapo_lightning.data.replay import Replay, ReplaySpec
from mapo_lightning.datamodule import VideoDataModule
from mapo_lightning.envs.collector import (
    Collector,
    Episode,
    Policy,
    SemanticTracker,
    run_episodes,
)
from mapo_lightning.envs.demo import render_demo_videos
from mapo_lightning.envs.spec import EnvConfig, make_vector_env
from mapo_lightning.finetune import FinetuneModule
from mapo_lightning.models.actor_critic import DreamerAgent
from mapo_lightning.models.world_model import WorldModel
from mapo_lightning.pretrain import PretrainModule
from mapo_lightning.semantics.labeler import build_labeler, semantic_dim
from mapo_lightning.types import CheckpointError, ConfigError, Frames


def render_demo(cfg: RunConfig, progress: Callable[[int, int], None] | None = None) -> None:
    """Render the demo's videos into ``data.root`` where they are missing."""
    scenes = []
    for scene in cfg.demo.scenes:
        kind, _, name = scene.partition("/")
        if not name:
            raise ConfigError(f"demo.scenes must hold kind/name, got '{scene}'")
        scenes.append(EnvConfig(kind=kind, name=name, render_quality=cfg.env.render_quality))  # type: ignore[arg-type]
    render_demo_videos(
        Path(cfg.data.root),
        scenes,
        clips_per_scene=cfg.demo.clips_per_scene,
        frames=cfg.demo.frames,
        size=cfg.demo.size,
        seed=cfg.data.seed,
        progress=progress,
    )


def build_videos(cfg: RunConfig) -> VideoDataModule:
    """Clips and their labels; the label store and the scan are shared by all runs.

    Raises:
        ConfigError: No folder of videos is given.
    """
    if not cfg.data.root:
        raise ConfigError("data=folder needs data.root=DIR, the folder that holds your videos")
    corpus = hashlib.blake2b(str(Path(cfg.data.root).absolute()).encode(), digest_size=4)
    name = f"{Path(cfg.data.root).name}-{corpus.hexdigest()}"
    work = Path(cfg.work_dir).absolute()
    return VideoDataModule(
        cfg.data, shared_store(cfg), cfg.pretrain.batch_size, work / name, cfg.seed
    )


def build_labelling(cfg: RunConfig, rank: int, world: int) -> CorpusLabelling:
    """Everything that labels this process's part of all videos.

    Raises:
        ConfigError: Nobody is to be asked.
    """
    if cfg.vlm.kind == "none":
        raise ConfigError("stage=label needs a describer: vlm=flow, openai_server or another")
    module = build_videos(cfg)
    # A corpus is labelled to the end: nulls for want of a server are of no use here.
    if cfg.vlm.on_outage == "skip":
        module.vlm = replace(module.vlm, on_outage="wait")
    number, count = cfg.label.part()
    return CorpusLabelling(module.clips("all"), (number * world + rank, count * world))


def shared_store(cfg: RunConfig) -> Any:
    """The describer's settings, with the label store where every run finds it."""
    return replace(cfg.vlm, store=str(Path(cfg.work_dir).absolute() / cfg.vlm.store))


def build_pretrain(cfg: RunConfig) -> PretrainModule:
    """World model without upper dynamics."""
    world_model = WorldModel(
        cfg.world_model, cfg.pretrain.objective, semantic_dim(cfg.vlm), action_dim=None
    )
    return PretrainModule(world_model, cfg.pretrain)


def build_finetune(
    cfg: RunConfig, action_dim: int, init_from: Path | None
) -> tuple[FinetuneModule, LoadReport | None]:
    """Stacked world model and agent; the lower half from a checkpoint if one is given."""
    world_model = WorldModel(
        cfg.world_model, cfg.finetune.objective, semantic_dim(cfg.vlm), action_dim
    )
    agent = DreamerAgent(
        cfg.agent,
        world_model.feat_dim,
        action_dim,
        cfg.world_model.head_layers,
        cfg.world_model.head_units,
    )
    report = None
    if init_from is not None:
        report = load_pretrained(world_model, read_checkpoint(init_from), cfg.finetune.load)
    return FinetuneModule(world_model, agent, cfg.finetune), report


def restore(module: FinetuneModule, content: Mapping[str, Any], path: Path) -> None:
    """Put a checkpoint's weights into a module of the same configuration.

    Raises:
        CheckpointError: The checkpoint belongs to another method, size or task.
    """
    try:
        module.load_state_dict(content["state_dict"])
    except RuntimeError as error:
        first = next(line.strip() for line in str(error).splitlines() if line.startswith("\t"))
        raise CheckpointError(
            f"'{path}' was made with method={content['mapo']['method']} and does not fit this "
            f"model: {first} Use the same method=, size= and env="
        ) from error


class Stage2(NamedTuple):
    """What one rank needs to collect experience."""

    collector: Collector
    replay: Replay
    action_dim: int


def build_collection(cfg: RunConfig, folder: Path, rank: int) -> Stage2:
    """Environments, labels and replay of one rank, seeded from (seed, rank)."""
    seed = cfg.seed + 10_007 * rank
    envs = make_vector_env(labelled_env(cfg), seed)
    action_dim = int(envs.single_action_space.shape[0])  # type: ignore[index]
    spec = ReplaySpec((cfg.env.size, cfg.env.size, 3), action_dim, semantic_dim(cfg.vlm))
    replay = Replay(folder / f"rank{rank}", cfg.replay, spec)
    tracker = build_tracker(cfg, envs.num_envs, f"collect-{rank}")
    return Stage2(Collector(envs, tracker, replay, seed), replay, action_dim)


def labelled_env(cfg: RunConfig) -> EnvConfig:
    """The task, with a second picture for the describer if it wants one of another size (O10)."""
    return replace(cfg.env, label_size=cfg.vlm.env_frame_size or cfg.env.label_size)


def build_tracker(cfg: RunConfig, envs: int, writer: str) -> SemanticTracker:
    """Labels of what ``envs`` environments show."""
    vlm = shared_store(cfg)
    labeler = build_labeler(vlm, Path(cfg.work_dir).absolute(), writer)
    return SemanticTracker(labeler, vlm, envs, f"{cfg.env.kind}/{cfg.env.name}")


def play_episodes(
    cfg: RunConfig, policy_of: Callable[[], Policy], film: int
) -> tuple[list[Episode], list[Frames]]:
    """Play the evaluation's episodes: the same reset seeds whoever plays."""
    count = min(cfg.evaluate.num_envs, cfg.evaluate.episodes)
    seeds = [cfg.evaluate.seed + i for i in range(cfg.evaluate.episodes)]
    envs = make_vector_env(labelled_env(cfg), cfg.evaluate.seed, count)
    try:
        # Posteriors are sampled in evaluation too: the same agent must get the same score twice.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.evaluate.seed)
            tracker = build_tracker(cfg, count, "evaluate")
            return run_episodes(envs, tracker, policy_of, seeds, film)
    finally:
        envs.close()


def build_trainer(
    cfg: RunConfig,
    updates: int,
    folder: Path,
    callbacks: Sequence[L.Callback],
    logger: Logger | None,
    validate_every: int | None = None,
) -> L.Trainer:
    """Lightning's Trainer for one stage of ``updates`` optimiser updates."""
    saving = ModelCheckpoint(
        dirpath=folder,
        filename="{step}",
        every_n_train_steps=cfg.callbacks.checkpoint_every,
        save_last=True,
        save_top_k=1,
        monitor=None,
        save_on_train_epoch_end=True,
    )
    return L.Trainer(
        accelerator=cfg.trainer.accelerator,
        devices=cfg.trainer.devices,
        num_nodes=cfg.trainer.num_nodes,
        strategy=cfg.trainer.strategy,
        precision=cfg.trainer.precision,
        deterministic=cfg.trainer.deterministic,
        max_steps=updates,
        log_every_n_steps=cfg.trainer.log_every,
        val_check_interval=min(validate_every, updates) if validate_every else None,
        check_val_every_n_epoch=None if validate_every else 1,
        limit_val_batches=None if validate_every else 0,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, saving],
        logger=logger or False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
