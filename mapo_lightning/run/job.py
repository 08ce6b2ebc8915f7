"""What a scheduler says about this start: which job, which rank, and whether it began before.

SLURM and torchrun start the processes of a job and may start them again; a run then goes on where
it was, with an unchanged command line.
"""

from __future__ import annotations

import logging
import os
import subprocess
import time

import psutil

log = logging.getLogger(__name__)


def job_name() -> str | None:
    """Name of the job that this process belongs to: the same on all ranks and after a restart.

    None outside of SLURM and torchrun. Each task of a SLURM array is a job of its own.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    elastic = os.environ.get("TORCHELASTIC_RUN_ID")
    if array and task:
        return f"job{array}_{task}"
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"job{job}"
    if elastic and elastic != "none":
        return f"job{elastic}"
    if elastic:  # torchrun without --rdzv-id: its process outlives those of the ranks
        parent = psutil.Process(os.getppid())
        begun = time.strftime("%Y%m%d-%H%M%S", time.localtime(parent.create_time()))
        return f"{begun}-{parent.pid}"
    return None


def restarted() -> bool:
    """Whether SLURM or torchrun has started this job before."""
    names = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    return any(int(os.environ.get(name) or "0") > 0 for name in names)


def rank() -> int:
    """Number of this process among all of the job; known before a Trainer counts them."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return int(next((os.environ[name] for name in names if os.environ.get(name)), "0"))


def world_size() -> int:
    """Processes of the job that torchrun or srun have started."""
    names = ("WORLD_SIZE", "SLURM_NTASKS")
    return int(next((os.environ[name] for name in names if os.environ.get(name)), "1"))


def requeue() -> None:
    """Ask SLURM to start this job again; a failure is logged."""
    job = os.environ.get("SLURM_JOB_ID")
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else job
    if job is None:
        log.error("trainer.requeue=true, but this is no job of SLURM: nothing starts it again")
        return
    command = ["scontrol", "requeue", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        reason = "" if done.returncode == 0 else done.stderr.strip() or f"code {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    if reason:
        log.error("SLURM did not take '%s': %s; submit the job again", " ".join(command), reason)
    else:
        log.info("asked SLURM to start job %s again", job)
