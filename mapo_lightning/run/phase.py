"""One phase of training in its own MLflow run: its callbacks and loggers, its end, its agent."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import lightning as L
from lightning.pytorch.loggers import Logger

from callbacks.codebook import CodebookUpdate
from callbacks.progress import PhaseProgress
from callbacks.recorder import KEPT, MLflowRecorder, list_kept
from callbacks.resume import Resume
from mapo_lightning.ownership import sign
from mapo_lightning.run import lineage
from mapo_lightning.run.config import RunConfig
from mapo_lightning.run.served import put_agent
from mapo_lightning.run.session import Session, parameters
from mapo_lightning.run.trainer import build_trainer
from mapo_lightning.stopping import Stopped
from mapo_lightning.tracking import logger as tracking
from mapo_lightning.tracking.curves import local_loggers
from mapo_lightning.training.base_module import TrainedModule
from mapo_lightning.training.checkpoint import BEST, read_checkpoint
from mapo_lightning.training.evaluation import Evaluation
from mapo_lightning.training.metadata import signed_part
from mapo_lightning.types import MapoError

NAMES = {
    "tokenizer": "pre-training of the tokenizer",
    "pretrain": "pre-training",
    "finetune": "fine-tuning",
}


class Learned(NamedTuple):
    """What a phase learns from."""

    sources: list[tracking.Source]
    """Its data sets."""
    start: Path | None = None
    """The pre-trained checkpoint that it starts from."""


def fit(
    session: Session,
    phase: str,
    module: TrainedModule,
    data: L.LightningDataModule,
    updates: int,
    extra: list[L.Callback],
    watch: dict[str, str],
    learned: Learned,
    **widths: int,
) -> tracking.RunLogger | None:
    """Train one phase in its own MLflow run, from the start or from a checkpoint.

    Returns:
        Where it was recorded; None without MLflow, and on other ranks.
    """
    cfg = session.cfg
    if session.recorder is not None:
        module.capture(session.recorder)
    earlier = session.resumed.path if session.resumed.phase == phase else None
    loggers = _loggers(session, phase, learned)
    run = tracking.run_logger(loggers)
    metadata = {  # what a checkpoint tells about itself
        "stage": phase,
        "method": cfg.method,
        "config": session.composed.redacted_yaml,
        "mlflow_parent": session.parent or "",
        "mlflow_run": run.active_run if run is not None else "",
        **widths,
    }
    module.metadata = metadata | {"config_signature": sign(signed_part(metadata))}
    callbacks = around(session, phase, watch) + extra
    validate_every = None if phase == "finetune" else cfg.phase(phase).validate_every
    folder = session.folder / phase
    trainer = build_trainer(cfg, updates, folder, callbacks, loggers, validate_every)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=earlier, weights_only=True)
    except (Exception, Stopped) as error:
        if isinstance(error, Stopped):
            error.when = f"{error.when or 'in the middle'} of {NAMES[phase]}"
        elif not isinstance(error, MapoError):
            module.check_finite()  # a simulator, for one, fails at an action that is no number
        raise
    finally:
        module.captured = None  # a graph holds memory of the device, and its module in a circle
    if run is not None:
        session.conclude(run.results())
    return run


def _loggers(session: Session, phase: str, learned: Learned) -> list[Logger]:
    """Where a phase is recorded: its MLflow run, and files."""
    cfg, origin = session.cfg.tracking, None
    if cfg.enabled and tracking.is_main_process() and learned.start is not None:
        origin = lineage.origin_of(learned.start)
    name, tags = session.run_name(phase), origin.tags() if origin else {}
    logger = tracking.make_logger(cfg, name, session.parent, tags, session.tracked(phase))
    run = tracking.run_logger([logger])
    if run is not None:
        session.note(phase, run.active_run)
        run.learn_from(learned.sources, origin.run if origin else "")
    resumed_at = session.resumed.at if session.resumed.phase == phase else None
    files = local_loggers(cfg, session.folder, phase, resumed_at)
    return files if logger is None else [logger, *files]


def around(session: Session, phase: str, watch: dict[str, str]) -> list[L.Callback]:
    """The callbacks that both phases have, in their order."""
    cfg = session.cfg
    callbacks: list[L.Callback] = [
        Resume(),
        MLflowRecorder(
            session.composed.redacted_yaml,
            parameters(session.composed),
            every=cfg.trainer.log_every,
            system_metrics=cfg.tracking.system_metrics,
            git_diff=cfg.tracking.git_diff,
            about=about(session, phase),
        ),
    ]
    if cfg.callbacks.codebook:
        callbacks.append(CodebookUpdate())
    if cfg.callbacks.progress:
        callbacks.append(PhaseProgress(NAMES[phase], watch, _frames_per_update(cfg, phase)))
    return callbacks


def _frames_per_update(cfg: RunConfig, phase: str) -> int:
    """Simulator frames in which a bar counts; 0 where it counts updates."""
    if phase != "finetune":
        return 0
    return cfg.finetune.train_every * cfg.env.frames_per_step * cfg.trainer.processes


def about(session: Session, phase: str) -> dict[str, str]:
    """What MLflow's list of models says about a phase's checkpoints."""
    found = {**session.cfg.about, "stage": phase, "run_dir": session.folder}
    return {name: str(value) for name, value in found.items()}


def end_curves(
    session: Session, phase: str, late: Evaluation | None = None
) -> tracking.RunLogger | None:
    """Deliver what a finished training still had on its way to MLflow when it was killed.

    Args:
        session: The run, resumed.
        phase: The training.
        late: An evaluation that was made since, of its last agent.
    """
    identity = session.resumed.tracked(phase)
    if identity is None:
        return None
    name = session.run_name(phase)
    logger = tracking.make_logger(session.cfg.tracking, name, session.parent, run_id=identity)
    run = tracking.run_logger([logger])
    if run is not None:
        content = read_checkpoint(session.resumed.path, mapped=True)
        if "curves" in content:
            run.resume(content["curves"])
        if late is not None:
            run.log_metrics(late.metrics(), late.about["env_frames"])
        run.finalize()
        for path in (session.folder / phase / f"{name}.ckpt" for name in KEPT):
            if path.is_file():
                list_kept(run, path, about(session, phase))
        session.conclude(run.results())
    return run


def serve(session: Session, run: tracking.RunLogger | None) -> None:
    """Put the agent that fine-tuning has kept into MLflow, as a model that acts."""
    if run is None or not session.cfg.tracking.models:
        return
    folder = session.folder / "finetune"
    best = folder / BEST
    kept = best if session.cfg.evaluate.keep_best and best.is_file() else folder / "last.ckpt"
    model = list_kept(run, kept, about(session, "finetune"))
    if model is not None:
        put_agent(run, model, kept)
