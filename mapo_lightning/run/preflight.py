"""Checks, before a run begins, that it can work; nothing is written, rendered or trained.

Whatever can be known to fail fails here, in one sentence, and leaves no folder and no MLflow run
behind. Models are built on torch's meta device, which gives their shapes without their numbers.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mapo_lightning.data.scan import list_videos
from mapo_lightning.envs.factory import probed_action_dim
from mapo_lightning.run import build
from mapo_lightning.run.config import RunConfig
from mapo_lightning.run.from_checkpoint import Resumed, resumed
from mapo_lightning.run.job import restarted
from mapo_lightning.run.sweep.plan import is_sweep
from mapo_lightning.run.trainer import best_device, check_hardware
from mapo_lightning.semantics.factory import build_labeler, log_servers
from mapo_lightning.tracking.logger import check_store, is_main_process
from mapo_lightning.training.checkpoint import check_fit, load_pretrained, read_checkpoint
from mapo_lightning.training.cuda_graph import cuda_recorder
from mapo_lightning.training.metadata import weights_of
from mapo_lightning.training.published_weights import is_published
from mapo_lightning.types import CheckpointError, ConfigError


def check_run(cfg: RunConfig) -> None:
    """Check everything that a run needs.

    Raises:
        MapoError: What is missing or does not fit together, and what to do.
    """
    earlier = resumed(cfg)
    phases = phases_of(cfg, earlier)
    _check_folders(cfg)
    _check_method(cfg, earlier)
    _check_unused(cfg, earlier)
    check_store(cfg.tracking)
    if cfg.trainer.capture:
        _check_capture(cfg, phases)
    if phases:
        check_hardware(cfg.trainer)
    elif cfg.stage == "evaluate":
        best_device(cfg.trainer.accelerator)
    if {"tokenizer", "pretrain"} & set(phases) or cfg.stage == "label":
        _check_videos(cfg)
    _check_describer(cfg)
    if cfg.stage == "label":
        return
    action_dim = None
    if "finetune" in phases or cfg.stage == "evaluate":
        action_dim = probed_action_dim(build.labelled_env(cfg))
    # The weights of a model on the meta device are not drawn; its constants might be.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        _check_models(cfg, phases, action_dim, earlier)


def _check_capture(cfg: RunConfig, phases: tuple[str, ...]) -> None:
    """Refuse what no CUDA graph of a whole update can hold."""
    if cfg.tokens:
        raise ConfigError(
            "trainer.capture=true records one optimiser update per batch, and with "
            "world_model.kind=tokens the agent makes updates of its own: leave it out"
        )
    if cfg.finetune.agent_updates > 1 and "finetune" in phases:
        raise ConfigError(
            "trainer.capture=true records one optimiser update per batch, but "
            f"finetune.agent_updates is {cfg.finetune.agent_updates}: set one of them back"
        )
    if (again := cfg.world_model.image.recompute) != "none":
        raise ConfigError(
            f"trainer.capture=true cannot record world_model.image.recompute={again}, which reads "
            "the state of the random numbers in the middle of an update: set one of them back"
        )
    if "finetune" in phases and cfg.vlm.kind == "transformers" and build.answers_late(cfg):
        raise ConfigError(
            "trainer.capture=true wants the GPU for itself while it records, and "
            f"vlm.kind={cfg.vlm.kind} labels in a thread on it: set vlm.collect.late=false, take "
            "a server (vlm=openai_server), or leave it false"
        )
    cuda_recorder(cfg.trainer.accelerator, cfg.trainer.processes, cfg.trainer.strategy)


def phases_of(cfg: RunConfig, earlier: Resumed) -> tuple[str, ...]:
    """Trainings that lie before this run, in their order."""
    if cfg.stage not in ("all", "pretrain", "finetune"):
        return ()
    phases = ("finetune",) if cfg.stage == "finetune" else cfg.pretraining
    if cfg.stage == "all":
        phases = (*phases, "finetune")
    elif not phases:
        raise ConfigError(
            f"method={cfg.method} learns from scratch: there is nothing to pre-train on videos"
        )
    return phases[phases.index(earlier.phase) :] if earlier.phase in phases else phases


def _check_folders(cfg: RunConfig) -> None:
    for key, folder in (("run_dir", cfg.run_dir or "runs"), ("work_dir", cfg.work_dir)):
        there = Path(folder).absolute()
        while not there.exists():
            there = there.parent
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise ConfigError(
                f"{key}='{folder}' cannot be made, because '{there}' is not a folder that you may "
                f"write to; give another with {key}=DIR"
            )


def _check_unused(cfg: RunConfig, earlier: Resumed) -> None:
    """See that the run's folder holds no results of another run, which would be overwritten."""
    folder = Path(cfg.run_dir).absolute()
    # The other ranks find the folder that rank 0 has just made.
    if not cfg.run_dir or folder in earlier.path.absolute().parents or not is_main_process():
        return
    if restarted():  # the results are those of this job's earlier start
        return
    if is_sweep(folder):
        raise ConfigError(
            f"run_dir='{cfg.run_dir}' is the folder of a sweep: resume={cfg.run_dir} continues it, "
            "or give another folder"
        )
    for result in (*sorted(folder.glob("*/*.ckpt")), *folder.glob("evaluation.json")):
        more = f"resume={cfg.run_dir} continues it, or " if result.suffix == ".ckpt" else ""
        raise ConfigError(
            f"run_dir='{cfg.run_dir}' holds the results of an earlier run "
            f"({result.relative_to(folder)}): {more}give another folder"
        )


def _check_method(cfg: RunConfig, earlier: Resumed) -> None:
    """See that a checkpoint goes on, or is played, as the method that it was trained with."""
    played = cfg.checkpoint if cfg.stage == "evaluate" else None
    path = Path(played) if played else earlier.path
    if not played and not earlier.phase:
        return
    metadata = read_checkpoint(path, mapped=True)["mapo"]
    if metadata.get("method", cfg.method) != cfg.method:
        raise CheckpointError(
            f"'{path}' was trained with method={metadata['method']} and cannot "
            f"{'be evaluated' if played else 'continue'} as method={cfg.method}; leave out method="
        )


def _check_videos(cfg: RunConfig) -> None:
    """See that there are videos, or that they can be rendered."""
    build.build_videos(cfg)
    if cfg.data.kind not in build.RENDERED:
        list_videos(cfg.data, cfg.vlm.caption_file)
        return
    scenes = build.demo_scenes(cfg)
    # Tasks of experts are known to exist: one of them shows that they can be drawn here.
    for scene in scenes[:1] if cfg.data.kind == "metaworld_experts" else scenes:
        probed_action_dim(scene)


def _check_describer(cfg: RunConfig) -> None:
    """See that the describer, its reviews and what embeds its phrases can be had."""
    if cfg.stage == "label" and cfg.vlm.kind == "none":
        raise ConfigError("stage=label needs a describer: vlm=flow, openai_server or another")
    build_labeler(build.shared_store(cfg), Path(cfg.work_dir).absolute(), "preflight")
    if is_main_process():
        log_servers(cfg.vlm)


def _check_models(
    cfg: RunConfig, phases: tuple[str, ...], action_dim: int | None, earlier: Resumed
) -> None:
    """Build every model of the run, and lay the checkpoints that it starts from over them."""
    cfg = replace(cfg, trainer=replace(cfg.trainer, compile=False))
    modules: dict[str, nn.Module] = {}
    if cfg.stage == "evaluate":
        _check_agent(cfg, Path(cfg.checkpoint or ""), action_dim)
    for phase in phases:
        if phase != "finetune":
            modules[phase] = build.build_pretrain(cfg, phase)
    if "finetune" in phases:
        assert action_dim is not None
        finetuned, _ = build.build_finetune(cfg, action_dim, None)
        modules["finetune"] = finetuned
    if earlier.phase in modules:
        check_fit(modules[earlier.phase], read_checkpoint(earlier.path, mapped=True), earlier.path)
    if "finetune" in phases and earlier.phase != "finetune":
        if cfg.init_from is not None and is_published(Path(cfg.init_from)):
            build.hand_over(finetuned.world_model, Path(cfg.init_from), cfg.finetune.load)
            return
        start = _handed_over(cfg, modules.get("pretrain"))
        if start is not None:
            load_pretrained(finetuned.world_model, start, cfg.finetune.load)


def _check_agent(cfg: RunConfig, path: Path, action_dim: int | None) -> None:
    """See that a checkpoint's agent fits its settings and the environment."""
    content = build.read_agent(path, mapped=True)
    trained = content["mapo"]["action_dim"]
    build.check_networks(
        lambda bare: build.build_finetune(bare, trained, None)[0], cfg, content, path
    )
    if trained != action_dim:
        raise CheckpointError(
            f"the agent in '{path}' acts with {trained} numbers, but {cfg.env.kind}/"
            f"{cfg.env.name} takes {action_dim}; choose the environment that it was trained in"
        )


def _handed_over(cfg: RunConfig, pretrained: nn.Module | None) -> dict[str, Any] | None:
    """The shapes that fine-tuning will take over; None where it starts afresh."""
    if pretrained is not None:
        return {"mapo": {"method": cfg.method}, "state_dict": pretrained.state_dict()}
    if cfg.init_from is None:
        return None
    content = read_checkpoint(Path(cfg.init_from), mapped=True)
    shapes = {name: x.to("meta") for name, x in weights_of(content).items()}
    return {**content, "state_dict": shapes}
