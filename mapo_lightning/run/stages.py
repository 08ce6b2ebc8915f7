"""The stages of a run, as functions of its session: pre-train, fine-tune, label, evaluate."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lightning as L

from callbacks.collect import CollectExperience
from callbacks.evaluate import EvaluatePolicy
from callbacks.label_report import LabelReport
from callbacks.rollout import ImaginationRollout
from callbacks.told import ToldUntold, save_report
from mapo_lightning.envs.demo import render_demo_videos
from mapo_lightning.envs.experts import SENTENCES
from mapo_lightning.envs.replacement import close_vector_env
from mapo_lightning.run import build, job, lineage
from mapo_lightning.run.config import RunConfig
from mapo_lightning.run.decisions import judge_decisions, sentence
from mapo_lightning.run.episode_player import EpisodePlayer
from mapo_lightning.run.judged_agent import judge_episodes
from mapo_lightning.run.phase import Learned, end_curves, fit, serve
from mapo_lightning.run.session import Session
from mapo_lightning.run.trainer import best_device
from mapo_lightning.tracking import logger as tracking
from mapo_lightning.training.acting import greedy
from mapo_lightning.training.checkpoint import BEST, read_checkpoint, write_checkpoint
from mapo_lightning.training.evaluation import Evaluation, Score, baseline_scores
from mapo_lightning.training.ranks import seed_of_rank
from mapo_lightning.waiting import counting

WATCHED = {
    "tokenizer": {"loss": "train/future"},
    "pretrain": {"loss": "train/tokens"},
    "finetune": {"return": "collect/return", "reward": "train/imagined_reward"},
}
"""What the progress bar of a phase shows; the first two are iVideoGPT's."""
log = logging.getLogger("mapo")

_CHOOSES = 6  # episodes from which on the best evaluation says something about the agent


def train_all(session: Session) -> None:
    """Pre-train where the method does, fine-tune from it, and sum up."""
    checkpoint = None
    if session.resumed.phase == "finetune":
        log.info("pre-training was finished before; fine-tuning continues")
    elif session.cfg.pretraining:
        checkpoint = pretrain(session)
    else:
        log.info("%s learns from scratch: there is nothing to pre-train.", session.cfg.method)
    finetune(session, checkpoint)


def pretrain(session: Session) -> Path:
    """Stage 1, phase by phase; returns the last checkpoint."""
    phases, resumed = session.cfg.pretraining, session.resumed
    checkpoint = None
    for phase in phases[phases.index(resumed.phase) :] if resumed.phase in phases else phases:
        checkpoint = learn_videos(session, phase, checkpoint)
    assert checkpoint is not None
    return checkpoint


def learn_videos(session: Session, phase: str, start: Path | None) -> Path:
    """One phase of learning from videos; returns its last checkpoint.

    Args:
        session: Of the run.
        phase: One of ``cfg.pretraining``.
        start: Last checkpoint of the phase before, whose parts are taken over.
    """
    cfg, updates = session.cfg, session.cfg.phase(phase).updates
    if session.resumed.finished(phase, updates):
        end_curves(session, phase)
        return session.resumed.path
    render_demo(cfg)
    seed_phase(cfg)
    data = build.build_videos(cfg, phase)
    data.setup("fit")
    assert data.index is not None
    log.info(
        "videos: %d to learn from, %d held out, %d set aside (%s)",
        len(data.index.train),
        len(data.index.holdout),
        len(data.index.quarantined),
        data.root / "quarantine.jsonl",
    )
    module = build.build_pretrain(cfg, phase)
    if start is not None:
        log.info("from %s: %s", start, build.hand_over(module.world_model, start, ["tokenizer"]))
    watch = WATCHED[phase] if cfg.tokens else {"image": "train/image"}
    every, last = cfg.callbacks.rollout_every, session.folder / phase / "last.ckpt"
    learned = Learned(lineage.videos_of(cfg, data, phase), start)
    if phase == "tokenizer":  # no labels, no dreams
        drawn: list[L.Callback] = [ImaginationRollout(every, name="reconstruction")]
        fit(session, phase, module, data, updates, drawn, watch, learned)
        return last
    labels = LabelReport(cfg.callbacks)
    extra: list[L.Callback] = [labels, ImaginationRollout(every)]
    told = ToldUntold(cfg.callbacks.told) if cfg.reads_phrases else None
    if told is not None:
        extra.append(told)
    fit(session, phase, module, data, updates, extra, watch, learned)
    log.info("%s", labels)
    if told is not None and told.report is not None:
        save_report(told.report, session.folder / phase)
        log.info("%s", told.report.sentence())
        session.conclude({}, told.report.sentence())
    return last


def seed_phase(cfg: RunConfig) -> None:
    """Begin a phase with the same random numbers, whatever came before it.

    So a run that goes on from the last checkpoint of the phase before equals one that never
    stopped, and stage=pretrain with stage=finetune after it equals stage=all.
    """
    L.seed_everything(cfg.seed, workers=True, verbose=False)


def render_demo(cfg: RunConfig) -> None:
    """Render the videos that are rendered here; every rank waits until they are there."""
    if cfg.data.kind not in build.RENDERED:
        return
    if cfg.data.kind == "metaworld_experts" and tracking.is_main_process():
        tasks = ", ".join(build.left_out(cfg) or ()) or "none: data.leave_out=[TASK] leaves one out"
        log.info("tasks whose films are left out: %s", tasks)
    with counting("rendering videos", "video", show=tracking.is_main_process()) as show:
        render_demo_videos(
            Path(cfg.data.root),
            build.demo_scenes(cfg),
            clips_per_scene=cfg.demo.clips_per_scene,
            frames=cfg.demo.frames,
            fps=cfg.demo.fps,
            size=cfg.demo.size,
            seed=cfg.data.seed,
            scenery=cfg.demo.scenery,
            noise=cfg.demo.noise,
            sentences=SENTENCES if cfg.data.kind == "metaworld_experts" else None,
            progress=show,
        )


def label(session: Session) -> None:
    """Fill the label store with every window of the videos; or only count them."""
    cfg = session.cfg
    render_demo(cfg)
    work = build.build_labelling(cfg, session.rank, job.world_size())
    if cfg.label.dry:
        log.info("%s", work.estimate(cfg.label.probe))
        return
    with counting("labelling", "window", show=tracking.is_main_process()) as show:
        done = work.run(lambda now: show(now.done + now.lost, now.windows, now.brief))
    log.info("%s", done)


def _caution(cfg: RunConfig) -> None:
    """Say what a fine-tuning with these settings may not be meant to do."""
    if cfg.vlm.kind == "templates":
        log.warning(
            "vlm=templates has no sentences about an environment: every label in fine-tuning is "
            "null. To have environments described, pre-train first, and then fine-tune with "
            "stage=finetune init_from=CHECKPOINT and another describer, such as vlm=flow"
        )
    if cfg.evaluate.keep_best and cfg.evaluate.episodes < _CHOOSES:
        log.warning(
            "evaluate.keep_best keeps the agent with the best mean return, and means of "
            "evaluate.episodes=%d are mostly luck; take %d or more",
            cfg.evaluate.episodes,
            _CHOOSES,
        )


def finetune(session: Session, init_from: Path | None = None) -> None:
    """Stage 2, with an evaluation before and after, and a summary."""
    cfg, seed = session.cfg, seed_of_rank(session.cfg.seed, session.rank)
    _caution(cfg)
    updates = cfg.finetune.updates(cfg.trainer.processes)
    best = session.folder / "finetune" / BEST if cfg.evaluate.keep_best else None
    if session.resumed.finished("finetune", updates):
        return _end(session, best)
    init_from = init_from or (Path(cfg.init_from) if cfg.init_from else None)
    if session.resumed.phase == "finetune":
        init_from = None  # its own checkpoint holds all parts
    seed_phase(cfg)
    stage = build.build_collection(cfg, session.folder / "replay", session.rank)
    module, report = build.build_finetune(cfg, stage.action_dim, init_from)
    if report is not None:
        log.info("from %s: %s", init_from, report)
    assert stage.collector.spare is not None
    show, frames = cfg.callbacks.progress, cfg.env.frames_per_step
    learned = Learned(lineage.task_of(cfg, session.folder / "replay"), init_from)
    with EpisodePlayer(cfg, stage.collector.spare[1]) as play:
        evaluation = EvaluatePolicy(
            play, baseline_scores(play, stage.action_dim), cfg.evaluate, cfg.about, cfg.env.fps,
            best,
        )  # fmt: skip
        collect = CollectExperience(stage.collector, frames, seed, show)
        extra = [collect, ImaginationRollout(cfg.callbacks.rollout_every), evaluation]
        try:
            data = build.build_chunks(cfg, stage.replay, seed)
            logger = fit(
                session, "finetune", module, data, updates, extra, WATCHED["finetune"], learned,
                action_dim=stage.action_dim,
            )  # fmt: skip
        except BaseException:
            close_vector_env(stage.collector.envs)  # Lightning tears down after success only
            raise
        if best is not None:
            test_best(session, best, play)
        elif evaluation.newest is not None:
            summary(session, evaluation.newest)
    serve(session, logger)


def _end(session: Session, best: Path | None) -> None:
    """What is left of a fine-tuning that was stopped after its last update."""
    done = (session.folder / "evaluation.json").exists()
    late = None if done or best is None else _made_up(session, best)
    logger = end_curves(session, "finetune", late)
    if not done:  # stopped in its last episodes
        play = EpisodePlayer(session.cfg)
        if best is not None:
            test_best(session, best, play)
        else:
            test(session, session.cfg, session.resumed.path, play, dreams=False)
    serve(session, logger)


def _made_up(session: Session, best: Path) -> Evaluation | None:
    """Make up for the evaluation of the last agent, if it was broken off, and keep the better one.

    So it is where no agent was kept. None: there is nothing to make up for.
    """
    if not tracking.is_main_process():
        return None
    cfg, content = session.cfg, read_checkpoint(session.resumed.path)
    state = content["callbacks"][EvaluatePolicy.__qualname__]
    if best.is_file() and not state.get("broken_off"):
        return None
    log.info("playing the test episodes of the last agent, which were broken off")
    module, metadata = build.load_finetuned(cfg, session.resumed.path)
    module.to(best_device(cfg.trainer.accelerator))
    with EpisodePlayer(cfg) as play:
        score = Score(tuple(play(greedy(module), 0)[0]))
    about = cfg.about | {"env_frames": metadata["env_frames"], "updates": session.resumed.updates}
    if not best.is_file() or not score.mean <= state["best_return"]:
        state |= {"best_return": score.mean, "broken_off": False}
        write_checkpoint(content, best)
    return Evaluation(score, {}, cfg.evaluate.seeds, about)


def test_best(session: Session, path: Path, play: EpisodePlayer) -> None:
    """Play the agent of the best evaluation, on reset seeds that none of them had."""
    log.info("evaluating the best agent on reset seeds that no evaluation has used")
    unseen = replace(session.cfg, evaluate=session.cfg.evaluate.unseen)
    test(session, unseen, path, play, dreams=False)


def evaluate(session: Session) -> None:
    """Play a trained agent's test episodes, and judge its model's dreams if asked to."""
    cfg = session.cfg
    path, dreams = Path(cfg.checkpoint or ""), cfg.evaluate.dreams > 0
    test(session, cfg, path, EpisodePlayer(cfg), dreams=dreams)


def test(
    session: Session, cfg: RunConfig, path: Path, play: EpisodePlayer, *, dreams: bool
) -> None:
    """Play the test episodes of a checkpoint's agent in an MLflow run of their own.

    Args:
        session: Of the run.
        cfg: Its settings; ``evaluate.seeds`` may be others than those of ``play``.
        path: The checkpoint.
        play: Plays the episodes and closes its environments.
        dreams: Judge the model's dreams as well.
    """
    if not tracking.is_main_process():
        return
    module, metadata = build.load_finetuned(cfg, path)
    module.to(best_device(cfg.trainer.accelerator))
    # First, because it refuses what it cannot judge at once.
    dream = judge_decisions(cfg, module) if cfg.evaluate.decisions else {}
    with play:
        play.seeds = cfg.evaluate.seeds
        episodes, films = play(greedy(module), cfg.evaluate.videos)
        baselines = baseline_scores(play, metadata["action_dim"])
    about = cfg.about | {"checkpoint": str(path), "env_frames": metadata["env_frames"]}
    found = Evaluation(Score(tuple(episodes)), baselines, cfg.evaluate.seeds, about, dream)
    found.save_films(session.folder / "videos", films, cfg.env.fps)
    judged = None
    if dreams:
        title = f"Dreams of '{path}' ({cfg.method}), led by the robot's actions"
        judged = judge_episodes(cfg, module, metadata["action_dim"], title)
        judged.save(session.folder)
        log.info("%s", judged.sentence())
    summary(session, found)
    name = session.run_name("evaluate")
    logger = tracking.make_logger(cfg.tracking, name, session.parent)
    if judged is not None:
        judged.record(logger, metadata["env_frames"])
    found.record(logger, films, cfg.env.fps)


def summary(session: Session, found: Evaluation) -> None:
    """Print what came out of it, and write it down."""
    found.save(session.folder / "evaluation.json")
    played, *scores = found.lines()
    # What MLflow shows of a description at first is a few lines.
    session.conclude(found.metrics(), f"{played} {scores[-1].strip()}")
    dream = [sentence(found.dream)] if found.dream else []
    lines = ["", played, *scores, *dream, f"Everything of this run: {session.folder}"]
    page = tracking.where_to_look(session.cfg.tracking)
    if page is not None:
        lines.append(f"Videos, curves and phrases: {page}")
    sys.stdout.write("\n".join(lines) + "\n")


STAGES: dict[str, Callable[[Session], object]] = {
    "label": label,
    "all": train_all,
    "pretrain": pretrain,
    "finetune": finetune,
    "evaluate": evaluate,
}
