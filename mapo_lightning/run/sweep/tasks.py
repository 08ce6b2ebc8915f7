"""What a sweep starts: programs of one run each, in folders of their own."""

from __future__ import annotations

import os
import site
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mapo_lightning
from mapo_lightning.files import FileLock
from mapo_lightning.reporting.runs import last_error
from mapo_lightning.run import job
from mapo_lightning.run.finished import is_finished
from mapo_lightning.run.sweep.plan import Point, Sweep
from mapo_lightning.run.sweep.sharing import shared

LOG = "log.txt"
"""What a run says, in its folder."""
LOCK = ".lock"
"""File that is locked as long as a process runs, in the folder of its run."""
SHARED = "pretrained-"
"""How the folders begin that hold pre-training that points share."""
_FOLDER_OF_RUN = "MAPO_RUN_DIR"
_PROGRAM = "mapo_lightning.run.main"


@dataclass(frozen=True)
class Task:
    """One run that a sweep starts: a point, or a pre-training that points share."""

    name: str
    folder: Path
    words: tuple[str, ...]
    needs: Task | None = None
    """The pre-training that has to be finished before."""

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return is_finished(self.folder)

    @property
    def log(self) -> Path:
        """File that holds what the run says."""
        return self.folder / LOG

    def log_size(self) -> int:
        """Bytes of the log so far."""
        return self.log.stat().st_size if self.log.is_file() else 0

    def complaint(self, since: int = 0) -> str:
        """The error that the run has told last; empty if it told none.

        Args:
            since: Size of the log before it began.
        """
        return last_error(self.log, since)


def tasks_of(sweep: Sweep, folder: Path, parent: str | None) -> list[Task]:
    """Everything that a sweep runs, each pre-training before its points.

    Args:
        sweep: The sweep.
        folder: Its folder, absolute.
        parent: MLflow run that all are shown under.
    """
    common = shared(sweep.points)
    found: list[Task] = []
    trained: dict[str, Task] = {}
    for point in sweep.points:
        words = [*_without(point, "stage", "tracking.parent"), *_under(parent)]
        place = folder / point.name
        if point.name not in common or _pretrains_itself(place):
            own = [word for word in point.words if word.startswith("stage=")]
            found.append(Task(point.name, place, (*words, *own, f"run_dir={place}")))
            continue
        digest = common[point.name]
        if digest not in trained:
            at = folder / f"{SHARED}{digest}"
            first = (*words, "stage=pretrain", f"run_dir={at}")
            trained[digest] = Task(at.name, at, first)
            found.append(trained[digest])
        start = trained[digest].folder / "pretrain" / "last.ckpt"
        tuned = (*words, "stage=finetune", f"init_from={start}", f"run_dir={place}")
        found.append(Task(point.name, place, tuned, trained[digest]))
    return found


def _pretrains_itself(place: Path) -> bool:
    """Whether a run was begun when it shared its pre-training with no other point yet."""
    return any((place / phase).is_dir() for phase in ("tokenizer", "pretrain"))


def _without(point: Point, *keys: str) -> list[str]:
    return [word for word in point.words if word.partition("=")[0] not in keys]


def _under(parent: str | None) -> list[str]:
    return [] if parent is None else [f"tracking.parent={parent}"]


def command(task: Task, *more: str) -> list[str]:
    """Program and words of a run; ``more`` words win."""
    return [sys.executable, "-m", _PROGRAM, *task.words, *more]


def environment(folder: Path, outside: Mapping[str, str]) -> dict[str, str]:
    """Variables of a run in ``folder``, made from those of this process.

    A run that was begun before goes on: with its newest checkpoint, and in its MLflow runs.
    """
    found = dict(outside)
    found.pop(_FOLDER_OF_RUN, None)
    found.pop(job.AGAIN, None)
    found["PYTHONSAFEPATH"] = "1"  # the working folder may hold files with the names of packages
    if path := import_path(outside):
        found["PYTHONPATH"] = path
    if folder.is_dir():
        found[job.AGAIN] = "1"
    return found


def import_path(outside: Mapping[str, str]) -> str | None:
    """PYTHONPATH by which a new Python finds this very package; None where it does so anyway."""
    root = str(Path(mapo_lightning.__file__).resolve().parents[1])
    installed = [*site.getsitepackages(), site.getusersitepackages()]
    if root in installed:
        return None
    given = [folder for folder in outside.get("PYTHONPATH", "").split(os.pathsep) if folder]
    return os.pathsep.join(dict.fromkeys([root, *given]))


def become(words: list[str], folder: str, needs: str) -> None:
    """Turn this process, a task of SLURM, into the program of a run; does not return.

    So signals reach the run itself, and its exit code is that of the task. What it says goes to
    the log in its folder.

    Args:
        words: Of the program.
        folder: Of the run, absolute.
        needs: Folder of a pre-training that has to be finished; empty for none.
    """
    place = Path(folder)
    variables = environment(place, os.environ)
    place.mkdir(parents=True, exist_ok=True)
    handle = os.open(place / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if needs and not is_finished(Path(needs)):
        os.write(2, f"error: the pre-training in '{needs}' is not finished\n".encode())
        sys.exit(2)
    if job.rank() == 0:  # an earlier job may still be ending
        lock = FileLock(place / LOCK)
        lock.acquire()
        os.set_inheritable(lock.fileno(), True)
    os.execve(sys.executable, [sys.executable, "-m", _PROGRAM, *words], variables)
