"""Judges the dreams of a checkpoint: ``mapo-dreams``.

Usage: mapo-dreams checkpoint=runs/NAME/finetune/last.ckpt [checkpoint=... more] [words]

A pre-trained model dreams the rest of held-out videos, led by phrases; an agent's model dreams the
rest of fresh episodes, half of them the agent's own and half of random actions, led by the robot's
actions. Measured is how the dreams look on the pixels that move, beside copying the last frame, the
still scene and one mean picture; what they lose when they are misled; and, for an agent's model,
whether an inverse model can read the actions off the dream, and how well it foresees rewards. Of a
pre-trained model with a codebook, ``codebook.png`` shows what its codes stand for. The
settings are those of the checkpoint; further words, as of ``mapo-train``, change them, for example
``evaluate.dreams=200`` for more clips. Writes tables, a picture and a page into ``run_dir``
(``runs/dreams`` if none is given); of several checkpoints into the folders 1, 2 ... there, with
means over all of them beside. Three or more agents of one task, such as the checkpoints of a run
with ``callbacks.checkpoints=all``, are also ranked by what they imagine.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mapo_lightning.config.command_line import checkpoints_of, small_program
from mapo_lightning.config.compose import compose
from mapo_lightning.run.config import RunConfig, conf_folder
from mapo_lightning.run.from_checkpoint import agent_settings
from mapo_lightning.run.renamed import RENAMED
from mapo_lightning.types import ConfigError, MapoError

if TYPE_CHECKING:
    from mapo_lightning.judging.report import DreamReport
    from mapo_lightning.models.interfaces import WorldModel
    from mapo_lightning.training.datamodule import VideoDataModule

log = logging.getLogger(__name__)

FRAMES = 8
"""Frames of each held-out video that are looked up in the codebook."""


def main(argv: Sequence[str] | None = None) -> int:
    """Judge every checkpoint, print the tables and write them; returns the exit code."""
    return small_program(argv, __doc__ or "", _run)


def _run(words: Sequence[str]) -> None:
    paths, others = checkpoints_of(words, "mapo-dreams", "pre-trained or fine-tuned")
    folder, reports, agents = Path(), [], []
    stages = [_stage(path) for path in paths]  # all of them are read before the first is judged
    settings = [
        compose(
            others, RunConfig, conf_folder(),
            agent_settings(path, others, stage == "pretrain"), RENAMED,
        )
        for path, stage in zip(paths, stages, strict=True)
    ]  # fmt: skip
    for number, (path, composed) in enumerate(zip(paths, settings, strict=True), 1):
        if composed.text is not None:
            sys.stdout.write(composed.text + "\n")
            return
        videos = stages[number - 1] == "pretrain"
        if threads := composed.config.trainer.threads:
            import torch

            torch.set_num_threads(threads)
        folder = Path(composed.config.run_dir or "runs/dreams")
        place = folder / str(number) if len(paths) > 1 else folder
        if videos:
            found = judge_videos(composed.config, path, place)
        else:
            found = judge_agent(composed.config, path)
            agents.append((composed.config, path))
        found.save(place)
        sys.stdout.write(f"{found.markdown()}\n")
        reports.append(found)
    if len(reports) > 1:
        from mapo_lightning.judging.report import over_models

        together = over_models(reports).with_more(_ranking(agents))
        together.save(folder)
        sys.stdout.write(f"{together.markdown()}\n")
    sys.stdout.write(f"Tables, picture and page: {folder}\n")


def _ranking(agents: Sequence[tuple[RunConfig, Path]]) -> DreamReport:
    """What dreams say about which agent is better; nothing where they cannot be compared."""
    from mapo_lightning.judging.report import DreamReport
    from mapo_lightning.run.judged_checkpoints import LEAST, judge_checkpoints

    if len(agents) < LEAST:
        return DreamReport("", ())
    try:
        return judge_checkpoints(agents)
    except MapoError as error:
        log.warning("the agents are not ranked by their dreams: %s", error)
        return DreamReport("", ())


def judge_videos(cfg: RunConfig, path: Path, folder: Path) -> DreamReport:
    """Judge a pre-trained model on its held-out videos; the view of its codebook is written.

    Args:
        cfg: Settings of the checkpoint.
        path: The checkpoint.
        folder: Where ``codebook.png`` and its figures go, if the model has a codebook.

    Raises:
        CheckpointError: The file does not fit its settings.
        ConfigError: There are too few videos or frames.
    """
    from mapo_lightning.judging.clips import Clips
    from mapo_lightning.judging.judge import judge
    from mapo_lightning.run import build
    from mapo_lightning.run.judged_agent import CLIPS, kept_rollouts, perceptual
    from mapo_lightning.run.stages import render_demo
    from mapo_lightning.run.trainer import best_device
    from mapo_lightning.semantics.factory import log_servers

    module = build.load_pretraining(cfg, path)
    log_servers(cfg.vlm)
    render_demo(cfg)
    data = build.build_videos(cfg)
    device = best_device(cfg.trainer.accelerator)
    batch = data.held_out_batch(cfg.evaluate.dreams or CLIPS)
    clips = Clips(
        batch={key: value for key, value in batch.items() if value.ndim > 1},
        group=batch["video"],
        still=data.still_scenes(batch["video"]),
        mean_picture=data.mean_picture(),
        driver="phrase",
        direction=data.direction,
    )
    title = f"Dreams of '{path}' ({cfg.method}){', led by phrases' * cfg.reads_phrases}"
    world_model = module.to(device).world_model
    try:
        _view_codebook(world_model, data, folder)
        keep = kept_rollouts(cfg, clips, data.fps)
        return judge(world_model, clips.to(device), title, perceptual=perceptual(cfg), keep=keep)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _view_codebook(world_model: WorldModel, data: VideoDataModule, folder: Path) -> None:
    """Write and print what the codes of the scene stand for, where there are any."""
    import torch

    from mapo_lightning.judging.codes import codes_report, save_codes, scene_codes
    from mapo_lightning.models.rssm_world.context import FrameContext

    context = getattr(world_model, "context", None)
    if not isinstance(context, FrameContext) or not context.quantizers:
        return
    found = list(data.held_out_frames(FRAMES))
    frames = torch.cat([frames for _, frames in found])
    video = [number for number, (_, taken) in enumerate(found) for _ in taken]
    labels = [found[number][0] for number in video]
    with world_model.evaluating():
        device = next(world_model.parameters()).device
        report = codes_report(scene_codes(context, frames.to(device), video, labels))
    save_codes(report, frames.numpy(), folder)
    sys.stdout.write(f"{report.sentence()}\n\n")


def judge_agent(cfg: RunConfig, path: Path) -> DreamReport:
    """Judge a fine-tuned model on fresh episodes.

    Raises:
        CheckpointError: The file holds no agent, or does not fit its settings.
        ConfigError: The episodes are too short.
    """
    from mapo_lightning.run import build
    from mapo_lightning.run.judged_agent import judge_episodes
    from mapo_lightning.run.trainer import best_device

    module, metadata = build.load_finetuned(cfg, path)
    module.to(best_device(cfg.trainer.accelerator))
    title = f"Dreams of '{path}' ({cfg.method}), led by the robot's actions"
    return judge_episodes(cfg, module, metadata["action_dim"], title)


def _stage(path: Path) -> str:
    from mapo_lightning.training.checkpoint import read_checkpoint

    return str(read_checkpoint(path, mapped=True)["mapo"].get("stage"))
