"""Trains MAPO and its baselines.

python train.py                                    the demo: pre-train, fine-tune, evaluate
python train.py env=toy                            a small world that needs no renderer
python train.py stage=pretrain data=folder data.root=DIR
python train.py stage=finetune env=dmc_walker_run init_from=runs/NAME/pretrain/last.ckpt
python train.py --help                             every group, file and field
python train.py ... --show                         print the resolved run and stop
"""

from __future__ import annotations

import logging
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from tqdm import tqdm

import callbacks
from callbacks.codebook import CodebookUpdate
from callbacks.collect import CollectExperience
from callbacks.evaluate import EvaluatePolicy, Score, floors
from callbacks.labels import RecordLabels, label_corpus
from callbacks.progress import PhaseProgress
from callbacks.recorder import MLflowRecorder
from callbacks.rollout import ImaginationRollout
from mapo_lightning import build, tracking
from mapo_lightning.checkpoint import read_checkpoint
from mapo_lightning.compose import Composed, compose
from mapo_lightning.config import RunConfig
from mapo_lightning.datamodule import ReplayDataModule
from mapo_lightning.finetune import ActingPolicy
from mapo_lightning.optimization import TrainedModule
from mapo_lightning.runtime import keep_freed_memory
from mapo_lightning.types import ConfigError, MapoError

HERE = Path(__file__).resolve().parent
log = logging.getLogger("mapo")


class Run(NamedTuple):
    """One start of this program."""

    cfg: RunConfig
    composed: Composed[RunConfig]
    folder: Path
    parent: str | None  # MLflow run that holds those of the phases


def main(argv: list[str]) -> int:
    """Compose the run and play its stages; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        composed = compose(argv, RunConfig, HERE / "conf")
        if composed.text is not None:
            print(composed.text)
            return 0
        return play(start(composed))
    except MapoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def start(composed: Composed[RunConfig]) -> Run:
    """Settle threads, seeds, folder and the MLflow run that holds those of the phases."""
    intruder = Path(callbacks.__file__ or "").resolve().parent
    if intruder != HERE / "callbacks":
        raise ConfigError(
            f"'callbacks' was imported from {intruder}, not from {HERE / 'callbacks'}: another "
            "installed package has the same name; uninstall it"
        )
    cfg = composed.config
    if cfg.trainer.keep_memory:
        keep_freed_memory()
    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    name = f"{cfg.method}-{cfg.env.name}" if cfg.stage != "pretrain" else f"{cfg.method}-videos"
    folder = Path(cfg.run_dir or _run_folder(name)).absolute()
    os.environ["MAPO_RUN_DIR"] = str(folder)  # ranks that this process starts share it
    folder.mkdir(parents=True, exist_ok=True)
    if tracking.is_main_process():
        composed.save(folder / "config.yaml")
    tags = {"method": cfg.method, "stage": cfg.stage, "run_dir": str(folder)}
    return Run(cfg, composed, folder, tracking.start_parent(cfg.tracking, folder.name, tags))


def _run_folder(name: str) -> str:
    """Folder of this run; the same on every rank, whoever starts the ranks."""
    given = os.environ.get("MAPO_RUN_DIR")
    if given:
        return given
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")
    stamp = f"job{job}" if job and job != "none" else time.strftime("%Y%m%d-%H%M%S")
    return f"runs/{stamp}-{name}"


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
    if run.cfg.world_model.lower is not None:
        checkpoint = pretrain(run)
    else:
        log.info("%s learns from scratch: there is nothing to pre-train.", run.cfg.method)
    finetune(run, checkpoint)


def pretrain(run: Run) -> Path:
    """Stage 1; returns the last checkpoint."""
    cfg = run.cfg
    if cfg.data.kind == "demo" and tracking.is_main_process():
        with tqdm(desc="rendering videos", unit="video") as bar:
            build.render_demo(cfg, partial(_show, bar))
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
    _stamp(run, module, "pretrain")
    labels = RecordLabels(cfg.callbacks.phrases)
    extra = [labels, ImaginationRollout(cfg.callbacks.rollout_every)]
    trainer = _trainer(
        run,
        "pretrain",
        cfg.pretrain.updates,
        extra,
        {"image": "train/image"},
        cfg.pretrain.validate_every,
    )
    trainer.fit(module, datamodule=data, ckpt_path=_resume(run, "pretrain"), weights_only=True)
    asked, windows = int(labels.total["asked"]), int(labels.total["windows"])
    log.info(
        "the describer was asked about %d of %d windows; the others were known", asked, windows
    )
    return run.folder / "pretrain" / "last.ckpt"


def finetune(run: Run, init_from: Path | None = None) -> None:
    """Stage 2, with an evaluation before and after, and a summary."""
    cfg = run.cfg
    init_from = init_from or (Path(cfg.init_from) if cfg.init_from else None)
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
    stage = build.build_collection(cfg, run.folder / "replay", rank)
    module, report = build.build_finetune(cfg, stage.action_dim, init_from)
    if report is not None:
        log.info("from %s: %s", init_from, report)
    _stamp(run, module, "finetune", action_dim=stage.action_dim)
    play = partial(build.play_episodes, cfg)
    repeat = cfg.env.frames_per_step
    unlearned = floors(play, stage.action_dim, cfg.evaluate.seed)
    evaluation = EvaluatePolicy(play, unlearned, cfg.evaluate.every, fps=max(5, 50 // repeat))
    extra = [
        CollectExperience(stage.collector, repeat, cfg.seed + rank),
        ImaginationRollout(cfg.callbacks.rollout_every),
        evaluation,
    ]
    ranks = cfg.trainer.devices * cfg.trainer.num_nodes
    updates = cfg.finetune.updates(ranks)
    watch = {"return": "collect/return", "reward": "train/imagined_reward"}
    trainer = _trainer(run, "finetune", updates, extra, watch)
    data = ReplayDataModule(
        stage.replay, cfg.finetune.batch_size, cfg.finetune.chunk_length, cfg.seed + rank
    )
    trainer.fit(module, datamodule=data, ckpt_path=_resume(run, "finetune"), weights_only=True)
    if trainer.is_global_zero and evaluation.score is not None:
        summary(run, evaluation.floors, evaluation.score, module.env_frames or 0)


def evaluate(run: Run) -> None:
    """Play a trained agent's test episodes."""
    cfg = run.cfg
    content = read_checkpoint(Path(cfg.checkpoint or ""))
    action_dim = content["mapo"].get("action_dim")
    if action_dim is None:
        raise ConfigError(
            f"'{cfg.checkpoint}' is a pre-training checkpoint and holds no agent; give one that "
            "stage=finetune made"
        )
    module, _ = build.build_finetune(cfg, action_dim, None)
    build.restore(module, content, Path(cfg.checkpoint or ""))
    play = partial(build.play_episodes, cfg)
    episodes, _ = play(lambda: ActingPolicy(module.world_model, module.agent, explore=False), 0)
    unlearned = floors(play, action_dim, cfg.evaluate.seed)
    summary(run, unlearned, Score(tuple(episodes)), content["mapo"]["env_frames"])


def _trainer(
    run: Run,
    phase: str,
    updates: int,
    extra: list[L.Callback],
    watch: dict[str, str],
    validate_every: int | None = None,
) -> L.Trainer:
    """Trainer of one phase with its MLflow run."""
    cfg = run.cfg
    logger = tracking.make_logger(cfg.tracking, phase, run.parent)
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
        around.append(
            PhaseProgress({"pretrain": "pre-training", "finetune": "fine-tuning"}[phase], watch)
        )
    return build.build_trainer(
        cfg, updates, run.folder / phase, around + extra, logger, validate_every
    )


def _stamp(run: Run, module: TrainedModule, phase: str, **widths: int) -> None:
    """Write down in every checkpoint what it is."""
    module.card = {
        "stage": phase,
        "method": run.cfg.method,
        "config": run.composed.redacted_yaml,
        "mlflow_parent": run.parent or "",
        **widths,
    }


def _resume(run: Run, phase: str) -> str | None:
    """Checkpoint to go on from, if it belongs to this phase."""
    if run.cfg.resume is None:
        return None
    stage = read_checkpoint(Path(run.cfg.resume))["mapo"]["stage"]
    if stage == "finetune":
        raise ConfigError(
            "resume= takes pre-training checkpoints only: the replay of a fine-tuning run is not "
            "saved with its checkpoint yet, and going on without it would unlearn"
        )
    return run.cfg.resume if stage == phase else None


def _show(bar: tqdm[None], done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def summary(run: Run, before: dict[str, Score], after: Score, env_frames: int) -> None:
    """Print what came out of it."""
    cfg = run.cfg
    count = cfg.evaluate.episodes
    print(f"\n{cfg.env.kind}/{cfg.env.name} after {env_frames:,} frames, {count} episodes:")
    for name, score in (before | {cfg.method: after}).items():
        success = "" if score.success is None else f", success {score.success:.0%}"
        print(f"  {name:<12} return {score.mean:8.1f} ± {score.spread:.1f}{success}")
    print(f"Checkpoints: {run.folder}")
    if cfg.tracking.enabled:
        print("Videos of the dreams, curves and phrases: make ui, then open http://127.0.0.1:5000")


STAGES = {"all": train_all, "pretrain": pretrain, "finetune": finetune, "evaluate": evaluate}
STAGES |= {"label": lambda run: label_corpus(run.cfg)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
