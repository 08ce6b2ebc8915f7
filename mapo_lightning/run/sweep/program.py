"""``mapo-train`` with words that have several values: one run for each, and a table at the end."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mapo_lightning.config.command_line import CommandLine
from mapo_lightning.files import FileLock
from mapo_lightning.run import job
from mapo_lightning.run.sweep import table
from mapo_lightning.run.sweep.local import places, run_local
from mapo_lightning.run.sweep.plan import Sweep, save
from mapo_lightning.run.sweep.sharing import shared
from mapo_lightning.run.sweep.slurm import check_slurm, run_slurm
from mapo_lightning.run.sweep.tasks import Task, tasks_of
from mapo_lightning.stopping import REQUEUE, Stopped
from mapo_lightning.tracking import artifacts
from mapo_lightning.tracking import logger as tracking
from mapo_lightning.types import ConfigError, MapoError

log = logging.getLogger("mapo")

_LOCK = ".lock"


def run_sweep(sweep: Sweep, words: Sequence[str]) -> None:
    """Do what the words of a sweep ask for.

    Raises:
        MapoError: It cannot be begun, or some of its runs failed.
        Stopped: It was told to stop.
    """
    if job.world_size() > 1:
        raise ConfigError(
            f"a sweep is one process, which starts those of its runs, and this is one of "
            f"{job.world_size()}: start it without srun or torchrun"
        )
    if CommandLine.parse(words).preflight:
        sys.stdout.write(_preflight(sweep))
        return
    cfg = sweep.config
    slurm = cfg.launch.kind == "slurm"
    check_slurm() if slurm else places(cfg)
    tracking.check_store(cfg.tracking)
    from mapo_lightning.run.session import run_folder

    keys = "-".join(key.rpartition(".")[2] for key in sweep.keys)
    folder = run_folder(f"sweep-{keys}", sweep.folder_given)
    with _held(folder) as lock:
        save(sweep, folder)
        try:
            failed = _run(sweep, folder, lock)
        except Stopped as stopped:
            stopped.when = stopped.when or "in the middle of the sweep"
            stopped.advice = stopped.advice or f"resume={folder} goes on"
            if cfg.trainer.requeue and stopped.code == REQUEUE and not slurm:
                job.requeue()
            raise
    if failed:
        named = "; ".join(f"{name}: {why}" for name, why in failed.items())
        count, them = ("1 run", "it") if len(failed) == 1 else (f"{len(failed)} runs", "them")
        raise MapoError(
            f"{count} of the sweep failed ({named}); resume={folder} tries {them} again"
        )


@contextmanager
def _held(folder: Path) -> Iterator[FileLock]:
    """The sweep's lock: two starts at once would begin the same runs twice.

    Raises:
        ConfigError: The folder cannot be written.
    """
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire()
    except OSError as error:
        raise ConfigError(
            f"cannot write the sweep's folder '{folder}' ({error.strerror}); give another with "
            "run_dir=DIR"
        ) from error
    try:
        yield lock
    finally:
        lock.release()


def _run(sweep: Sweep, folder: Path, lock: FileLock) -> dict[str, str]:
    """Run what is missing, in one MLflow run, and sum up; returns the failures."""
    from mapo_lightning.run.session import note, noted

    cfg = sweep.config
    tags = {"run_dir": str(folder), "sweep": " ".join(sweep.keys)}
    parent = tracking.start_parent(
        cfg.tracking, folder.name, tags, noted(folder, True).get("parent")
    )
    status: tracking.Status = "FAILED"
    try:
        if parent is not None:
            note(folder, "parent", parent)
        tasks = tasks_of(sweep, folder, parent)
        _announce(sweep, tasks, folder)
        if cfg.launch.kind == "slurm":
            failed = run_slurm(tasks, cfg, folder)
        else:
            failed = run_local(tasks, places(cfg), lock)
        _sum_up(sweep, folder, parent)
        status = "FAILED" if failed else "FINISHED"
        return failed
    except Stopped:
        status = "KILLED"
        raise
    finally:
        tracking.finish_parent(parent, status, cfg.tracking)


def _announce(sweep: Sweep, tasks: Sequence[Task], folder: Path) -> None:
    left = [task for task in tasks if not task.finished]
    common = len(tasks) - len(sweep.points)
    log.info("%s, in %s", sweep.about(), folder)
    if common:
        log.info("pre-training that several of them share is done once: %d more runs", common)
    if len(left) < len(tasks):
        log.info("%d of %d are finished", len(tasks) - len(left), len(tasks))


def _sum_up(sweep: Sweep, folder: Path, parent: str | None) -> None:
    """Print the table, write it down, and record it."""
    rows = table.rows_of(sweep, folder)
    files = table.save(rows, folder)
    sys.stdout.write(f"\n{table.as_markdown(rows)}\nEverything of this sweep: {folder}\n")
    if any("return" in row.figures for row in rows):
        sys.stdout.write(f"Figures, comparisons, a page: mapo-report {folder}\n")
    page = tracking.where_to_look(sweep.config.tracking)
    if page is not None:
        sys.stdout.write(f"Its runs in MLflow: {page}\n")
    if parent is None:
        return
    logger = tracking.RunLogger(sweep.config.tracking, folder.name, parent)
    logger.log_metrics(table.metrics(rows), 0)
    for path in files:
        artifacts.log_file(logger, path)
    logger.flush()
    logger.finalize()


def _preflight(sweep: Sweep) -> str:
    """Measure one point of each setting: seeds cost the same.

    Raises:
        MapoError: One of them cannot be made.
    """
    from mapo_lightning.run.estimate import preflight
    from mapo_lightning.run.preflight import check_run

    lines = [f"{sweep.about()}, of which one of each setting is measured"]
    common = shared(sweep.points)
    for points in sweep.settings().values():
        check_run(points[0].composed.config)
        lines += ["", f"{points[0].name}, one of {len(points)}:"]
        lines.append(preflight(points[0].composed.config).rstrip("\n"))
    if common:
        lines += [
            "",
            f"{len(common)} runs share {len(set(common.values()))} pre-trainings, each of which is "
            "done once: count its hours once",
        ]
    return "\n".join(lines) + "\n"
