"""Sweeps that tests start, kill and look at afterwards."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from program import PATIENCE, TRAIN, end, start


def checkpoints(folder: Path) -> list[Path]:
    """Newest checkpoints of a sweep's runs that are not finished."""
    found = folder.glob("*=*/*/last.ckpt")
    return [path for path in found if not (path.parents[1] / "finished.json").exists()]


def finished(folder: Path) -> dict[str, int]:
    """Name of a finished run -> when it ended, in ns."""
    marks = folder.glob("*=*/finished.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in marks}


def kill_when(place: Path, words: list[str], due: Callable[[], bool], *, runs_too: bool) -> str:
    """Start a sweep and kill it with SIGKILL once ``due``; returns what it said until then.

    Args:
        place: Working folder.
        words: Of the command line.
        due: Looked at all the time.
        runs_too: Kill its runs as well; otherwise they notice that their sweep is gone.
    """
    with (place / "said.txt").open("w+") as said:
        process = start(place, TRAIN, *words, said=said)
        deadline = time.monotonic() + PATIENCE
        while not due():
            assert process.poll() is None, (place / "said.txt").read_text()
            assert time.monotonic() < deadline, (place / "said.txt").read_text()
            time.sleep(0.01)
        runs = psutil.Process(process.pid).children(recursive=True) if runs_too else []
        end(process)
        for run in runs:
            with contextlib.suppress(psutil.NoSuchProcess):
                run.kill()
    return (place / "said.txt").read_text()


def recorded(store: Path) -> list[tuple[str, str, str]]:
    """Name, status and name of the parent of every MLflow run."""
    query = """select r.name, r.status, coalesce(p.name, '') from runs r
        left join tags t on t.run_uuid = r.run_uuid and t.key = 'mlflow.parentRunId'
        left join runs p on p.run_uuid = t.value"""
    with contextlib.closing(sqlite3.connect(store)) as db:
        return sorted(db.execute(query))


def repeated_points(store: Path, key: str, after: int) -> int:
    """Points of a curve that a store holds twice, beyond a step; the prefill's share a step."""
    query = """select count(*) from (select 1 from metrics where key = ? and step > ?
        group by run_uuid, step having count(*) > 1)"""
    with contextlib.closing(sqlite3.connect(store)) as db:
        return int(db.execute(query, (key, after)).fetchone()[0])
