"""Looks whether an MLflow store can be used, before MLflow itself does.

MLflow tries a SQLite file that does not open ten times, for minutes, makes its tables in any
database that it is given, and waits minutes for a server that is gone.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

SERVER_SECONDS = 15.0
"""How long a server may take to open a store."""
_LOCK_SECONDS = 10.0  # how long another process may keep a SQLite file to itself
_OURS = frozenset({"alembic_version", "experiments", "runs"})  # tables of every MLflow store

T = TypeVar("T")


class StoreError(Exception):
    """The store cannot be used: a reason in words."""


def check_file(path: Path, experiment: str, artifacts: Path) -> None:
    """See whether a SQLite file can hold runs of an experiment; writes nothing.

    Args:
        path: Absolute; where it is missing, its folder must be one that can be made.
        experiment: Name of the experiment.
        artifacts: Folder for artifacts of an experiment that is not there yet.

    Raises:
        StoreError: It cannot.
    """
    if not path.exists():
        _check_folder(path.parent)
        _check_folder(artifacts)
        return
    if not path.is_file() or not os.access(path, os.R_OK | os.W_OK):
        raise StoreError("it is not a file that you may read and write")
    _check_folder(path.parent)  # SQLite keeps its journal beside the file
    found = _find_experiment(path, experiment)
    if found is None:
        _check_folder(artifacts)
        return
    identity, stage, location = found
    if stage != "active":
        raise StoreError(deleted(experiment, identity))
    place = urlsplit(location)
    if place.scheme in ("", "file"):
        _check_folder(Path(unquote(place.path)))


def check_readable(path: Path) -> None:
    """See that a file is a store, because MLflow makes one of any database that it is given.

    Raises:
        StoreError: It is none.
    """
    if not path.is_file():
        raise StoreError("there is no such file")
    if not _reads(path, lambda file: bool(_tables(file))):
        raise StoreError("it is an empty database")


def deleted(experiment: str, identity: str) -> str:
    """Say that an experiment was deleted, and how it comes back."""
    return (
        f"its experiment '{experiment}' is deleted; bring it back with "
        f"'mlflow experiments restore --experiment-id {identity}', or take another name with "
        "tracking.experiment=NAME"
    )


def make_file(path: Path) -> None:
    """Make an empty database where there is none.

    Raises:
        StoreError: SQLite cannot write there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=_LOCK_SECONDS)) as file, file:
            file.execute("BEGIN IMMEDIATE")
    except (sqlite3.Error, OSError) as error:
        raise StoreError(f"SQLite cannot write it ({error})") from error


def within(seconds: float, call: Callable[[], T]) -> T:
    """Run a call to a server, and give up on it after a while.

    A name that does not resolve, or a network that swallows packets, has no time limit of its own.

    Raises:
        StoreError: It took too long.
    """
    outcome: Future[T] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:  # raised again in the caller
            outcome.set_exception(error)

    thread = threading.Thread(target=work, name="mlflow-server", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome.done():
        raise StoreError(f"the server does not answer within {seconds:g} s")
    return outcome.result()


def _find_experiment(path: Path, name: str) -> tuple[str, str, str] | None:
    """(id, stage, place of the artifacts) of an experiment; None if it, or the tables, are missing.

    Raises:
        StoreError: The file is no store of MLflow.
    """

    def find(file: sqlite3.Connection) -> tuple[object, ...] | None:
        columns = "experiment_id, lifecycle_stage, artifact_location"
        query = f"SELECT {columns} FROM experiments WHERE name = ?"
        found: tuple[object, ...] | None = None
        if _tables(file):
            found = file.execute(query, (name,)).fetchone()
        return found

    row = _reads(path, find)
    return None if row is None else (str(row[0]), str(row[1]), str(row[2] or ""))


def _reads(path: Path, look: Callable[[sqlite3.Connection], T]) -> T:
    """What ``look`` finds in a SQLite file.

    Raises:
        StoreError: SQLite cannot read it.
    """
    # Read-write: the first to open a file after a kill rolls the unfinished commit back.
    source = f"{path.absolute().as_uri()}?mode=rw"
    try:
        with closing(sqlite3.connect(source, uri=True, timeout=_LOCK_SECONDS)) as file:
            return look(file)
    except sqlite3.Error as error:
        raise StoreError(f"SQLite cannot read it ({error})") from error


def _tables(file: sqlite3.Connection) -> set[str]:
    """Names of a store's tables; none where the file is empty.

    Raises:
        StoreError: They are those of another program.
    """
    rows = file.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    tables = {str(row[0]) for row in rows}
    if tables and not tables >= _OURS:
        raise StoreError(
            "it is the database of another program, with the tables "
            f"{', '.join(sorted(tables)[:3])}"
        )
    return tables


def _check_folder(folder: Path) -> None:
    """See whether a folder can be written to, or made."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise StoreError(f"'{there}' is not a folder that you may write to")
