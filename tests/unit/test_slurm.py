"""The fake SLURM does what SLURM's manual says, and a run knows its job by SLURM's variables."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm import Slurm, fake_slurm

from mapo_lightning.run import job
from mapo_lightning.run import main as program
from mapo_lightning.stopping import Stopped
from mapo_lightning.types import DivergedError

pytestmark = pytest.mark.slow


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    with fake_slurm(tmp_path / "slurm") as slurm:
        yield slurm


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.01)


ARRAY = """#!/bin/bash
#SBATCH --array=3-4     # two seeds
#SBATCH --output=out-%A_%a.txt
srun --ntasks=2 bash -c 'echo "$SLURM_ARRAY_TASK_ID $SLURM_PROCID $SLURM_NTASKS $0"' "$1"
"""


def test_an_array_starts_its_tasks_with_their_numbers_and_arguments(
    slurm: Slurm, tmp_path: Path
) -> None:
    (tmp_path / "job.sh").write_text(ARRAY)
    jobs = slurm.submit(tmp_path, "job.sh", "word")
    assert [slurm.wait(number) for number in jobs] == [0, 0]
    for task in (3, 4):
        lines = sorted((tmp_path / f"out-{jobs[0]}_{task}.txt").read_text().splitlines())
        assert lines == [f"{task} {rank} 2 word" for rank in (0, 1)]


AGAIN = """#!/bin/bash
#SBATCH --ntasks=1
srun bash -c 'trap "exit 75" USR1; touch "up$SLURM_RESTART_COUNT"
    until [ -n "$SLURM_RESTART_COUNT" ]; do sleep 0.02; done; echo "$SLURM_RESTART_COUNT" >> counts'
code=$?
[ $code = 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit $code
"""


def test_a_signal_reaches_the_step_and_a_requeued_job_starts_again_with_its_number(
    slurm: Slurm, tmp_path: Path
) -> None:
    (tmp_path / "job.sh").write_text(AGAIN)
    (number,) = slurm.submit(tmp_path, "job.sh")
    wait_for(tmp_path / "up")
    slurm.signal(number, signal.SIGUSR1)
    assert slurm.wait(number) == 0
    assert slurm.about(number)["restarts"] == 1
    assert (tmp_path / "counts").read_text() == "1\n"


def clean(monkeypatch: pytest.MonkeyPatch, **given: str) -> None:
    names = ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT", "PROCID", "NTASKS")
    for name in [f"SLURM_{name}" for name in names]:
        monkeypatch.delenv(name, raising=False)
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("given", "name", "restarted", "rank"),
    [
        ({}, None, False, 0),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "3"}, "job7", False, 3),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}, "job7", True, 0),
        (
            {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"},
            "job7_0", False, 0,
        ),
        ({"TORCHELASTIC_RUN_ID": "ab", "RANK": "5", "LOCAL_RANK": "1"}, "jobab", False, 5),
        ({"TORCHELASTIC_RUN_ID": "ab", "TORCHELASTIC_RESTART_COUNT": "1"}, "jobab", True, 0),
        ({"LOCAL_RANK": "1"}, None, False, 1),
    ],
)  # fmt: skip
def test_a_job_is_known_by_its_variables(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], name: str, restarted: bool, rank: int
) -> None:
    clean(monkeypatch, **given)
    assert (job.job_name(), job.restarted(), job.rank()) == (name, restarted, rank)


def test_torchrun_without_an_id_is_known_by_its_own_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clean(monkeypatch, TORCHELASTIC_RUN_ID="none")
    name = job.job_name()
    assert name is not None
    assert name == job.job_name()
    assert name.endswith(f"-{__import__('os').getppid()}")


@pytest.mark.parametrize("array", [False, True])
def test_a_run_asks_slurm_to_start_it_again(
    slurm: Slurm, monkeypatch: pytest.MonkeyPatch, array: bool, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    slurm.add("scontrol", f'echo "$@" > {tmp_path}/asked')
    clean(monkeypatch, SLURM_JOB_ID="9", PATH=slurm.environment["PATH"])
    if array:
        clean(monkeypatch, SLURM_JOB_ID="9", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="1")
    job.requeue()
    assert (tmp_path / "asked").read_text() == f"requeue {'7_1' if array else '9'}\n"
    slurm.add("scontrol", "echo no such job >&2; exit 1")
    with caplog.at_level(logging.ERROR):
        job.requeue()
    assert "no such job; submit the job again" in caplog.text


@pytest.mark.parametrize(
    ("environment", "agreed", "code"),
    [
        ({}, True, 75),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, True, 75),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, True, 0),
        ({"RANK": "1", "LOCAL_RANK": "0"}, True, 0),
        ({"LOCAL_RANK": "1"}, True, 0),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, False, 75),  # it alone was told
    ],
)
def test_of_processes_that_stop_together_the_first_says_so(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], agreed: bool, code: int
) -> None:
    """So that `srun --kill-on-bad-exit` does not kill it while it still has files to hand over."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def stop(_: object) -> None:
        raise Stopped(signal.SIGUSR1, "after update 3", agreed=agreed)

    monkeypatch.setattr(program, "run", stop)
    assert program.main([]) == code

    def diverge(_: object) -> None:
        raise DivergedError("image is NaN in update 3")  # on all of them

    monkeypatch.setattr(program, "run", diverge)
    assert program.main([]) == (2 if job.rank() == 0 else 0)
