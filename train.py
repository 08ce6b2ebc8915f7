"""Trains MAPO and its baselines.

python train.py                                    the demo: pre-train, fine-tune, evaluate
python train.py env=toy                            a small world that needs no renderer
python train.py stage=pretrain data=folder data.root=DIR
python train.py stage=finetune env=dmc_walker_run init_from=runs/NAME/pretrain/last.ckpt
python train.py stage=evaluate checkpoint=runs/NAME/finetune/last.ckpt
python train.py resume=runs/NAME                   go on where a run was interrupted
python train.py --help                             every group, file and field
python train.py ... --show                         print the resolved run and stop
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import lightning as L
import torch
import torch.distributed as dist

import callbacks
from callbacks.codebook import CodebookUpdate
from callbacks.collect import CollectExperience
from callbacks.evaluate import EvaluatePolicy
from callbacks.label_report import LabelReport
from callbacks.progress import PhaseProgress, counting
from callbacks.recorder import MLflowRecorder
from callbacks.rollout import ImaginationRollout
from mapo_lightning.config.compose import Composed
from mapo_lightning.run import build
from mapo_lightning.run.config import RunConfig
from mapo_lightning.run.from_checkpoint import Resumed, configure, resumed
from mapo_lightning.run.trainer import best_device, build_trainer
from mapo_lightning.tracking import logger as tracking
from mapo_lightning.training.acting import greedy
from mapo_lightning.training.base_module import TrainedModule
from mapo_lightning.training.checkpoint import BEST, check_fit, read_checkpoint
from mapo_lightning.training.cuda_graph import CudaRecorder, cuda_recorder
from mapo_lightning.training.datamodule import ReplayDataModule
from mapo_lightning.training.evaluation import Evaluation, Score, floors
from mapo_lightning.training.process import check_origin, keep_freed_memory, rank, run_folder
from mapo_lightning.types import MapoError

NAMES = {"pretrain": "pre-training", "finetune": "fine-tuning"}
HERE = Path(__file__).resolve().parent
log = logging.getLogger("mapo")


class Run(NamedTuple):
    """One start of this program."""

    cfg: RunConfig
    composed: Composed[RunConfig]
    folder: Path
    parent: str | None  # MLflow run that holds those of the phases
    resumed: Resumed
    recorder: CudaRecorder | None  # of whole updates, where trainer.capture asks for it


def main(argv: list[str]) -> int:
    """Compose the run and play its stages; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        composed = configure(argv, HERE / "conf")
        if composed.text is not None:
            print(composed.text)
            return 0
        return play(start(composed))
    except MapoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def start(composed: Composed[RunConfig]) -> Run:
    """Settle threads, seeds, folder and the MLflow run that holds those of the phases."""
    check_origin(callbacks, HERE)
    cfg = composed.config
    trainer = cfg.trainer
    recorder = cuda_recorder(trainer.accelerator, trainer.processes) if trainer.capture else None
    if cfg.trainer.keep_memory:
        keep_freed_memory()
    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    name = f"{cfg.method}-{cfg.env.name}" if cfg.stage != "pretrain" else f"{cfg.method}-videos"
    folder = run_folder(name, cfg.run_dir)
    if tracking.is_main_process():
        composed.save(folder / "config.yaml")
    earlier = resumed(cfg)
    tags = {"method": cfg.method, "stage": cfg.stage, "run_dir": str(folder)}
    parent = tracking.start_parent(cfg.tracking, folder.name, tags, earlier.tracked("parent"))
    return Run(cfg, composed, folder, parent, earlier, recorder)


def play(run: Run) -> int:
    """Run the stage; close MLflow's run and the process group however it ends."""
    status: tracking.Status = "FAILED"
    try:
        STAGES[run.cfg.stage](run)
        status = "FINISHED"
        return 0
    except KeyboardInterrupt:
        status = "KILLED"
        return 130
    finally:
        tracking.finish_parent(run.parent, status, run.cfg.tracking)
        if dist.is_initialized():  # without this, gloo aborts now and then at exit
            if status == "FINISHED":
                dist.barrier()
            dist.destroy_process_group()


def train_all(run: Run) -> None:
    """Pre-train where the method does, fine-tune from it, and sum up."""
    checkpoint = None
    if run.resumed.phase == "finetune":
        log.info("pre-training was finished before; fine-tuning goes on")
    elif run.cfg.world_model.lower is not None:
        checkpoint = pretrain(run)
    else:
        log.info("%s learns from scratch: there is nothing to pre-train.", run.cfg.method)
    finetune(run, checkpoint)


def pretrain(run: Run) -> Path:
    """Stage 1; returns the last checkpoint."""
    cfg = run.cfg
    if run.resumed.finished("pretrain", cfg.pretrain.updates):
        return run.resumed.path
    render(cfg)
    data = build.build_videos(cfg)
    data.setup("fit")
    assert data.index is not None
    log.info(
        "videos: %d to learn from, %d held out, %d set aside (%s)",
        len(data.index.train),
        len(data.index.holdout),
        len(data.index.quarantined),
        data.root / "quarantine.jsonl",
    )
    module = build.build_pretrain(cfg)
    labels = LabelReport(cfg.callbacks)
    extra = [labels, ImaginationRollout(cfg.callbacks.rollout_every)]
    fit(run, "pretrain", module, data, cfg.pretrain.updates, extra, {"image": "train/image"})
    asked, windows = int(labels.total["asked"]), int(labels.total["windows"])
    log.info(
        "the describer was asked about %d of %d windows; the others were known", asked, windows
    )
    return run.folder / "pretrain" / "last.ckpt"


def render(cfg: RunConfig) -> None:
    """Render the demo's videos where they are the data; every rank waits until they are there."""
    if cfg.data.kind == "demo":
        with counting("rendering videos", "video", show=tracking.is_main_process()) as show:
            build.render_demo(cfg, show)


def label(run: Run) -> None:
    """Fill the label store with every window of the videos; or only count them."""
    cfg = run.cfg
    render(cfg)
    work = build.build_labelling(cfg, rank(), int(os.environ.get("WORLD_SIZE", "1")))
    if cfg.label.dry:
        log.info("%s", work.estimate(cfg.label.probe))
        return
    with counting("labelling", "window", show=tracking.is_main_process()) as show:
        done = work.run(lambda now: show(now.done + now.lost, now.windows, now.brief))
    log.info("%s", done)


def finetune(run: Run, init_from: Path | None = None) -> None:
    """Stage 2, with an evaluation before and after, and a summary."""
    cfg, seed = run.cfg, run.cfg.seed + rank()
    updates = cfg.finetune.updates(cfg.trainer.processes)
    best = run.folder / "finetune" / BEST if cfg.evaluate.keep_best else None
    if run.resumed.finished("finetune", updates):
        if best is not None and not (run.folder / "evaluation.json").exists():
            test_best(run, best)
        return
    init_from = init_from or (Path(cfg.init_from) if cfg.init_from else None)
    if run.resumed.phase == "finetune":
        init_from = None  # its own checkpoint holds all parts
    stage = build.build_collection(cfg, run.folder / "replay", rank())
    module, report = build.build_finetune(cfg, stage.action_dim, init_from)
    if report is not None:
        log.info("from %s: %s", init_from, report)
    play = partial(build.play_episodes, cfg)
    evaluation = EvaluatePolicy(
        play, floors(play, stage.action_dim), cfg.evaluate.seeds, cfg.about, cfg.evaluate.every,
        cfg.env.fps, best,
    )  # fmt: skip
    collect = CollectExperience(stage.collector, cfg.env.frames_per_step, seed)
    extra = [collect, ImaginationRollout(cfg.callbacks.rollout_every), evaluation]
    watch = {"return": "collect/return", "reward": "train/imagined_reward"}
    data = ReplayDataModule(stage.replay, cfg.finetune.batch_size, cfg.finetune.chunk_length, seed)
    fit(run, "finetune", module, data, updates, extra, watch, action_dim=stage.action_dim)
    if best is not None:
        test_best(run, best)
    elif evaluation.newest is not None:
        summary(run, evaluation.newest)


def test_best(run: Run, path: Path) -> None:
    """Play the agent of the best evaluation, on reset seeds that none of them had."""
    log.info("the agent of the best evaluation plays episodes that none of them had")
    test(run, replace(run.cfg, evaluate=run.cfg.evaluate.unseen), path)


def evaluate(run: Run) -> None:
    """Play a trained agent's test episodes."""
    test(run, run.cfg, Path(run.cfg.checkpoint or ""))


def test(run: Run, cfg: RunConfig, path: Path) -> None:
    """Play the test episodes of a checkpoint's agent in an MLflow run of their own."""
    if not tracking.is_main_process():
        return
    module, card = build.load_finetuned(cfg, path)
    module.to(best_device(cfg.trainer.accelerator))
    play = partial(build.play_episodes, cfg)
    episodes, films = play(greedy(module), cfg.evaluate.videos)
    about = cfg.about | {"checkpoint": str(path), "env_frames": card["env_frames"]}
    unlearned = floors(play, card["action_dim"])
    found = Evaluation(Score(tuple(episodes)), unlearned, cfg.evaluate.seeds, about)
    found.save_films(run.folder / "videos", films, cfg.env.fps)
    summary(run, found)
    found.record(tracking.make_logger(cfg.tracking, "evaluate", run.parent), films, cfg.env.fps)


def fit(
    run: Run,
    phase: Literal["pretrain", "finetune"],
    module: TrainedModule,
    data: L.LightningDataModule,
    updates: int,
    extra: list[L.Callback],
    watch: dict[str, str],
    **widths: int,
) -> None:
    """Train one phase in its own MLflow run, from the start or from a checkpoint."""
    cfg = run.cfg
    if run.recorder is not None:
        module.capture(run.recorder)
    earlier = run.resumed.path if run.resumed.phase == phase else None
    if earlier is not None:
        check_fit(module, read_checkpoint(earlier, mapped=True), earlier)
    identity = run.resumed.tracked(phase)
    logger = tracking.make_logger(cfg.tracking, phase, run.parent, run_id=identity)
    module.card = {  # what a checkpoint tells about itself
        "stage": phase,
        "method": cfg.method,
        "config": run.composed.redacted_yaml,
        "mlflow_parent": run.parent or "",
        "mlflow_run": (logger.run_id if logger else None) or "",
        **widths,
    }
    around: list[L.Callback] = [
        MLflowRecorder(
            run.composed.redacted_yaml,
            run.composed.flat,
            every=cfg.trainer.log_every,
            system_metrics=cfg.tracking.system_metrics,
        )
    ]
    if cfg.callbacks.codebook:
        around.append(CodebookUpdate())
    if cfg.callbacks.progress:
        around.append(PhaseProgress(NAMES[phase], watch))
    validate_every = cfg.pretrain.validate_every if phase == "pretrain" else None
    folder = run.folder / phase
    trainer = build_trainer(cfg, updates, folder, around + extra, logger, validate_every)
    trainer.fit(module, datamodule=data, ckpt_path=earlier, weights_only=True)


def summary(run: Run, found: Evaluation) -> None:
    """Print what came out of it, and write it down."""
    found.save(run.folder / "evaluation.json")
    print("", *found.lines(), sep="\n")
    print(f"Everything of this run: {run.folder}")
    if run.cfg.tracking.enabled:
        print("Videos of the dreams, curves and phrases: make ui, then open http://127.0.0.1:5000")


STAGES: dict[str, Callable[[Run], object]] = {
    "label": label,
    "all": train_all,
    "pretrain": pretrain,
    "finetune": finetune,
    "evaluate": evaluate,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
