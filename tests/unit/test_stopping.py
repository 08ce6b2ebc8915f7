"""What signals do: at once outside of an update, after it inside; codes and words of the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gymnasium.vector import AsyncVectorEnv

from mapo_lightning import stopping
from mapo_lightning.envs.factory import make_vector_env
from mapo_lightning.envs.settings import EnvConfig
from mapo_lightning.run import main as program
from mapo_lightning.stopping import CODES, Signals, Stopped, watched


class Clock:
    """Time that passes when a test says so, and the timer that was set."""

    def __init__(self) -> None:
        self.now, self.timer = 0.0, 0.0
        self.signals = Signals(lambda: self.now, self.set)

    def set(self, seconds: float) -> None:
        self.timer = seconds


@pytest.mark.parametrize(("number", "code"), CODES.items())
def test_outside_of_an_update_a_signal_stops_at_once(number: int, code: int) -> None:
    with pytest.raises(Stopped) as caught:
        Clock().signals(number)
    assert (caught.value.code, caught.value.signal) == (code, number)
    assert not isinstance(caught.value, Exception)


def test_inside_of_one_it_waits_and_a_second_one_does_not() -> None:
    clock = Clock()
    clock.signals.hold()
    clock.signals(signal.SIGUSR1)
    assert (clock.signals.asked, clock.timer) == (signal.SIGUSR1, stopping.GRACE)
    clock.now = 0.5
    clock.signals(signal.SIGTERM)  # a terminal and a launcher pass on the same request
    clock.now = 5.0
    with pytest.raises(Stopped) as caught:
        clock.signals(signal.SIGTERM)
    assert caught.value.signal == signal.SIGUSR1  # which decides about the exit code
    assert clock.timer == 0.0


def test_an_update_that_does_not_end_is_broken_off() -> None:
    clock = Clock()
    clock.signals.late(signal.SIGALRM)  # of nobody's request
    clock.signals.hold()
    clock.signals(signal.SIGTERM)
    with pytest.raises(Stopped):
        clock.signals.late(signal.SIGALRM)
    assert not clock.signals.held


def test_some_work_inside_may_be_broken_off_and_the_request_stays_noted() -> None:
    clock = Clock()
    clock.signals.hold()
    with pytest.raises(Stopped), clock.signals.interruptible():
        clock.signals(signal.SIGTERM)
    assert (clock.signals.held, clock.signals.asked) == (True, signal.SIGTERM)
    begun = False
    with pytest.raises(Stopped), clock.signals.interruptible():
        begun = True
    assert not begun


@pytest.mark.parametrize("number", CODES)
def test_a_real_signal_ends_a_wait_with_a_sentence_and_a_code(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # a shell's background job ignores SIGINT

    def run(words: list[str]) -> None:
        os.kill(os.getpid(), number)
        time.sleep(60)

    monkeypatch.setattr(program, "run", run)
    try:
        assert program.main([]) == CODES[signal.Signals(number)]
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert capsys.readouterr().err == f"stopped by {signal.Signals(number).name}\n"


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        with watched():
            os.kill(os.getpid(), signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)


CHILD = """
import multiprocessing, os, signal, sys, time
from mapo_lightning.stopping import leave_to_parent, watched

def work(pipe):
    pipe.send("up")
    pipe.send(pipe.recv())

if __name__ == "__main__":
    with watched():
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe()
        child = context.Process(target=work, args=(there,))
        child.start()
        assert here.recv() == "up"
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            os.kill(child.pid, number)
        here.send("still there")
        assert here.recv() == "still there"
        child.join()
        assert child.exitcode == 0
"""


@pytest.mark.slow
def test_a_forked_child_leaves_signals_to_its_parent(tmp_path: Path, root: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_environments_with_processes_leave_the_programs_own_signals_alone() -> None:
    before = {number: signal.getsignal(number) for number in (*CODES, signal.SIGALRM)}
    envs = make_vector_env(EnvConfig(kind="dmc", name="cartpole_swingup"), 0, 2)
    try:
        assert isinstance(envs, AsyncVectorEnv)
        assert {number: signal.getsignal(number) for number in before} == before
        for process in envs.processes:
            os.kill(process.pid, signal.SIGINT)  # as a terminal does to all of them
        envs.reset(seed=[0, 1])
        assert all(process.is_alive() for process in envs.processes)
    finally:
        envs.close()
