"""Turns a configuration into the objects of a run: the one place where kinds become classes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mapo_lightning.data.label_corpus import CorpusLabelling
from mapo_lightning.data.replay import Replay, ReplaySpec
from mapo_lightning.envs.collector import (
    Collector,
    Episode,
    Policy,
    run_episodes,
)
from mapo_lightning.envs.demo import render_demo_videos
from mapo_lightning.envs.factory import make_vector_env
from mapo_lightning.envs.live_labels import SemanticTracker
from mapo_lightning.envs.settings import EnvConfig
from mapo_lightning.models.agents.dreamer import DreamerAgent
from mapo_lightning.models.rssm_world.world_model import WorldModel
from mapo_lightning.run.config import RunConfig
from mapo_lightning.semantics.factory import build_labeler, semantic_dim
from mapo_lightning.semantics.reviews import read_marks
from mapo_lightning.semantics.settings import VlmConfig
from mapo_lightning.training.checkpoint import (
    LoadReport,
    check_fit,
    load_pretrained,
    read_checkpoint,
)
from mapo_lightning.training.datamodule import VideoDataModule
from mapo_lightning.training.finetune import FinetuneModule
from mapo_lightning.training.pretrain import PretrainModule
from mapo_lightning.training.process import compile_parts
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
        raise ConfigError(
            f"data={cfg.data.kind} needs data.root=DIR, the folder that holds your videos"
        )
    read_marks(cfg.vlm.reviews)  # here, where its complaint is one sentence and not a worker's
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
    if cfg.vlm.server.on_outage == "skip":
        server = replace(module.vlm.server, on_outage="wait")
        module.vlm = replace(module.vlm, server=server)
    number, count = cfg.label.part()
    return CorpusLabelling(module.clips("all"), (number * world + rank, count * world))


def shared_store(cfg: RunConfig) -> VlmConfig:
    """The describer's settings, with the label store where every run finds it."""
    return replace(cfg.vlm, store=str(Path(cfg.work_dir).absolute() / cfg.vlm.store))


def build_pretrain(cfg: RunConfig) -> PretrainModule:
    """World model without upper dynamics."""
    world_model = WorldModel(
        cfg.world_model, cfg.pretrain.objective, semantic_dim(cfg.vlm), action_dim=None
    )
    if cfg.trainer.compile:
        compile_parts([world_model.encoder, world_model.decoder])
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
    if cfg.trainer.compile:
        compile_parts([world_model.encoder, world_model.decoder])
    return FinetuneModule(world_model, agent, cfg.finetune), report


def load_finetuned(cfg: RunConfig, path: Path) -> tuple[FinetuneModule, Mapping[str, Any]]:
    """A trained agent with its world model, and its checkpoint's card.

    Raises:
        CheckpointError: The file is no checkpoint, holds no agent, or does not fit ``cfg``.
    """
    content = read_checkpoint(path)
    card: Mapping[str, Any] = content["mapo"]
    if "action_dim" not in card:
        raise CheckpointError(
            f"'{path}' is a pre-training checkpoint and holds no agent; give one that "
            "stage=finetune made"
        )
    module, _ = build_finetune(cfg, card["action_dim"], None)
    check_fit(module, content, path)
    module.load_state_dict(content["state_dict"])
    return module, card


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
    tracker = build_tracker(cfg, envs.num_envs, f"collect-{rank}", late=answers_late(cfg))
    return Stage2(Collector(envs, tracker, replay, seed), replay, action_dim)


def labelled_env(cfg: RunConfig) -> EnvConfig:
    """The task, with a second picture for the describer if it wants one of another size (O10)."""
    return replace(cfg.env, label_size=cfg.vlm.collect.size or cfg.env.label_size)


def answers_late(cfg: RunConfig) -> bool:
    """Whether collecting goes on without waiting for the describer."""
    if cfg.vlm.collect.late is not None:
        return cfg.vlm.collect.late
    # These two answer within a frame, and a run that waits for them repeats exactly.
    return cfg.vlm.kind not in ("flow", "none") and not cfg.trainer.deterministic


def build_tracker(cfg: RunConfig, envs: int, writer: str, late: bool = False) -> SemanticTracker:
    """Labels of what ``envs`` environments show; ``late``: without waiting for them."""
    vlm, task = shared_store(cfg), f"{cfg.env.kind}/{cfg.env.name}"
    labeler = build_labeler(vlm, Path(cfg.work_dir).absolute(), writer)
    return SemanticTracker(labeler, vlm.window, vlm.collect, envs, task, late)


def play_episodes(
    cfg: RunConfig, policy_of: Callable[[int], Policy], film: int
) -> tuple[list[Episode], list[Frames]]:
    """Play the evaluation's episodes: the same reset seeds whoever plays.

    Leaves the program's random numbers as they were.
    """
    count, seeds = min(cfg.evaluate.num_envs, cfg.evaluate.episodes), cfg.evaluate.seeds
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    envs = make_vector_env(labelled_env(cfg), cfg.evaluate.seed, count)
    try:
        with torch.random.fork_rng(devices=devices):
            tracker = build_tracker(cfg, count, "evaluate")
            return run_episodes(envs, tracker, policy_of, seeds, film)
    finally:
        envs.close()
