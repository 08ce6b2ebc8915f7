"""Shares queries among several servers, with a circuit breaker for those that fail."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import thread as pools
from pathlib import Path
from typing import TypeVar

from mapo_lightning.files import FileLock

log = logging.getLogger(__name__)

_PATIENCE = 2  # failures in a row after which a server's circuit opens: it gets no queries
_OPEN_SECONDS = (0.5, 15.0)  # shortest and longest time for which it stays open
_NOTE_SECONDS = 60.0  # between two log lines about an outage
_LOOK_SECONDS = 0.05  # between two checks whether the program ends

R = TypeVar("R")


def is_ending() -> bool:
    """Tell whether the program is waiting for its threads to end."""
    return bool(pools._shutdown)  # set before the wait begins; nothing public is


def as_they_come(
    pool: ThreadPoolExecutor, jobs: Sequence[Callable[[], R]], stop: threading.Event
) -> Iterator[dict[int, R]]:
    """Run jobs in ``pool`` and yield results as they arrive: number of the job -> result.

    A thread starts its next job when its result has been consumed, that is, when the caller asks
    for the next one. A killed process loses no more results than the pool has threads.

    Args:
        pool: Its threads; several callers may share them.
        jobs: A job that raises ends the iteration with what it raised.
        stop: Set at the end of the iteration, to tell jobs that still run.
    """
    arrived: queue.SimpleQueue[tuple[int, Future[R], threading.Event]] = queue.SimpleQueue()

    def work(number: int) -> None:
        outcome: Future[R] = Future()
        try:
            outcome.set_result(jobs[number]())
        except BaseException as error:  # raised again in the caller
            outcome.set_exception(error)
        dealt_with = threading.Event()
        arrived.put((number, outcome, dealt_with))
        while not (dealt_with.wait(_LOOK_SECONDS) or stop.is_set() or is_ending()):
            pass

    handed_in = [pool.submit(work, number) for number in range(len(jobs))]
    left = len(jobs)
    try:
        while left:
            batch = [arrived.get()]
            while not arrived.empty():
                batch.append(arrived.get())
            yield {number: outcome.result() for number, outcome, _ in batch}
            for *_, dealt_with in batch:
                dealt_with.set()
            left -= len(batch)
    finally:
        stop.set()
        for future in handed_in:
            future.cancel()


class Server:
    """One address and its recent failures; changed only by its pool."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.busy = 0
        self.failures = 0
        self.open_until = 0.0
        self.reason = ""


class ServerPool:
    """Shares queries among servers; for the threads of one process.

    Args:
        urls: Addresses.
        clock: Gives the time in seconds.
    """

    def __init__(self, urls: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.servers = [Server(url) for url in urls]
        self.successes = 0
        self._clock = clock
        self._lock = threading.Lock()

    def pick(self) -> Server | None:
        """Take the least busy server whose circuit is closed; None if there is none."""
        with self._lock:
            now = self._clock()
            free = [server for server in self.servers if server.open_until <= now]
            # A server that has failed gets one query first, not all that wait.
            free = [s for s in free if s.failures < _PATIENCE or not s.busy]
            if not free:
                return None
            chosen = min(free, key=lambda server: server.busy)
            chosen.busy += 1
            return chosen

    def succeeded(self, server: Server) -> None:
        """Give back a server that has answered."""
        with self._lock:
            server.busy -= 1
            server.failures, server.open_until = 0, 0.0
            self.successes += 1

    def failed(self, server: Server, reason: str) -> None:
        """Give back a server that has failed; after a few failures its circuit opens."""
        with self._lock:
            server.busy -= 1
            server.failures += 1
            server.reason = reason
            if server.failures >= _PATIENCE:
                least, most = _OPEN_SECONDS
                pause = min(most, least * 2.0 ** min(server.failures - _PATIENCE, 10))
                server.open_until = self._clock() + pause

    def pause(self, server: Server, seconds: float) -> None:
        """Give back a server that wants no queries for some seconds; this is no failure."""
        with self._lock:
            server.busy -= 1
            server.open_until = max(server.open_until, self._clock() + seconds)

    def returned(self, server: Server) -> None:
        """Give back a server without a verdict."""
        with self._lock:
            server.busy -= 1

    @property
    def is_out(self) -> bool:
        """True while the last queries to every server have failed."""
        return all(server.failures >= _PATIENCE for server in self.servers)

    def describe(self) -> str:
        """Describe each server's last failure."""
        return "; ".join(f"{s.url}: {s.reason or 'no answer yet'}" for s in self.servers)


class OutageLog:
    """Logs that no server answers: one line a minute for all processes together.

    Args:
        stamp: File that exists during an outage; None: for this process alone.
    """

    def __init__(self, stamp: Path | None = None) -> None:
        self.stamp = stamp
        self._began: float | None = None
        self._noted = 0.0

    def waiting(self, what: str) -> None:
        """Log ``what`` unless a process has logged within the last minute."""
        now = time.time()
        if self._began is None:
            self._began = now
        if now - self._noted < _NOTE_SECONDS:
            return
        with self._shared() as (began, noted):
            self._began, self._noted = min(began or now, self._began), noted or 0.0
            if now - self._noted < _NOTE_SECONDS:
                return
            self._noted = now
            if self.stamp is not None:
                self.stamp.write_text(f"{self._began} {now}")
            log.warning("no answer for %.0f s: %s", now - self._began, what)

    def over(self) -> None:
        """Log once that servers answer again."""
        if self._began is None:
            return
        took, self._began, self._noted = time.time() - self._began, None, 0.0
        with self._shared() as (began, _):
            if self.stamp is not None:
                self.stamp.unlink(missing_ok=True)
            if self.stamp is None or began is not None:
                log.warning("servers answer again after %.0f s", took)

    @contextlib.contextmanager
    def _shared(self) -> Iterator[tuple[float | None, float | None]]:
        """When the outage began and was last logged by any process, under a lock."""
        if self.stamp is None:
            yield self._began, self._noted
            return
        with FileLock(self.stamp.with_suffix(".lock")):
            try:
                began, noted = (float(word) for word in self.stamp.read_text().split())
            except (FileNotFoundError, ValueError):
                yield None, None
            else:  # an old stamp was left over by a killed run
                fresh = time.time() - noted < 2 * _NOTE_SECONDS
                yield (began, noted) if fresh else (None, None)
