"""Runs the tasks of a sweep as arrays of SLURM, through submitit: the only file that imports it."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mapo_lightning.files import atomic_write
from mapo_lightning.run.config import RunConfig
from mapo_lightning.run.sweep.tasks import Task, become, import_path
from mapo_lightning.stopping import Stopped
from mapo_lightning.types import ConfigError

if TYPE_CHECKING:
    import submitit

log = logging.getLogger("mapo")

_JOBS = "jobs.json"  # task -> number of its SLURM job, for a start that finds them running
_FOLDER = "slurm"  # scripts and pickles of submitit, in the folder of the sweep
_FIRST, _SLOWEST, _SLOWER = 1.0, 30.0, 1.3  # seconds between two looks at the jobs


def check_slurm() -> None:
    """See that jobs can be submitted from here.

    Raises:
        ConfigError: submitit or a command of SLURM is missing.
    """
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "launch=slurm needs submitit, which is not installed: pip install "
            "'mapo-lightning[slurm]'"
        ) from error
    missing = [name for name in ("sbatch", "srun", "sacct") if shutil.which(name) is None]
    if missing:
        raise ConfigError(
            f"launch=slurm needs SLURM's commands, and this machine does not have "
            f"{', '.join(missing)}: type the command on a login node, or use launch=local"
        )
    asked = subprocess.run(["sacct", "-n", "-j", "1"], capture_output=True, text=True, check=False)
    if asked.returncode:
        raise ConfigError(
            f"launch=slurm asks sacct what became of its jobs, and it answers: "
            f"{' '.join(asked.stderr.split()) or asked.returncode}; write an array of your own "
            "(docs/cluster.md), or use launch=local"
        )


def run_slurm(tasks: Sequence[Task], cfg: RunConfig, folder: Path) -> dict[str, str]:
    """Submit the tasks that are neither finished nor in the queue, and wait for all of them.

    The pre-trainings that points share are an array of their own, for whose end the array of the
    points waits.

    Args:
        tasks: Each after the one that it needs.
        cfg: Of any point.
        folder: Of the sweep.

    Returns:
        Name -> why it failed, for those that did.

    Raises:
        ConfigError: SLURM takes no jobs.
        Stopped: This process was told to stop; the jobs go on.
    """
    check_slurm()
    missing = [task for task in tasks if not task.finished]
    jobs = _queued(missing, folder)
    if jobs:
        log.info("%d runs are in the queue already", len(jobs))
    logged = {task.name: task.log_size() for task in missing}
    first = [task for task in missing if _is_needed(task, missing)]
    points = [task for task in missing if task not in first]
    try:
        jobs |= _submit([t for t in first if t.name not in jobs], cfg, folder, [])
        before = sorted({jobs[task.name].partition("_")[0] for task in first})
        jobs |= _submit([t for t in points if t.name not in jobs], cfg, folder, before)
        return _watched(missing, jobs, folder, logged)
    except Stopped as stopped:
        numbers = " ".join(sorted({job.partition("_")[0] for job in jobs.values()}))
        stopped.when = stopped.when or "while it waited for its jobs"
        stopped.advice = (
            f"they go on: resume={folder} waits for them again, and 'scancel {numbers}' ends them"
        )
        raise


def _is_needed(task: Task, tasks: Sequence[Task]) -> bool:
    return any(other.needs == task for other in tasks)


def _queued(tasks: Sequence[Task], folder: Path) -> dict[str, str]:
    """Jobs of an earlier start that have not ended, by task."""
    import submitit

    path = folder / _JOBS
    noted: Mapping[str, str] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    wanted = {task.name: noted[task.name] for task in tasks if task.name in noted}
    found = {name: submitit.SlurmJob[Any](folder / _FOLDER, job) for name, job in wanted.items()}
    return {
        name: job.job_id
        for name, job in found.items()
        if _state(job) != "UNKNOWN" and not job.watcher.is_done(job.job_id, mode="cache")
    }


def _state(job: submitit.Job[Any]) -> str:
    return str(job.watcher.get_state(job.job_id, mode="force")).split(" ")[0]


def _submit(
    tasks: Sequence[Task], cfg: RunConfig, folder: Path, before: Sequence[str]
) -> dict[str, str]:
    """Submit tasks as one array that begins when the jobs ``before`` have ended; note its jobs."""
    if not tasks:
        return {}
    import submitit

    executor = submitit.AutoExecutor(folder / _FOLDER, cluster="slurm")
    executor.update_parameters(**parameters(cfg, f"mapo-{folder.name}", before))
    # The run itself asks to be queued again, and leaves submitit out of it.
    words = [[*task.words, "trainer.requeue=true"] for task in tasks]
    places = [str(task.folder) for task in tasks]
    needs = [str(task.needs.folder) if task.needs else "" for task in tasks]
    with _in_one_sentence():
        jobs = executor.map_array(become, words, places, needs)
    numbers = {task.name: str(job.job_id) for task, job in zip(tasks, jobs, strict=True)}
    path = folder / _JOBS
    noted = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    with atomic_write(path) as draft:
        draft.write_text(json.dumps(noted | numbers, indent=1), encoding="utf-8")
    log.info("submitted job %s (tasks: %d)", jobs[0].job_id.partition("_")[0], len(tasks))
    return numbers


@contextmanager
def _in_one_sentence() -> Iterator[None]:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        yield
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        reason = " ".join(str(error).split())[-300:]
        raise ConfigError(
            f"SLURM does not take the jobs of the sweep: {reason}; see --help launch.slurm for "
            "what they ask for"
        ) from error


def parameters(cfg: RunConfig, name: str, before: Sequence[str] = ()) -> dict[str, Any]:
    """What submitit is told about each task of the array.

    Args:
        cfg: Of any point.
        name: Of the job.
        before: Numbers of jobs that have to end first.
    """
    slurm, trainer = cfg.launch.slurm, cfg.trainer
    gpus = slurm.gpus_per_node
    if gpus is None:
        gpus = trainer.devices if trainer.accelerator in ("gpu", "cuda") else 0
    setup = list(slurm.setup)
    if path := import_path(os.environ):
        setup.append(f"export PYTHONPATH={shlex.quote(path)}")
    return {
        "name": name,
        "timeout_min": slurm.time,
        "mem_gb": slurm.mem_gb,
        "cpus_per_task": slurm.cpus_per_task,
        "gpus_per_node": gpus or None,
        "nodes": trainer.num_nodes,
        "tasks_per_node": trainer.devices,
        "stderr_to_stdout": True,
        "slurm_partition": slurm.partition or None,
        "slurm_array_parallelism": slurm.array_parallelism,
        "slurm_signal_delay_s": slurm.warning,
        "slurm_setup": setup,
        "slurm_dependency": f"afterany:{':'.join(before)}" if before else None,
        "slurm_additional_parameters": {"requeue": True, **slurm.additional},
    }


def _watched(
    tasks: Sequence[Task], jobs: Mapping[str, str], folder: Path, logged: Mapping[str, int]
) -> dict[str, str]:
    """Wait until every job has ended; returns the failures."""
    import submitit

    left = {task.name: task for task in tasks}
    handles = {name: submitit.SlurmJob[Any](folder / _FOLDER, jobs[name]) for name in left}
    failed: dict[str, str] = {}
    pause = _FIRST
    while left:
        time.sleep(pause)
        pause = min(_SLOWEST, pause * _SLOWER)
        for name, task in list(left.items()):
            if task.finished:
                log.info("finished %s", name)
                del left[name]
        for name, task in list(left.items()):
            job = handles[name]
            mode = "force" if name == next(iter(left)) else "cache"  # one question for all jobs
            if not job.watcher.is_done(job.job_id, mode=mode) or task.finished:
                continue
            told = task.complaint(logged[name])
            failed[name] = told or f"SLURM's job {job.job_id} ended as {_state(job)}"
            log.error("failed %s: %s (%s)", name, failed[name], task.log)
            del left[name]
    return failed
