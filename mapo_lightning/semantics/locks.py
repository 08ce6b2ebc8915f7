"""Locks on windows, so that no two processes query the describer about the same one.

A lock is a small file, named by the window's key and created exclusively.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path

from mapo_lightning.files import FileLock

log = logging.getLogger(__name__)

_UNSIGNED_SECONDS = 5.0  # age of a lock whose owner died between creating and signing it
_FOREIGN_SECONDS = 1800.0  # age of a lock of another machine, whose processes are not visible


class WindowLocks:
    """Exclusive, crash-safe locks on keys, for all processes that see a folder.

    Args:
        root: Folder of the lock files.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def take(self, keys: Iterable[str]) -> list[str]:
        """Lock the keys that no living process holds; returns those that are now ours."""
        self.root.mkdir(parents=True, exist_ok=True)
        keys = list(keys)
        free = {key for key in keys if self._create(key)}
        left = {key for key in keys if key not in free and self._take_over(key)}
        if left:
            log.warning("taking over %d windows from a process that is gone", len(left))
        return [key for key in keys if key in free or key in left]

    def release(self, keys: Iterable[str]) -> None:
        """Unlock keys; only the process that locked them may call this."""
        for key in keys:
            (self.root / key).unlink(missing_ok=True)

    def _create(self, key: str) -> bool:
        try:
            handle = os.open(self.root / key, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            file.write(_signature(os.getpid()))
        return True

    def _take_over(self, key: str) -> bool:
        """Replace the lock of a dead process by our own."""
        path = self.root / key
        if not _is_stale(path):
            return False
        # One process at a time: otherwise a second one could remove the new lock of the first.
        with FileLock(self.root / ".takeover"):
            if not _is_stale(path):
                return False
            path.unlink(missing_ok=True)
            return self._create(key)


def _signature(pid: int) -> str:
    """Name a process; a later one with the same number has another name."""
    return f"{socket.gethostname()} {pid} {_started(pid)}"


def _started(pid: int) -> str:
    """Start time of a process in clock ticks since boot; '' if it is not available."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # The command, in parentheses, may hold spaces: count from its end.
    return stat.rpartition(")")[2].split()[19]


def _is_stale(path: Path) -> bool:
    try:
        owner, age = path.read_text().split(), time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return False  # just released: the next attempt finds the label, or a free key
    if len(owner) < 2:
        return age > _UNSIGNED_SECONDS
    if owner[0] != socket.gethostname():
        return age > _FOREIGN_SECONDS
    return not _is_alive(int(owner[1]), owner[2] if len(owner) > 2 else "")


def _is_alive(pid: int, started: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is alive and belongs to another user
    return _started(pid) == started
