"""Runs the tasks of a sweep on this machine, some side by side, each in a process of its own."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import torch

from mapo_lightning.files import FileLock
from mapo_lightning.run import job
from mapo_lightning.run.config import RunConfig
from mapo_lightning.run.sweep.tasks import LOCK, Task, command, environment
from mapo_lightning.run.trainer import best_device
from mapo_lightning.stopping import Stopped
from mapo_lightning.types import ConfigError

log = logging.getLogger("mapo")

_GLANCE = 0.1  # seconds between two looks at the processes
_LAST_WAIT = 60.0  # seconds that runs may take to save once they were told to stop


class Place(NamedTuple):
    """What a run has for itself."""

    gpus: str
    """Value of CUDA_VISIBLE_DEVICES; empty: what this process sees."""
    threads: int
    """Of the processor; 0: what the run chooses."""


def places(cfg: RunConfig) -> list[Place]:
    """Where runs can be made side by side.

    Args:
        cfg: Of any point.

    Raises:
        ConfigError: There are not enough GPUs, or a run wants several machines.
    """
    if cfg.trainer.num_nodes > 1:
        raise ConfigError(
            f"launch=local starts runs on this machine, and trainer.num_nodes="
            f"{cfg.trainer.num_nodes}: use launch=slurm"
        )
    gpus = _gpus(cfg)
    count = cfg.launch.jobs or max(1, len(gpus))
    if gpus and count > len(gpus):
        raise ConfigError(
            f"launch.jobs={count} runs side by side need trainer.devices={cfg.trainer.devices} "
            f"GPUs each, which is enough for {len(gpus)}: set launch.jobs={len(gpus)}, or "
            "trainer=cpu"
        )
    cores = len(os.sched_getaffinity(0))
    threads = 0 if cfg.trainer.threads or count == 1 else max(1, cores // count)
    return [Place(gpus[number] if gpus else "", threads) for number in range(count)]


def _gpus(cfg: RunConfig) -> list[str]:
    """Disjoint sets of GPUs, each enough for a run; none where the runs use the processor.

    Raises:
        ConfigError: There are GPUs, and not enough for one run.
    """
    if best_device(cfg.trainer.accelerator).type != "cuda":
        return []
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in seen.split(",") if name.strip()]
    names = names or [str(number) for number in range(torch.cuda.device_count())]
    each = cfg.trainer.devices
    if len(names) < each:
        raise ConfigError(f"trainer.devices={each}, but this process sees {len(names)} GPUs")
    return [",".join(names[at : at + each]) for at in range(0, len(names) - each + 1, each)]


class _Running(NamedTuple):
    task: Task
    process: subprocess.Popen[bytes]
    place: Place
    logged: int
    """Bytes of the log before the run began."""


def run_local(tasks: Sequence[Task], free: list[Place], lock: FileLock) -> dict[str, str]:
    """Run all tasks that are not finished.

    Args:
        tasks: Each after the one that it needs.
        free: A place for each run at a time.
        lock: Of the sweep, held; the runs hold it too, so that no other start begins them again
            while they still save.

    Returns:
        Name -> why it failed, for those that did.

    Raises:
        Stopped: This process was told to stop; the runs have saved and ended.
    """
    waiting = [task for task in tasks if not task.finished]
    running: list[_Running] = []
    failed: dict[str, str] = {}
    total = len(waiting)
    try:
        while waiting or running:
            for task in _ready(waiting, failed):
                if not free:
                    break
                waiting.remove(task)
                log.info("starts %s (%d of %d)", task.name, total - len(waiting), total)
                one = _start(task, free[0], lock)
                if one is None:
                    failed[task.name] = "another process runs it, such as a job of SLURM"
                    continue
                running.append(one)
                free.remove(one.place)
            time.sleep(_GLANCE)
            for one in [r for r in running if r.process.poll() is not None]:
                running.remove(one)
                free.append(one.place)
                _note_end(one, failed)
    except BaseException as error:  # no run goes on without its sweep
        _end(running, error.signal if isinstance(error, Stopped) else signal.SIGTERM)
        raise
    return failed


def _ready(waiting: list[Task], failed: dict[str, str]) -> list[Task]:
    """Tasks that can be started; those whose pre-training failed are taken out as failed."""
    for task in list(waiting):
        if task.needs is not None and task.needs.name in failed:
            waiting.remove(task)
            failed[task.name] = f"its pre-training {task.needs.name} failed"
    return [task for task in waiting if task.needs is None or task.needs.finished]


def _start(task: Task, place: Place, lock: FileLock) -> _Running | None:
    """Start a run; None where another process is at it."""
    variables = environment(task.folder, os.environ) | {job.LAUNCHER: str(os.getpid())}
    if place.gpus:
        variables["CUDA_VISIBLE_DEVICES"] = place.gpus
    if place.threads:
        variables.setdefault("OMP_NUM_THREADS", str(place.threads))
    own = FileLock(task.folder / LOCK)
    if not own.acquire(wait=False):
        return None
    logged = task.log_size()
    with task.log.open("ab") as said:
        # A session of its own: Ctrl-C at a terminal reaches the sweep only, which passes it on.
        process = subprocess.Popen(
            command(task, "trainer.requeue=false"), env=variables, stdin=subprocess.DEVNULL,
            stdout=said, stderr=said, start_new_session=True,
            pass_fds=[lock.fileno(), own.fileno()],
        )  # fmt: skip
    own.release()  # the run has it now
    return _Running(task, process, place, logged)


def _note_end(one: _Running, failed: dict[str, str]) -> None:
    task, code = one.task, one.process.returncode
    if code == 0 and task.finished:
        log.info("finished %s", task.name)
        return
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    failed[task.name] = task.complaint(one.logged) or ended
    log.error("failed %s: %s (%s)", task.name, failed[task.name], task.log)


def _end(running: Sequence[_Running], number: int) -> None:
    """Tell runs to save and stop, and wait for that; kill what does not end."""

    def tell(how: int) -> None:
        for one in running:
            with suppress(ProcessLookupError):
                one.process.send_signal(how)

    if running:
        log.info("stops %d runs, which save first", len(running))
    tell(number)
    deadline = time.monotonic() + _LAST_WAIT
    while any(one.process.poll() is None for one in running) and time.monotonic() < deadline:
        try:
            time.sleep(_GLANCE)
        except Stopped:  # a second request: at once
            tell(number)
    for one in running:
        if one.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()
