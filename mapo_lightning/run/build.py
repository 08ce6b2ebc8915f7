"""Turns a configuration into the objects of a run: the one place where kinds become classes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mapo_lightning.data.label_corpus import CorpusLabelling
from mapo_lightning.data.replay import Replay, ReplaySpec
from mapo_lightning.envs.collector import (
    Collector,
)
from mapo_lightning.envs.demo import default_scenes
from mapo_lightning.envs.experts import expert_scenes
from mapo_lightning.envs.factory import make_vector_env
from mapo_lightning.envs.live_labels import LiveLabeler
from mapo_lightning.envs.replacement import Deaths
from mapo_lightning.envs.settings import EnvConfig
from mapo_lightning.models.agents.dreamer import DreamerAgent
from mapo_lightning.models.agents.mbpo import MBPOAgent
from mapo_lightning.models.agents.planner import Planner
from mapo_lightning.models.interfaces import Agent, WorldModel
from mapo_lightning.models.rssm_world.world_model import RSSMWorldModel
from mapo_lightning.models.settings import ObjectiveConfig
from mapo_lightning.models.token_world.world_model import Taught, TokenWorldModel
from mapo_lightning.run.config import RunConfig
from mapo_lightning.semantics.describer import CaptionReader, NullDescriber
from mapo_lightning.semantics.factory import build_labeler, semantic_dim
from mapo_lightning.semantics.reviews import read_reviews
from mapo_lightning.semantics.settings import VlmConfig
from mapo_lightning.training.checkpoint import (
    LoadReport,
    check_fit,
    load_pretrained,
    read_checkpoint,
)
from mapo_lightning.training.compile import compile_parts
from mapo_lightning.training.datamodule import ReplayDataModule, VideoDataModule
from mapo_lightning.training.finetune import FinetuneModule
from mapo_lightning.training.finite import refuse_broken_weights
from mapo_lightning.training.metadata import printable, weights_of
from mapo_lightning.training.pretrain import PretrainModule
from mapo_lightning.training.published_weights import (
    is_published,
    load_folder,
    perceptual_distance,
)
from mapo_lightning.training.ranks import seed_of_rank
from mapo_lightning.training.settings import HANDED_OVER
from mapo_lightning.types import CheckpointError, ConfigError

RENDERED = ("demo", "metaworld_experts")
"""Kinds of data that are rendered where they are missing."""


def demo_scenes(cfg: RunConfig) -> list[EnvConfig]:
    """Scenes that the demo's videos show.

    Raises:
        ConfigError: One of ``demo.scenes`` is not kind/name.
    """
    scenes = []
    if cfg.data.kind == "metaworld_experts":
        return expert_scenes(cfg.demo.scenes, cfg.env)
    for scene in cfg.demo.scenes:
        kind, _, name = scene.partition("/")
        if not name:
            raise ConfigError(f"demo.scenes must hold kind/name, got '{scene}'")
        scenes.append(EnvConfig(kind=kind, name=name, render_quality=cfg.env.render_quality))  # type: ignore[arg-type]
    return scenes or default_scenes()


def left_out(cfg: RunConfig) -> list[str] | None:
    """Classes of videos never to use: those chosen, or the task that experts are not to show."""
    if cfg.data.leave_out is not None or cfg.data.kind != "metaworld_experts":
        return cfg.data.leave_out
    task = cfg.env.name.removesuffix("-v3") if cfg.env.kind == "metaworld" else ""
    return [task] if task in {scene.name for scene in demo_scenes(cfg)} else []


def build_videos(cfg: RunConfig, phase: str = "pretrain") -> VideoDataModule:
    """Clips and their labels; the label store and the scan are shared by all runs.

    Args:
        cfg: The run.
        phase: Of learning from videos. The tokenizer's needs no labels and gets none.

    Raises:
        ConfigError: No folder of videos is given.
    """
    if not cfg.data.root:
        raise ConfigError(
            f"data={cfg.data.kind} needs data.root=DIR, the folder that holds your videos"
        )
    read_reviews(cfg.vlm.reviews)  # here, where its complaint is one sentence and not a worker's
    corpus = hashlib.blake2b(str(Path(cfg.data.root).absolute()).encode(), digest_size=4)
    name = f"{Path(cfg.data.root).name}-{corpus.hexdigest()}"
    work = Path(cfg.work_dir).absolute()
    data = replace(cfg.data, leave_out=left_out(cfg))
    vlm = shared_store(cfg)
    if phase == "tokenizer":
        vlm = VlmConfig("none", hidden_dim=semantic_dim(cfg.vlm), window=vlm.window)
    return VideoDataModule(data, vlm, cfg.phase(phase).batch_size, work / name, cfg.seed)


def build_labelling(cfg: RunConfig, rank: int, world: int) -> CorpusLabelling:
    """Everything that labels this process's part of all videos."""
    module = build_videos(cfg)
    # A corpus is labelled to the end: nulls because a server was missing are of no use here.
    if cfg.vlm.server.on_outage == "skip":
        server = replace(module.vlm.server, on_outage="wait")
        module.vlm = replace(module.vlm, server=server)
    number, count = cfg.label.part()
    return CorpusLabelling(module.clips("all"), (number * world + rank, count * world))


def shared_store(cfg: RunConfig) -> VlmConfig:
    """The describer's settings, with the label store where every run finds it."""
    return replace(cfg.vlm, store=str(Path(cfg.work_dir).absolute() / cfg.vlm.store))


def build_pretrain(cfg: RunConfig, phase: str = "pretrain") -> PretrainModule:
    """World model of a phase of learning from videos."""
    settings = cfg.phase(phase)
    if cfg.tokens:
        learn: Taught = "tokenizer" if phase == "tokenizer" else "transformer"
        return PretrainModule(_token_world(cfg, settings.objective, None, learn), settings)
    world_model = RSSMWorldModel(
        cfg.world_model, settings.objective, semantic_dim(cfg.vlm), action_dim=None
    )
    if cfg.trainer.compile:
        compile_parts(world_model.parts())
    return PretrainModule(world_model, settings)


def _token_world(
    cfg: RunConfig, objective: ObjectiveConfig, action_dim: int | None, learn: Taught
) -> TokenWorldModel:
    """IVideoGPT's world model; a method names the scales of all terms, those left out too."""
    chosen, scales = cfg.token_world, dict(objective.scales)
    left_out = {"lpips": chosen.lpips, "phrase": chosen.phrases}
    for name in (name for name, wanted in left_out.items() if not wanted):
        scales.pop(name, None)
    looks = None
    if chosen.lpips and chosen.vgg and learn != "transformer":
        looks = perceptual_distance(Path(chosen.vgg))
    width = semantic_dim(cfg.vlm)
    return TokenWorldModel(
        chosen, replace(objective, scales=scales), action_dim, learn, width, looks
    )


def build_finetune(
    cfg: RunConfig, action_dim: int, init_from: Path | None
) -> tuple[FinetuneModule, LoadReport | None]:
    """Stacked world model, agent and planner; the lower half from a checkpoint if one is given."""
    world_model, agent = _learners(cfg, action_dim)
    _check_names(cfg, world_model)
    report = hand_over(world_model, init_from, cfg.finetune.load) if init_from else None
    if cfg.trainer.compile:
        compile_parts(world_model.parts())
    planner = None
    if cfg.agent.plan.kind != "none":
        planner = Planner(cfg.agent.plan, cfg.agent.discount, world_model, agent)
    return FinetuneModule(world_model, agent, cfg.finetune, planner), report


def _learners(cfg: RunConfig, action_dim: int) -> tuple[WorldModel, Agent]:
    """World model and agent of fine-tuning, fresh."""
    objective = cfg.finetune.objective
    if cfg.tokens:
        world = _token_world(cfg, objective, action_dim, "both")
        return world, MBPOAgent(cfg.agent.mbpo, world, action_dim, cfg.finetune.prefill)
    model = cfg.world_model
    world_model = RSSMWorldModel(model, objective, semantic_dim(cfg.vlm), action_dim)
    layers, units, style = model.head_layers, model.head_units, model.head_style
    return world_model, DreamerAgent(cfg.agent, world_model, action_dim, layers, units, style)


def hand_over(world_model: WorldModel, path: Path, parts: Sequence[str]) -> LoadReport:
    """Take over named parts of a checkpoint, or the published weights of iVideoGPT.

    Raises:
        CheckpointError: They do not fit.
    """
    if is_published(path):
        if not isinstance(world_model, TokenWorldModel):
            raise CheckpointError(
                f"'{path}' holds the published weights of iVideoGPT: add method=ivideogpt"
            )
        loaded = load_folder(world_model, path)
        return LoadReport(loaded, tuple(x for x in world_model.parts() if x not in loaded), ())
    return load_pretrained(world_model, read_checkpoint(path), parts)


def _check_names(cfg: RunConfig, world_model: WorldModel) -> None:
    """Refuse parts to take over that no model has; those that only this method lacks are fine."""
    known = [*dict.fromkeys([*HANDED_OVER, *world_model.parts()])]
    for name in cfg.finetune.load:
        if name not in known:
            raise ConfigError(
                f"finetune.load names {name}, which is no part of a world model; the parts are "
                f"{', '.join(known)}"
            )


def load_finetuned(cfg: RunConfig, path: Path) -> tuple[FinetuneModule, Mapping[str, Any]]:
    """A trained agent with its world model, and its checkpoint's metadata.

    Raises:
        CheckpointError: The file is no checkpoint, holds no agent, or does not fit ``cfg``.
    """
    content = read_agent(path, mapped=True)
    metadata: Mapping[str, Any] = content["mapo"]
    width = metadata["action_dim"]
    check_networks(lambda bare: build_finetune(bare, width, None)[0], cfg, content, path)
    refuse_broken_weights(content["state_dict"], f"'{path}'")
    module, _ = build_finetune(cfg, width, None)
    module.load_state_dict(weights_of(content), strict=False)  # found to be exactly its own above
    return module, metadata


def load_pretraining(cfg: RunConfig, path: Path) -> PretrainModule:
    """A pre-trained world model.

    Raises:
        CheckpointError: The file is no checkpoint, or does not fit ``cfg``.
    """
    content = read_checkpoint(path, mapped=True)
    check_networks(build_pretrain, cfg, content, path)
    module = build_pretrain(cfg)
    module.load_state_dict(weights_of(content), strict=False)  # found to be exactly its own above
    return module


def build_chunks(cfg: RunConfig, replay: Replay, seed: int) -> ReplayDataModule:
    """Chunks of replay; those of a token world, or of a captured update, lie in one episode each.

    How many scenes a batch of joined chunks shows depends on the data, and a CUDA graph cannot.
    """
    tune, joined = cfg.finetune, not (cfg.tokens or cfg.trainer.capture)
    return ReplayDataModule(replay, tune.batch_size, tune.chunk_length, seed, joined=joined)


def check_networks(
    make: Callable[[RunConfig], nn.Module], cfg: RunConfig, content: Mapping[str, Any], path: Path
) -> None:
    """Compare a checkpoint with the networks of its settings, before these cost any memory.

    Raises:
        CheckpointError: They do not fit, or no memory could hold them.
    """
    bare = replace(cfg, trainer=replace(cfg.trainer, compile=False))
    try:  # on the meta device tensors have shapes and no numbers, but their constants may be drawn
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            module = make(bare)
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise CheckpointError(
            f"'{path}' was made with sizes that no networks can have: {printable(str(error))}"
        ) from error
    check_fit(module, content, path)


def read_agent(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Read a checkpoint that holds an agent; arguments as `read_checkpoint`.

    Raises:
        CheckpointError: The file is no checkpoint, or holds no agent.
    """
    content = read_checkpoint(path, mapped=mapped)
    if not {"action_dim", "env_frames"} <= set(content["mapo"]):
        raise CheckpointError(
            f"'{path}' is a pre-training checkpoint and holds no agent; give one that "
            "stage=finetune made"
        )
    return content


class Stage2(NamedTuple):
    """What one rank needs to collect experience."""

    collector: Collector
    replay: Replay
    action_dim: int


def build_collection(cfg: RunConfig, folder: Path, rank: int) -> Stage2:
    """Environments, labels and replay of one rank, seeded from (seed, rank)."""
    seed = seed_of_rank(cfg.seed, rank)
    make = partial(make_vector_env, labelled_env(cfg), seed)
    envs = make()
    action_dim = int(envs.single_action_space.shape[0])  # type: ignore[index]
    spec = ReplaySpec((cfg.env.size, cfg.env.size, 3), action_dim, semantic_dim(cfg.vlm))
    replay = Replay(folder / f"rank{rank}", cfg.replay, spec)
    live_labeler = build_live_labeler(cfg, envs.num_envs, f"collect-{rank}", late=answers_late(cfg))
    spare = (make, Deaths(cfg.env.deaths_per_hour))
    return Stage2(Collector(envs, live_labeler, replay, seed, spare), replay, action_dim)


def labelled_env(cfg: RunConfig) -> EnvConfig:
    """The task, with a second picture for the describer if it wants one of another size (O10)."""
    return replace(cfg.env, label_size=cfg.vlm.collect.size or cfg.env.label_size)


def acting_vlm(cfg: RunConfig) -> VlmConfig:
    """The describer of a trained agent's frames: none where the agent does not act on phrases."""
    if cfg.acts_on_phrases:
        return cfg.vlm
    return VlmConfig(
        "none", window=cfg.vlm.window, collect=cfg.vlm.collect, hidden_dim=semantic_dim(cfg.vlm)
    )


def answers_late(cfg: RunConfig) -> bool:
    """Whether collecting goes on without waiting for the describer."""
    if cfg.vlm.collect.late is not None:
        return cfg.vlm.collect.late
    # These answer within a frame, and a run that waits for them repeats exactly.
    return cfg.vlm.kind not in ("flow", "none", "templates") and not cfg.trainer.deterministic


def build_live_labeler(cfg: RunConfig, envs: int, writer: str, late: bool = False) -> LiveLabeler:
    """Labels of what ``envs`` environments show; ``late``: without waiting for them."""
    vlm, task = shared_store(cfg), f"{cfg.env.kind}/{cfg.env.name}"
    labeler = build_labeler(vlm, Path(cfg.work_dir).absolute(), writer)
    if isinstance(labeler.describer, CaptionReader):  # no sentence comes with an environment
        labeler.describer = NullDescriber()
    return LiveLabeler(labeler, vlm.window, vlm.collect, envs, task, late)
