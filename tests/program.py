"""Runs train.py, and scripts around it, as a user does: in a process of its own.

To import torch, Lightning and MLflow takes ten seconds, which is longer than most trainings of the
tests. So one process of a test session imports them, and becomes each program by forking: the
program has its own session, folder, environment and output, ends as the interpreter ends, and
differs from one that was typed only in what is imported already. What starts through -m or -c, and
what a program itself starts (the other processes of DDP, a job of SLURM), imports everything.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]
TRAIN = str(ROOT / "train.py")
TOLD = str(ROOT / "mapo_lightning" / "told.py")
DREAMS = str(ROOT / "mapo_lightning" / "dreams.py")
PLAY = str(ROOT / "mapo_lightning" / "play.py")
EXPORT = str(ROOT / "mapo_lightning" / "export.py")
PATIENCE = 900  # seconds after which a program counts as hanging, on a busy machine too
SMALL = ["trainer=debug", "env=toy", "world_model.image.channels=[4]", "demo.clips_per_scene=8"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# The folder of a run that another test started in this process.
ENVIRONMENT.pop("MAPO_RUN_DIR", None)


class Forked:
    """A program that was forked: the part of `subprocess.Popen` that tests use.

    Args:
        answers: Where its process id arrives, then its exit code, a line each.
    """

    def __init__(self, answers: int) -> None:
        self._answers = os.fdopen(answers)
        self.returncode: int | None = None
        self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code (of a signal: negative) once the program has ended."""
        if self.returncode is None:
            if not select.select([self._answers], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self.returncode = int(self._answers.readline())
            self._answers.close()
        return self.returncode

    def kill(self) -> None:
        """Kill it, and nothing that it started."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


@functools.cache
def forker() -> socket.socket:
    """Start the process that imports; it ends when this process does."""
    ours, theirs = socket.socketpair()
    words = [sys.executable, __file__, str(theirs.fileno())]
    subprocess.Popen(
        words, env=ENVIRONMENT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    theirs.close()
    return ours


def start(
    folder: Path, *command: str, said: IO[str] | None = None
) -> Forked | subprocess.Popen[str]:
    """Start Python with ``command`` in ``folder``; ``said`` takes what it says.

    It is the head of a process group, which `end` ends.
    """
    if command[0].startswith("-"):
        return subprocess.Popen(
            [sys.executable, *command], cwd=folder, env=ENVIRONMENT, stdout=said, stderr=said,
            text=True, start_new_session=True,
        )  # fmt: skip
    asked = {"folder": str(folder), "command": command, "environment": dict(ENVIRONMENT)}
    out, err = (1, 2) if said is None else (said.fileno(), said.fileno())
    answers, answer = os.pipe()
    socket.send_fds(forker(), [json.dumps(asked).encode() + b"\n"], [out, err, answer])
    os.close(answer)
    return Forked(answers)


def end(process: Forked | subprocess.Popen[str]) -> None:
    """End a program and all processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def train(folder: Path, *words: str, code: int = 0, script: str = TRAIN) -> str:
    """Run train.py or another script in ``folder``; returns what it said."""
    with tempfile.TemporaryFile("w+") as file:
        process = start(folder, script, *words, said=file)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=PATIENCE)
        returned = process.poll()
        end(process)
        file.seek(0)
        said = file.read()
    assert returned is not None, f"it did not end in {PATIENCE} s: {said}"
    assert returned == code, said
    return said


def import_all() -> None:
    """Import what every training imports, but no simulator: they look for a renderer first."""
    import alembic.command  # noqa: F401  # MLflow imports these when it opens a store
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    import sqlalchemy.dialects.sqlite  # noqa: F401
    import torch

    import mapo_lightning.run.preflight
    import mapo_lightning.run.session
    import mapo_lightning.run.stages
    import mapo_lightning.tracking.logger  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # to go through it all again, as at the end of the interpreter, takes seconds


def fork_on_demand(requests: socket.socket) -> list[str]:
    """Fork a program for each request; returns its command, in the program.

    Every program has a parent of its own, which waits for it.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the parents
    while True:
        line, fds, *_ = socket.recv_fds(requests, 1 << 20, 3)
        while line and not line.endswith(b"\n"):
            line += requests.recv(1 << 20)
        if not line:
            os._exit(0)
        out, err, answer = fds
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            requests.close()
            program = os.fork()
            if program == 0:
                break
            os.write(answer, b"%d\n" % program)
            code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
            os.write(answer, b"%d\n" % code)
            os._exit(0)
        for fd in fds:
            os.close(fd)
    os.setsid()
    os.dup2(out, 1)
    os.dup2(err, 2)
    for fd in fds:
        os.close(fd)
    asked = json.loads(line)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    command: list[str] = asked["command"]
    return command


if __name__ == "__main__":
    import_all()
    sys.argv = fork_on_demand(socket.socket(fileno=int(sys.argv[1])))
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
