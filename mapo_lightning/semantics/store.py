"""Label store: every window is labelled once, however many processes need its label.

Each writing process has its own SQLite file, and reading merges them, so that no process waits for
another's lock. A label is committed before its window is unlocked; a killed process loses at most
the labels that it was still waiting for. Only text, numbers and raw float16 are stored, never code.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import json
import os
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar, cast, get_args

import numpy as np
from numpy.typing import NDArray

from mapo_lightning.files import FileLock
from mapo_lightning.semantics.locks import WindowLocks
from mapo_lightning.semantics.phrase import SLOTS, Phrase, Status
from mapo_lightning.types import DescriberError

_SCHEMA = """CREATE TABLE IF NOT EXISTS labels (
    key TEXT PRIMARY KEY, text TEXT NOT NULL, status TEXT NOT NULL, slots TEXT, hidden BLOB,
    describer TEXT NOT NULL, source TEXT NOT NULL) WITHOUT ROWID"""
_COLUMNS = "key, text, status, slots, hidden, describer, source"
_CACHED = 65536  # labels kept in memory by one process
_KEYS_AT_ONCE = 500  # keys in one SQL statement; the library's limit is 999 in old versions


class StoredLabel(NamedTuple):
    """Stored answer about one window of frames."""

    text: str
    """The describer's answer, cleaned, at most 256 characters."""
    status: Status
    """How the answer was read."""
    phrase: Phrase | None
    """The five slots, None for null and unreadable answers."""
    hidden: NDArray[np.float16] | None
    """(hidden_dim,), if the describer gave one."""
    describer: str
    """Name of the describer that answered."""
    source: str
    """For people: which frames of which file."""


P = ParamSpec("P")
R = TypeVar("R")


def _one_at_a_time(
    method: Callable[Concatenate[LabelStore, P], R],
) -> Callable[Concatenate[LabelStore, P], R]:
    """Let one thread at a time use the files, in the process that opened them."""

    @functools.wraps(method)
    def alone(store: LabelStore, *args: P.args, **words: P.kwargs) -> R:
        # SQLite connections must not cross a fork: the child forgets them and opens its own.
        if store._pid != os.getpid():
            store._forget()
        with store._one:
            return method(store, *args, **words)

    return cast("Callable[Concatenate[LabelStore, P], R]", alone)


class LabelStore:
    """Labels of all processes that share a folder; each writes to a file of its own.

    Threads of one process may share it.

    The folder and the file are made on the first write, in the process that writes, so that a
    store can be built in the parent of DataLoader workers and travel to them.

    Args:
        root: Folder of the store.
        writer: Name of this writer; a number is appended while another process uses it.
        durable: Wait for the disk at every write, so that a power cut loses nothing; costs about
            15 ms each. Without it, a killed process still loses nothing.
    """

    def __init__(self, root: Path, writer: str, durable: bool = True) -> None:
        self.root, self.durable = Path(root), durable
        self.writer = "".join(c if c.isalnum() or c in "-_" else "-" for c in writer)[:64] or "w"
        self.locks = WindowLocks(self.root / "locks")
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._files: dict[Path, sqlite3.Connection] = {}
        self._own: sqlite3.Connection | None = None
        self._lock: FileLock | None = None
        self._memory: OrderedDict[str, StoredLabel] = OrderedDict()
        self._one = threading.RLock()  # one thread at a time

    def __getstate__(self) -> dict[str, object]:
        """Pickle where the store is, not what is open."""
        return {"root": self.root, "writer": self.writer, "durable": self.durable}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Open nothing yet: the first use does."""
        self.root, self.writer = cast(Path, state["root"]), cast(str, state["writer"])
        self.durable = bool(state["durable"])
        self.locks = WindowLocks(self.root / "locks")
        self._forget()

    @_one_at_a_time
    def get(self, keys: Iterable[str]) -> dict[str, StoredLabel]:
        """Look labels up, first in memory, then in every writer's file.

        Args:
            keys: Content keys of windows.

        Returns:
            The labels that are known, by key.

        Raises:
            DescriberError: A file of the store is not a label store, or is damaged.
        """
        wanted = list(dict.fromkeys(keys))
        found = {key: self._memory[key] for key in wanted if key in self._memory}
        missing = [key for key in wanted if key not in found]
        for path in sorted(self.root.glob("*.sqlite")) if missing else []:
            for label_key, label in self._read(path, missing):
                found[label_key] = label
                self._remember(label_key, label)
            missing = [key for key in missing if key not in found]
            if not missing:
                break
        return found

    @_one_at_a_time
    def put(self, labels: Mapping[str, StoredLabel]) -> None:
        """Store labels; when this returns, they are on disk and visible to all processes.

        Raises:
            DescriberError: The file cannot be written (disk full, no permission).
        """
        if not labels:
            return
        rows = [(key, *_to_row(label)) for key, label in labels.items()]
        try:
            with self._writer_file() as file:
                file.executemany(f"INSERT OR IGNORE INTO labels VALUES ({'?,' * 6}?)", rows)
        except (sqlite3.Error, OSError) as error:
            raise DescriberError(
                f"cannot write {len(rows)} labels to the store '{self.root}': {error}. "
                "Free space or choose another folder with vlm.store=..."
            ) from error
        for key, label in labels.items():
            self._remember(key, label)

    @_one_at_a_time
    def remove(self, keys: Iterable[str]) -> int:
        """Remove labels from every writer's file, so that their windows are queried again.

        Returns:
            How many were there.

        Raises:
            DescriberError: A file of the store cannot be changed.
        """
        wanted, gone = list(dict.fromkeys(keys)), set[str]()
        for path in sorted(self.root.glob("*.sqlite")) if wanted else []:
            gone |= {key for key, _ in self._read(path, wanted)}
            try:
                with self._files[path] as file:
                    file.executemany("DELETE FROM labels WHERE key = ?", [(key,) for key in wanted])
            except sqlite3.Error as error:
                raise DescriberError(
                    f"cannot remove labels from '{path}': {error}. It must be writable"
                ) from error
        for key in wanted:
            self._memory.pop(key, None)
        return len(gone)

    def items(self) -> dict[str, StoredLabel]:
        """Return every label of every writer, by key; for inspection and tests."""
        return dict(self.ordered())

    def ordered(self, hidden: bool = True) -> Iterator[tuple[str, StoredLabel]]:
        """Yield every label of every writer once, by key, without holding them all.

        Args:
            hidden: Read the describer's hidden states too, which are most of the bytes.

        Raises:
            DescriberError: A file of the store is not a label store, or is damaged.
        """
        files = [self._rows(path, hidden) for path in sorted(self.root.glob("*.sqlite"))]
        last = None
        for label_key, label in heapq.merge(*files, key=lambda row: row[0]):
            if label_key != last:
                yield label_key, label
            last = label_key

    def close(self) -> None:
        """Close all files and free the writer's name."""
        if self._pid == os.getpid():
            for file in self._files.values():
                file.close()
            if self._own is not None:
                self._own.close()
            if self._lock is not None:
                self._lock.release()
        self._forget()

    def _remember(self, key: str, label: StoredLabel) -> None:
        self._memory[key] = label
        if len(self._memory) > _CACHED:
            self._memory.popitem(last=False)

    def _writer_file(self) -> sqlite3.Connection:
        if self._own is None:
            for number in itertools.count():
                name = f"{self.writer}-{number}" if number else self.writer
                lock = FileLock(self.root / f"{name}.lock")
                if lock.acquire(wait=False):
                    self._lock = lock
                    break
            self._own = _open(self.root / f"{name}.sqlite", create=True)
            self._own.execute(f"PRAGMA synchronous={'NORMAL' if self.durable else 'OFF'}")
            with self._own:
                self._own.execute(_SCHEMA)
        return self._own

    def _rows(self, path: Path, hidden: bool) -> Iterator[tuple[str, StoredLabel]]:
        columns = _COLUMNS if hidden else _COLUMNS.replace("hidden", "NULL")
        with _reading(path), closing(_open(path)) as file:
            for row in file.execute(f"SELECT {columns} FROM labels ORDER BY key"):
                yield _from_row(row)

    def _read(self, path: Path, keys: list[str]) -> list[tuple[str, StoredLabel]]:
        rows: list[tuple[object, ...]] = []
        found: list[tuple[str, StoredLabel]] = []
        with _reading(path):
            if path not in self._files:
                self._files[path] = _open(path)
            file = self._files[path]
            for first in range(0, len(keys), _KEYS_AT_ONCE):
                batch = keys[first : first + _KEYS_AT_ONCE]
                places = ",".join("?" * len(batch))
                query = f"SELECT {_COLUMNS} FROM labels WHERE key IN ({places})"
                with closing(file.execute(query, batch)) as cursor:
                    rows += cursor.fetchall()
            found = [_from_row(row) for row in rows]
        return found


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name the file in errors; a file whose writer has just started may still be empty."""
    try:
        yield
    except (sqlite3.Error, ValueError) as error:
        if "no such table" not in str(error):
            raise DescriberError(
                f"cannot read the label file '{path}': {error}. "
                "Move it away; its windows will be labelled again."
            ) from error


def _open(path: Path, create: bool = False) -> sqlite3.Connection:
    """Open read-write: the first to open a file after a kill rolls the unfinished commit back."""
    mode = "rwc" if create else "rw"
    file = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        timeout=30.0,
        uri=True,
        check_same_thread=False,
    )
    # No write-ahead log: it needs memory shared by all readers, also those on other machines.
    file.execute("PRAGMA journal_mode=TRUNCATE")
    return file


def _to_row(label: StoredLabel) -> tuple[object, ...]:
    slots = None if label.phrase is None else json.dumps(label.phrase, ensure_ascii=False)
    hidden = None if label.hidden is None else label.hidden.astype("<f2").tobytes()
    return label.text, label.status, slots, hidden, label.describer, label.source


def _from_row(row: tuple[object, ...]) -> tuple[str, StoredLabel]:
    """Check a row: the file may come from anywhere.

    Raises:
        ValueError: A row does not hold a label.
    """
    key, text, status, slots, hidden, describer, source = row
    phrase = None
    if slots is not None:
        values = json.loads(str(slots))
        if not isinstance(values, list) or len(values) != len(SLOTS):
            raise ValueError(f"label {key!r} has no five slots")
        phrase = Phrase(*(str(value) for value in values))
    if status not in get_args(Status):
        raise ValueError(f"label {key!r} has the unknown status {status!r}")
    vector = None
    if hidden is not None:
        vector = np.frombuffer(cast(bytes, hidden), "<f2").astype(np.float16)
    kind = cast(Status, status)
    return str(key), StoredLabel(str(text), kind, phrase, vector, str(describer), str(source))
