"""Long waits are spoken of once a minute; time passes only where a test says so."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from mapo_lightning import waiting
from mapo_lightning.files import FileLock
from mapo_lightning.waiting import Watch


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_wait_is_spoken_of_once_a_minute_with_what_has_come_so_far() -> None:
    time, said, done = Time(), list[str](), 0
    watch = Watch(time, said.append)
    with watch.waiting(lambda: f"the prefill: {done} of 90 steps"):
        for time.now in range(0, 150, 5):
            done = int(time.now)
            watch.look()
    assert said == [
        "waiting for the prefill: 60 of 90 steps (since 60 s)",
        "waiting for the prefill: 120 of 90 steps (since 120 s)",
    ]


def test_what_is_over_or_short_is_not_spoken_of() -> None:
    time, said = Time(), list[str]()
    watch = Watch(time, said.append)
    with pytest.raises(OSError, match="gone"), watch.waiting("a lock"):  # noqa: PT012
        time.now = 59.0
        watch.look()
        raise OSError("gone")
    time.now = 120.0
    watch.look()
    with watch.waiting("another answer"):
        watch.look()
    assert said == []


def test_waits_of_several_threads_are_told_apart() -> None:
    time, said = Time(), list[str]()
    watch = Watch(time, said.append)
    with watch.waiting("one"):
        time.now = 30.0
        with watch.waiting("two"):
            for time.now in (60.0, 90.0):
                watch.look()
    assert said == ["waiting for one (since 60 s)", "waiting for two (since 60 s)"]


def test_a_lock_that_another_holds_is_waited_for_in_the_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time, said = Time(), list[str]()
    watch = Watch(time, said.append)
    monkeypatch.setattr(waiting, "_watch", watch)
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    first.acquire()
    waiter = threading.Thread(target=second.acquire)
    waiter.start()
    while not watch._waits:
        pass
    time.now = 61.0
    watch.look()
    first.release()
    waiter.join()
    second.release()
    assert said == [f"waiting for '{tmp_path}/lock', which another process holds (since 61 s)"]
    assert not watch._waits
