"""Shows that the program is at work: bars, and once a minute what it waits for.

A silent wait looks like a program that hangs.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm import tqdm

log = logging.getLogger(__name__)

EVERY = 60.0
"""Seconds between two messages about one wait."""
_LOOK_SECONDS = 5.0  # between two looks of the thread at what is waited for


def pause() -> float:
    """Seconds between two updates of a bar: 0.1 on a terminal, 15 in a file."""
    return 0.1 if sys.stderr.isatty() else 15.0


@contextmanager
def counting(
    what: str, unit: str, *, show: bool = True, stays: bool = True
) -> Iterator[Callable[..., None]]:
    """Show a bar for work that reports its progress with ``report(done, total, text="")``.

    Args:
        what: Stands in front of it.
        unit: What is counted.
        show: False: no bar.
        stays: False: the bar goes away when the work is done. In a file it then appears only where
            the work takes longer than the pause between two updates.
    """
    delay = 0.0 if stays or sys.stderr.isatty() else pause()
    settings = {"mininterval": pause(), "dynamic_ncols": True, "leave": stays, "delay": delay}
    with tqdm(desc=what, unit=unit, disable=not show, **settings) as bar:

        def report(done: int, total: int, text: str = "") -> None:
            bar.total = total
            bar.set_postfix_str(text, refresh=False)
            bar.update(done - bar.n)

        yield report


@dataclass(eq=False)
class _Wait:
    what: str | Callable[[], str]
    since: float
    due: float


class Watch:
    """Knows what is waited for, and says so of whatever takes long.

    Args:
        clock: Seconds that pass.
        say: Gets each message.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = log.warning,
    ) -> None:
        self._clock, self._say = clock, say
        self._waits: dict[int, _Wait] = {}

    @contextmanager
    def waiting(self, what: str | Callable[[], str]) -> Iterator[None]:
        """Call what happens inside a wait.

        Args:
            what: Completes "waiting for"; a function is called for each message, in another thread.
        """
        now = self._clock()
        wait = _Wait(what, now, now + EVERY)
        self._waits[id(wait)] = wait
        try:
            yield
        finally:
            del self._waits[id(wait)]

    def look(self) -> None:
        """Say what has been waited for since another minute."""
        now = self._clock()
        for wait in tuple(self._waits.values()):
            if now >= wait.due:
                wait.due = now + EVERY
                what = wait.what if isinstance(wait.what, str) else wait.what()
                self._say(f"waiting for {what} (since {now - wait.since:.0f} s)")


_watch = Watch()
_thread: threading.Thread | None = None


@contextmanager
def waiting(what: str | Callable[[], str]) -> Iterator[None]:
    """As `Watch.waiting`, watched by a thread of this process."""
    global _thread
    if _thread is None:
        _thread = threading.Thread(target=_look_for_ever, name="waiting", daemon=True)
        _thread.start()
    with _watch.waiting(what):
        yield


def _look_for_ever() -> None:
    while True:
        time.sleep(_LOOK_SECONDS)
        _watch.look()


def _forget() -> None:
    """A forked process has its parent's waits, but not its thread."""
    global _thread, _watch
    _thread, _watch = None, Watch()


os.register_at_fork(after_in_child=_forget)
