"""What a scheduler says about this start: which job, which rank, and whether it began before.

SLURM, torchrun and sweeps start the processes of a job and may start them again; a run then goes on
where it was, with an unchanged command line.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import time

import psutil

from mapo_lightning.stopping import Stopped

log = logging.getLogger(__name__)

AGAIN = "MAPO_RESTART_COUNT"
"""Variable by which a sweep says that it has started a run before."""
LAUNCHER = "MAPO_LAUNCHER"
"""Variable that holds the process id of the sweep that a run belongs to."""
_PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that comes when the parent is gone


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
    """Whether SLURM, torchrun or a sweep has started this job before."""
    names = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", AGAIN)
    return any(int(os.environ.get(name) or "0") > 0 for name in names)


def rank() -> int:
    """Number of this process among all of the job; known before a Trainer counts them."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return int(next((os.environ[name] for name in names if os.environ.get(name)), "0"))


def world_size() -> int:
    """Processes of the job that torchrun or srun have started."""
    names = ("WORLD_SIZE", "SLURM_NTASKS")
    return int(next((os.environ[name] for name in names if os.environ.get(name)), "1"))


def end_with_launcher() -> None:
    """Have this run saved and ended when the sweep that has started it is killed.

    Otherwise it would go on unseen, in a folder where the next start of the sweep begins it again.

    Raises:
        Stopped: The sweep is gone already.
    """
    launcher = os.environ.pop(LAUNCHER, None)  # not for what this process starts itself
    if launcher is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != int(launcher):
        raise Stopped(signal.SIGTERM, "before it began, because its sweep has ended")


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
        # SLURM ends all that belongs to the job, and so perhaps the very command that has asked it.
        taken = done.returncode in (0, -signal.SIGTERM)
        reason = "" if taken else done.stderr.strip() or f"code {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    if reason:
        log.error("SLURM did not take '%s': %s; submit the job again", " ".join(command), reason)
    else:
        log.info("asked SLURM to start job %s again", job)
