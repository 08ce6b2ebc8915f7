"""Who is asking about what right now: one small file per question, made exclusively."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path

log = logging.getLogger(__name__)

_UNSIGNED_SECONDS = 5.0  # a claim whose owner died between making it and signing it
_FOREIGN_SECONDS = 1800.0  # a claim of another machine, whose processes we cannot see


class Claims:
    """Exclusive, crash-safe claims on keys, shared by all processes that see a folder.

    Args:
        root: Folder of the claim files.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def take(self, keys: Iterable[str]) -> list[str]:
        """Claim what nobody living has claimed; returns the keys that are now ours."""
        self.root.mkdir(parents=True, exist_ok=True)
        keys = list(keys)
        free = {key for key in keys if self._create(key)}
        left = {key for key in keys if key not in free and self._take_over(key)}
        if left:
            log.warning("taking over %d label questions of a process that is gone", len(left))
        return [key for key in keys if key in free or key in left]

    def release(self, keys: Iterable[str]) -> None:
        """Give keys back; only the process that took them may call this."""
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
        """Replace the claim of a dead process by our own."""
        path = self.root / key
        if not _is_stale(path):
            return False
        # One process at a time: otherwise two could both remove, the second our new claim.
        with (self.root / ".takeover").open("ab") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            if not _is_stale(path):
                return False
            path.unlink(missing_ok=True)
            return self._create(key)


def _signature(pid: int) -> str:
    """Name a process so that a later one with the same number is told apart."""
    return f"{socket.gethostname()} {pid} {_started(pid)}"


def _started(pid: int) -> str:
    """Start time of a process in clock ticks since boot; '' where it cannot be known."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # The command, in parentheses, may hold spaces: count from behind it.
    return stat.rpartition(")")[2].split()[19]


def _is_stale(path: Path) -> bool:
    try:
        owner, age = path.read_text().split(), time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return False  # just released: the next look finds the label, or a free key
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
        pass  # it lives and belongs to somebody else
    return _started(pid) == started
