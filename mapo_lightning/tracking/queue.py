"""Metrics on their way to the tracking server: training never waits for it."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

log = logging.getLogger(__name__)


class MetricQueue(Generic[T]):
    """Sends items in the background, in their order, in batches.

    What cannot be sent is kept and tried again, so an outage of the receiver loses nothing until
    ``limit`` items wait; from then on the oldest go first, and how many went is logged.

    Args:
        send: Delivers a batch; any exception means that nothing of it arrived.
        every: Seconds between two deliveries.
        batch: Largest number of items in one delivery.
        limit: Largest number of items that wait.
        tick: Called after each successful round, for example to write a heartbeat.
    """

    def __init__(
        self,
        send: Callable[[list[T]], None],
        every: float = 2.0,
        batch: int = 1000,
        limit: int = 200_000,
        tick: Callable[[], None] | None = None,
    ) -> None:
        self._send, self._tick = send, tick
        self._every, self._batch, self._limit = every, batch, limit
        self._waiting: deque[T] = deque()
        self._lock = threading.Lock()  # guards _waiting
        self._sending = threading.Lock()  # one delivery at a time keeps the order
        self._stop = threading.Event()
        self._failures = 0
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="metric-queue", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @property
    def away(self) -> bool:
        """Whether the last delivery failed."""
        return self._failures > 0

    def put(self, items: list[T]) -> None:
        """Queue items; returns at once."""
        with self._lock:
            self._waiting.extend(items)
            while len(self._waiting) > self._limit:
                self._waiting.popleft()
                self.dropped += 1

    def waiting(self) -> list[T]:
        """What is not known to have arrived."""
        with self._lock:
            return list(self._waiting)

    def flush(self, timeout: float = 30.0) -> bool:
        """Deliver what waits.

        Args:
            timeout: Seconds to go on trying while the receiver fails.

        Returns:
            Whether everything was delivered.
        """
        deadline = time.monotonic() + timeout
        while not self._deliver():
            if time.monotonic() >= deadline:
                return False
            time.sleep(min(0.5, timeout))
        return True

    def close(self, timeout: float = 30.0) -> None:
        """Deliver what waits and stop; says so where something is lost."""
        if self._stop.is_set():
            return
        self._stop.set()
        atexit.unregister(self.close)
        arrived = self.flush(timeout)
        lost = self.dropped + (0 if arrived else len(self._waiting))
        if lost:
            log.error("%d metric values never reached the tracking store.", lost)

    def _run(self) -> None:
        while not self._stop.wait(self._every * min(2**self._failures, 16)):
            if self._deliver() and self._tick is not None:
                self._attempt(self._tick)

    def _deliver(self) -> bool:
        with self._sending:
            while True:
                with self._lock:
                    items = [self._waiting[i] for i in range(min(self._batch, len(self._waiting)))]
                    dropped = self.dropped
                if not items:
                    return True
                if not self._attempt(lambda items=items: self._send(items)):  # type: ignore[misc]
                    return False
                with self._lock:  # an overflow meanwhile may have taken some of these away
                    for _ in range(len(items) - (self.dropped - dropped)):
                        self._waiting.popleft()

    def _attempt(self, call: Callable[[], None]) -> bool:
        """Run a call of the receiver; whatever it raises must not end the training run."""
        try:
            call()
        except Exception as error:
            self._failures += 1
            if self._failures == 1:  # once per outage
                log.warning("The tracking store does not answer, values wait: %s", error)
            return False
        self._failures = 0
        return True
