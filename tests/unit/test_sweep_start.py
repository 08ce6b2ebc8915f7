"""Starting the runs of a sweep: places, GPUs, processes that end badly, what SLURM is asked for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from slurm import fake_slurm

from mapo_lightning.files import FileLock
from mapo_lightning.run import job
from mapo_lightning.run.config import RunConfig
from mapo_lightning.run.main import main
from mapo_lightning.run.sweep import local, slurm, tasks
from mapo_lightning.run.sweep.settings import LaunchConfig, SlurmConfig
from mapo_lightning.run.sweep.tasks import Task
from mapo_lightning.stopping import Stopped
from mapo_lightning.training.settings import TrainerConfig
from mapo_lightning.types import ConfigError


def run(jobs: int = 0, **trainer: Any) -> RunConfig:
    return RunConfig(trainer=TrainerConfig(**trainer), launch=LaunchConfig(jobs=jobs))


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_each_run_has_a_gpu_of_its_own(four_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [p.gpus for p in local.places(run(accelerator="gpu"))] == ["0", "1", "2", "3"]
    assert [p.gpus for p in local.places(run(2, accelerator="auto"))] == ["0", "1"]
    assert [p.gpus for p in local.places(run(accelerator="gpu", devices=2))] == ["0,1", "2,3"]
    assert [p.gpus for p in local.places(run(3, accelerator="cpu"))] == ["", "", ""]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-abc")
    assert [p.gpus for p in local.places(run(accelerator="gpu"))] == ["5", "GPU-abc"]
    with pytest.raises(ConfigError, match=r"launch.jobs=3 runs side by side need .* launch.jobs=2"):
        local.places(run(3, accelerator="gpu"))
    with pytest.raises(ConfigError, match="this process sees 2 GPUs"):
        local.places(run(accelerator="gpu", devices=4))


def test_runs_side_by_side_share_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert local.places(run(accelerator="cpu")) == [local.Place("", 0)]
    assert local.places(run(3, accelerator="cpu")) == [local.Place("", 2)] * 3
    assert local.places(run(3, accelerator="cpu", threads=1)) == [local.Place("", 0)] * 3
    with pytest.raises(ConfigError, match="use launch=slurm"):
        local.places(run(accelerator="cpu", num_nodes=2))


PROGRAM = """
import json, os, pathlib, signal, sys, time
words = dict(word.split("=", 1) for word in sys.argv[1:])
folder = pathlib.Path(words["run_dir"])
with (folder / "starts").open("a") as file:
    again, launcher = os.environ.get("MAPO_RESTART_COUNT", "0"), os.environ["MAPO_LAUNCHER"]
    file.write(again + launcher + "\\n")
if words["do"] == "fail":
    sys.exit("error: a sentence")
if words["do"] == "crash":
    os.kill(os.getpid(), signal.SIGKILL)
if words["do"] == "silent":
    sys.exit(0)
if words["do"] == "wait":
    signal.signal(signal.SIGTERM, lambda *_: (folder / "saved").touch() or sys.exit(143))
    (folder / "waits").touch()
    time.sleep(600)
(folder / "finished.json").write_text("{}")
"""


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileLock:
    """Of a sweep; its runs are a program that does as it is told, not a training."""
    monkeypatch.setattr(
        local, "command", lambda task, *more: [sys.executable, "-c", PROGRAM, *task.words, *more]
    )
    found = FileLock(tmp_path / ".lock")
    found.acquire()
    return found


def task(folder: Path, do: str, needs: Task | None = None, name: str = "") -> Task:
    name = name or do
    return Task(name, folder / name, (f"do={do}", f"run_dir={folder / name}"), needs)


def test_a_run_that_fails_stops_no_other(tmp_path: Path, lock: FileLock) -> None:
    bad = task(tmp_path, "fail")
    after = task(tmp_path, "end", bad, "after")
    good = task(tmp_path, "end", None, "first")
    then = task(tmp_path, "end", good, "then")
    todo = [bad, after, task(tmp_path, "crash"), task(tmp_path, "silent"), good, then]
    failed = local.run_local(todo, [local.Place("", 0)] * 2, lock)
    assert failed == {
        "fail": "a sentence",
        "after": "its pre-training fail failed",
        "crash": "killed by SIGKILL",
        "silent": "exit code 0",
    }
    assert then.finished
    assert not after.folder.exists()
    began = good.folder / "starts"
    assert began.read_text() == f"0{os.getpid()}\n"
    again = local.run_local(todo, [local.Place("", 0)], lock)
    assert set(again) == set(failed)
    assert began.read_text() == f"0{os.getpid()}\n"  # finished: not started again
    assert (bad.folder / "starts").read_text() == f"0{os.getpid()}\n1{os.getpid()}\n"


def test_a_run_that_another_process_is_at_is_left_alone(tmp_path: Path, lock: FileLock) -> None:
    busy, free = task(tmp_path, "end", None, "busy"), task(tmp_path, "end", None, "free")
    other = FileLock(busy.folder / tasks.LOCK)
    other.acquire()
    failed = local.run_local([busy, free], [local.Place("", 0)], lock)
    assert list(failed) == ["busy"]
    assert "another process runs it" in failed["busy"]
    assert free.finished
    assert not (busy.folder / "starts").exists()
    other.release()
    assert local.run_local([busy, free], [local.Place("", 0)], lock) == {}


STOPPED = """
import signal
import sys
from pathlib import Path
from mapo_lightning.files import FileLock
from mapo_lightning.run.sweep import local
from mapo_lightning.run.sweep.tasks import Task
from mapo_lightning.stopping import Stopped, watched
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
folder = Path(sys.argv[1])
local.command = lambda task, *more: [sys.executable, "-c", sys.argv[2], *task.words]
lock = FileLock(folder / ".lock")
lock.acquire()
try:
    with watched():
        run = Task("wait", folder / "wait", ("do=wait", f"run_dir={folder}/wait"))
        local.run_local([run], [local.Place("", 0)], lock)
except Stopped as stopped:
    sys.exit(stopped.code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_is_stopped_has_its_runs_save(
    tmp_path: Path, root: Path, how: signal.Signals
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(tmp_path), PROGRAM],
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "wait/waits").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(how)
    code = process.wait(timeout=120)
    assert code == {signal.SIGTERM: 143, signal.SIGINT: 130}[how]
    if how == signal.SIGTERM:  # the program takes no other
        assert (tmp_path / "wait/saved").exists()
    free = FileLock(tmp_path / ".lock")
    assert free.acquire(wait=False)  # no run is left


def test_a_run_whose_sweep_is_gone_does_not_begin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(job.LAUNCHER, "1")  # not the parent of this process
    assert main(["env=toy", "--show"]) == 143
    assert "because its sweep has ended" in capsys.readouterr().err


def test_a_sweep_is_started_once_and_not_by_every_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], in_tmp: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["env=toy", "seed=0,1"]) == 2
    assert "start it without srun or torchrun" in capsys.readouterr().err
    assert list(in_tmp.iterdir()) == []


def test_what_slurm_is_asked_for() -> None:
    wanted = SlurmConfig(
        partition="long", time=60, warning=120, mem_gb=8, additional={"qos": "low"}
    )
    cfg = replace(run(accelerator="gpu", devices=2), launch=LaunchConfig("slurm", slurm=wanted))
    found = slurm.parameters(cfg, "mapo-x", ["7", "9"])
    assert (found["gpus_per_node"], found["tasks_per_node"], found["timeout_min"]) == (2, 2, 60)
    assert found["slurm_dependency"] == "afterany:7:9"
    assert found["slurm_additional_parameters"] == {"requeue": True, "qos": "low"}
    assert slurm.parameters(run(accelerator="cpu"), "x")["gpus_per_node"] is None
    assert slurm.parameters(run(accelerator="cpu"), "x")["slurm_dependency"] is None


@pytest.mark.parametrize(
    "values", [{"time": 0}, {"warning": 0}, {"gpus_per_node": -1}, {"mem_gb": 0.0}]
)
def test_slurm_settings_have_bounds(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(values))} must be"):
        SlurmConfig(**values)


def test_without_submitit_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=r"pip install 'mapo-lightning\[slurm\]'"):
        slurm.check_slurm()


def test_without_slurm_one_sentence_says_where_to_go(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"does not have sbatch, srun, sacct: .* a login node"):
        slurm.check_slurm()


@pytest.mark.slow
def test_a_slurm_without_accounts_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with fake_slurm(tmp_path / "slurm") as cluster:
        monkeypatch.setenv("PATH", cluster.environment["PATH"])
        monkeypatch.setenv("FAKE_SLURM", cluster.environment["FAKE_SLURM"])
        slurm.check_slurm()
        cluster.add("sacct", "echo Slurm accounting storage is disabled >&2; exit 1")
        with pytest.raises(ConfigError, match="it answers: Slurm accounting storage is disabled;"):
            slurm.check_slurm()


@pytest.mark.slow
def test_jobs_go_on_without_the_sweep_and_are_not_submitted_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    todo = [task(tmp_path, "end", None, name) for name in ("one", "two")]

    def stop(_: float) -> None:
        raise Stopped(signal.SIGINT)

    with fake_slurm(tmp_path / "slurm") as cluster:
        for name in ("PATH", "FAKE_SLURM"):
            monkeypatch.setenv(name, cluster.environment[name])
        cluster.add("srun", "exec sleep 600")
        for _ in range(2):
            with monkeypatch.context() as patch:
                patch.setattr(slurm.time, "sleep", stop)
                with pytest.raises(Stopped) as caught:
                    slurm.run_slurm(todo, run(accelerator="cpu"), tmp_path)
            said = f"they go on: resume={tmp_path} waits for them again, and 'scancel 1001' ends"
            assert said in str(caught.value)
            assert cluster.jobs() == [1001, 1002]  # both tasks of one array
        subprocess.run(["scancel", "1001"], check=True)
        assert [cluster.wait(job) for job in cluster.jobs()] == [143, 143]
        cluster.add("srun", "exit 3")  # what was cancelled is submitted again
        failed = slurm.run_slurm(todo, run(accelerator="cpu"), tmp_path)
        assert failed == {
            name: f"SLURM's job 1003_{number} ended as FAILED"
            for number, name in enumerate(("one", "two"))
        }
        assert cluster.jobs() == [1001, 1002, 1003, 1004]


def test_a_new_python_finds_this_package(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    assert tasks.import_path({"PYTHONPATH": "a:b"}) == f"{root}:a:b"
    assert tasks.import_path({"PYTHONPATH": f"{root}:b"}) == f"{root}:b"
    monkeypatch.setattr(tasks.site, "getsitepackages", lambda: [str(root)])
    assert tasks.import_path({}) is None
