"""Stops a run from outside: SIGTERM, Ctrl-C, and a cluster's warning that the time is nearly up.

During an update the signal is only noted, so that the update ends and a checkpoint is written.
Everywhere else it raises `Stopped` at once, whatever the main thread waits for.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

REQUEUE = 75
"""Exit code after a cluster's warning: try again later (EX_TEMPFAIL of sysexits.h)."""
CODES = {
    signal.SIGINT: 130,
    signal.SIGTERM: 143,
    signal.SIGUSR1: REQUEUE,
    signal.SIGUSR2: REQUEUE,
}
"""Exit code after each signal that stops a run."""
GRACE = 10.0
"""Seconds that an update, and what belongs to it, may take to end; SLURM kills after 30."""
_ONE_REQUEST = 2.0  # seconds: a terminal and a launcher may both pass one request on
_OUTLIVE = 15  # seconds that a child goes on after a SIGTERM, because its parent needs it


class Stopped(BaseException):
    """The run was told to stop. No `Exception`, so that nothing takes it for a failure.

    Attributes:
        signal: What told it.
        when: Completes "stopped by SIGTERM": how far the run was.
        advice: How to go on.
        agreed: All ranks stop at this same point.
    """

    def __init__(self, number: int, when: str = "", *, agreed: bool = False) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)
        self.when, self.advice, self.agreed = when, "", agreed

    @property
    def code(self) -> int:
        """Exit code of the program."""
        return CODES[self.signal]

    def __str__(self) -> str:
        words = f"stopped by {self.signal.name}{self.when and ' ' + self.when}"
        return f"{words}; {self.advice}" if self.advice else words


class Signals:
    """Notes the first request to stop, and raises `Stopped` when it may.

    Args:
        clock: Seconds that pass.
        timer: Calls `late` in the main thread after so many seconds; 0 calls it off.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        timer: Callable[[float], object] = lambda seconds: signal.setitimer(
            signal.ITIMER_REAL, seconds
        ),
    ) -> None:
        self._clock, self._timer = clock, timer
        self._since = 0.0
        self.held = False
        """Whether the main thread is in the middle of something that should end first."""
        self.asked = 0
        """Number of the first signal, 0 before it."""

    def __call__(self, number: int, frame: FrameType | None = None) -> None:
        """Take a signal."""
        now = self._clock()
        if self.asked:
            if now - self._since >= _ONE_REQUEST:  # a second request: at once
                self.release()
                raise Stopped(self.asked)
            return
        self.asked, self._since = number, now
        if not self.held:
            raise Stopped(number)
        self._timer(GRACE)

    def late(self, number: int, frame: FrameType | None = None) -> None:
        """Wait no longer for what was in the middle."""
        if self.held and self.asked:
            self.release()
            raise Stopped(self.asked)

    def hold(self) -> None:
        """Note signals from here on, instead of raising."""
        self.held = True

    def release(self) -> None:
        """Raise again from here on; what was noted stays noted."""
        self.held = False
        self._timer(0.0)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise `Stopped` in this block, also for a signal that was noted before it."""
        held, self.held = self.held, False
        try:
            if self.asked:
                raise Stopped(self.asked)
            yield
        finally:
            self.held = held


signals = Signals()
"""Of this process; does nothing before `watched` has begun."""
_watching = False


@contextmanager
def watched() -> Iterator[None]:
    """Let signals stop what happens in this block; their handlers are put back afterwards.

    Python takes signals in the main thread: in another one, this changes nothing.
    """
    global _watching
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (*CODES, signal.SIGALRM)}
    signals.asked, signals.held, _watching = 0, False, True
    install()
    try:
        yield
    finally:
        signals.release()
        _watching = False
        for number, handler in before.items():
            signal.signal(number, handler)


def install() -> None:
    """Take the signals, or take them back from a library that has taken them."""
    if not _watching:
        return
    for number in CODES:
        if signal.getsignal(number) != signal.SIG_IGN:  # as a shell does for what runs behind it
            signal.signal(number, signals)
    signal.signal(signal.SIGALRM, signals.late)


def leave_to_parent(_: int = 0) -> None:
    """In a child: do not stop because of a signal that a terminal or a cluster sends to everybody.

    The parent decides. It may still need this process to end its update; a SIGTERM therefore ends
    it a while later.
    """
    for number in CODES:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_OUTLIVE) and None)


def _after_fork() -> None:
    if _watching:
        leave_to_parent()


os.register_at_fork(after_in_child=_after_fork)
