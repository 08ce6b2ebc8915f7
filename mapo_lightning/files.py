"""Writing files whole, and locks between processes: the two things that are easy to get wrong."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mapo_lightning.waiting import waiting

DRAFT = ".part"
"""Suffix of unfinished files; one that is left over can be deleted."""


@contextmanager
def atomic_write(
    path: Path, *, durable: bool = False, private: bool = False, sole_writer: bool = False
) -> Iterator[Path]:
    """Replace a file as a whole: readers see the old content or the new, never a part of it.

    The caller writes to a draft in the same folder, which is renamed when the block ends. If the
    block fails, the draft is removed; if the process is killed, the old file stays as it is.

    Args:
        path: File to write; its folder is made if missing.
        durable: Flush the content to disk before the renaming, so that it survives a power cut.
        private: Only this user may read the file.
        sole_writer: No other process writes this file at the same time. The draft then has a fixed
            name, so that the next write replaces what a killed process left over.

    Yields:
        The draft, an empty file. Write it under this name.

    Raises:
        OSError: The disk is full or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    token = "" if sole_writer else f".{secrets.token_hex(4)}"
    draft = path.with_name(f"{path.name}{token}{DRAFT}")
    flags = os.O_CREAT | os.O_WRONLY | (os.O_TRUNC if sole_writer else os.O_EXCL)
    try:
        handle = os.open(draft, flags, 0o600 if private else 0o666)
        try:
            if private:
                os.fchmod(handle, 0o600)  # a draft that was left over keeps its old mode
        finally:
            os.close(handle)
        yield draft
        if durable:
            _flush(draft)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class FileLock:
    """Lock that one process at a time can hold; it is free again when its holder dies.

    Usable as a context manager, which waits. The file itself stays: removing it would let two
    processes hold locks of the same name.

    Args:
        path: Lock file; it and its folder are made if missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None

    def acquire(self, *, wait: bool = True) -> bool:
        """Take the lock.

        Args:
            wait: Wait until it is free; otherwise give up at once if another process holds it.

        Returns:
            Whether the lock is held now.

        Raises:
            OSError: The file cannot be opened or locked.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("ab")
        try:
            self._take(file, wait)
        except BlockingIOError:
            file.close()
            return False
        except BaseException:
            file.close()
            raise
        self._file = file
        return True

    def _take(self, file: IO[bytes], wait: bool) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            with waiting(f"'{self.path}', which another process holds"):
                fcntl.flock(file, fcntl.LOCK_EX)

    def fileno(self) -> int:
        """Return the descriptor of the held lock; a child that inherits it holds the lock too.

        Raises:
            ValueError: The lock is not held.
        """
        if self._file is None:
            raise ValueError(f"the lock '{self.path}' is not held")
        return self._file.fileno()

    def release(self) -> None:
        """Give the lock back; does nothing if it is not held."""
        # Closed, not unlocked: a forked child has a copy, and must not unlock it for its parent.
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
