from __future__ import annotations

import threading

import pytest

from mapo_lightning.tracking.queue import MetricQueue


class Receiver:
    """Takes batches; refuses them while it is down."""

    def __init__(self) -> None:
        self.got: list[int] = []
        self.sizes: list[int] = []
        self.down = False

    def send(self, items: list[int]) -> None:
        if self.down:
            raise ConnectionError("refused")
        self.got += items
        self.sizes.append(len(items))


def test_an_outage_loses_nothing_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    receiver = Receiver()
    box = MetricQueue(receiver.send, every=0.01, batch=3)
    receiver.down = True
    box.put(list(range(10)))
    assert not box.flush(timeout=0.05)
    receiver.down = False
    box.put([10])
    box.close()
    assert receiver.got == list(range(11))
    assert max(receiver.sizes) <= 3
    assert caplog.text.count("does not answer") == 1


def test_a_slow_receiver_does_not_hold_up_the_sender() -> None:
    busy, release = threading.Event(), threading.Event()
    got: list[int] = []

    def send(items: list[int]) -> None:
        busy.set()
        assert release.wait(60)
        got.extend(items)

    box = MetricQueue(send, every=0.001)
    box.put([0])
    assert busy.wait(60)
    for i in range(1, 100):  # returns although the receiver takes nothing
        box.put([i])
    assert got == []
    release.set()
    box.close()
    assert got == list(range(100))


def test_too_much_waiting_drops_the_oldest_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    receiver = Receiver()
    receiver.down = True
    box = MetricQueue(receiver.send, every=10, limit=5)
    box.put(list(range(8)))
    receiver.down = False
    box.close()
    assert receiver.got == [3, 4, 5, 6, 7]
    assert "3 metric values never reached" in caplog.text


def test_what_is_lost_at_the_end_is_told(caplog: pytest.LogCaptureFixture) -> None:
    receiver = Receiver()
    receiver.down = True
    box = MetricQueue(receiver.send, every=10)
    box.put([1, 2])
    box.close(timeout=0.01)
    assert "2 metric values never reached" in caplog.text


def test_signs_of_life_come_without_values() -> None:
    beats = threading.Semaphore(0)
    box = MetricQueue[int](lambda items: None, every=0.01, tick=beats.release)
    for _ in range(4):
        assert beats.acquire(timeout=60)
    box.close()


def test_many_senders_lose_nothing() -> None:
    receiver = Receiver()
    box = MetricQueue(receiver.send, every=0.001, batch=7)
    senders = [
        threading.Thread(target=lambda k=k: [box.put([k]) for _ in range(200)]) for k in range(4)
    ]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    box.close()
    assert sorted(receiver.got) == sorted(list(range(4)) * 200)
