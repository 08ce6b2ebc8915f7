"""Sweeps of tiny runs: killed, with a run that fails, with shared pre-training, under SLURM.

And what a learning study measures in the folders of its runs.
"""

from __future__ import annotations

import csv
import json
import re
import signal
import time
from pathlib import Path

import program
import pytest
from killing import differences, state_of
from program import SMALL, TRAIN, end, start, train
from slurm import fake_slurm
from sweeps import checkpoints, finished, kill_when, recorded, repeated_points

from benchmarks.learning import main as measure_study

pytestmark = pytest.mark.slow

TUNE = [*SMALL, "stage=finetune", "callbacks.rollout_every=1000", "callbacks.checkpoint_every=5"]


def test_a_sweep_survives_kills_and_a_run_that_fails(tmp_path: Path) -> None:
    folder = tmp_path / "runs/s"
    words = [*TUNE, "tracking.enabled=true", "method=dreamerv2", "env.name=disc,nowhere"]
    words += ["run_dir=runs/s", "launch.jobs=2", "finetune.agent_steps=300"]
    kill_when(tmp_path, words, lambda: bool(checkpoints(folder)), runs_too=True)
    (newest,) = checkpoints(folder)
    begun = newest.stat().st_mtime_ns
    kill_when(tmp_path, words, lambda: newest.stat().st_mtime_ns > begun, runs_too=False)
    said = train(tmp_path, "resume=runs/s", code=2)
    assert "a sweep of 2 runs: 2 of env.name" in said
    assert re.search(r"error: 1 run of the sweep failed \(name=nowhere: .*nowhere", said), said
    assert f"resume={folder} tries it again" in said
    assert set(finished(folder)) == {"name=disc"}
    rows = {row["env.name"]: row for row in csv.DictReader((folder / "results.csv").open())}
    assert {name: row["finished"] for name, row in rows.items()} == {"disc": "1", "nowhere": "0"}
    played = json.loads((folder / "name=disc/evaluation.json").read_text())
    assert float(rows["disc"]["return"]) == played["policies"]["agent"]["return"]
    log = (folder / "name=disc/log.txt").read_text()
    assert log.count("this job was started again") == 2, log
    assert "stopped by SIGTERM after update" in log  # it noticed that its sweep was gone
    assert recorded(tmp_path / "runs/mlflow.db") == [
        ("name=disc", "FINISHED", "s"), ("name=disc/finetune", "FINISHED", "name=disc"),
        ("s", "FAILED", ""),
    ]  # fmt: skip
    assert repeated_points(tmp_path / "runs/mlflow.db", "train/actor", 219) == 0


def test_shared_pre_training_runs_once_and_changes_nothing(tmp_path: Path) -> None:
    words = [*SMALL, "agent.horizon=3,5"]
    train(tmp_path, *words, "run_dir=s", "launch.jobs=2")
    (pretrained,) = (tmp_path / "s").glob("pretrained-*")
    assert set(finished(tmp_path / "s")) == {"horizon=3", "horizon=5"}
    assert not list((tmp_path / "s").glob("horizon=*/pretrain"))
    train(tmp_path, *SMALL, "agent.horizon=5", "run_dir=alone")
    for one, other in (
        (tmp_path / "alone/pretrain/last.ckpt", pretrained / "pretrain/last.ckpt"),
        (tmp_path / "alone/finetune/last.ckpt", tmp_path / "s/horizon=5/finetune/last.ckpt"),
    ):
        assert list(differences(state_of(one), state_of(other))) == []
    # A second start finds nothing to do, and sums up again.
    before = finished(tmp_path / "s")
    (tmp_path / "s/results.csv").unlink()
    assert "3 of 3 are finished" in train(tmp_path, *words, "run_dir=s")
    assert finished(tmp_path / "s") == before
    assert (tmp_path / "s/results.csv").is_file()


def test_preflight_measures_one_run_of_each_setting(tmp_path: Path) -> None:
    said = train(tmp_path, *TUNE, "method=mapo,dreamerv2", "seed=0..4", "run_dir=s", "--preflight")
    assert "method=mapo+seed=0, one of 5:\nmeasured on 8 updates" in said
    assert "method=dreamerv2+seed=0, one of 5:" in said
    assert said.count("in all: ") == 2
    assert not (tmp_path / "s").exists()


def test_an_array_of_slurm_runs_a_sweep_with_a_requeue_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "s"
    words = [*SMALL, "callbacks.rollout_every=1000", "callbacks.checkpoint_every=5", "run_dir=s"]
    words += ["agent.horizon=3,5", "launch=slurm", "finetune.agent_steps=400"]
    with fake_slurm(tmp_path / "slurm") as slurm, (tmp_path / "said.txt").open("w") as said:
        for name in ("PATH", "FAKE_SLURM"):
            monkeypatch.setitem(program.ENVIRONMENT, name, slurm.environment[name])
        process = start(tmp_path, TRAIN, *words, said=said)
        deadline = time.monotonic() + program.PATIENCE
        first = folder / "horizon=3/finetune/last.ckpt"
        while not first.exists():
            assert time.monotonic() < deadline
            assert process.poll() is None, (tmp_path / "said.txt").read_text()
            time.sleep(0.01)
        jobs = {slurm.about(job)["task"]: job for job in slurm.jobs()}
        slurm.signal(jobs[0], signal.SIGUSR2)
        code = process.wait(timeout=program.PATIENCE)
        end(process)
        told = (tmp_path / "said.txt").read_text()
        assert code == 0, told
        about = {task: slurm.about(job) for task, job in jobs.items()}
    log = (folder / "horizon=3/log.txt").read_text()
    # The shared pre-training is a job of its own, for which the array of both runs waits.
    assert {task: known["restarts"] for task, known in about.items()} == {None: 0, 0: 1, 1: 0}, log
    assert about[0]["options"]["dependency"] == "afterany:1001"
    assert "stopped by SIGUSR2 after update" in log
    assert f"this job was started again: the run in '{folder}/horizon=3' goes on" in log
    assert "submitted job 1001 (tasks: 1)\nsubmitted job 1002 (tasks: 2)" in told
    assert set(finished(folder)) == {"horizon=3", "horizon=5"}
    assert len(list(folder.glob("pretrained-*/finished.json"))) == 1
    assert "| `5` | 1 of 1 |" in told


def test_what_a_study_measures_beside_its_runs_is_measured_once(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["trainer=debug", "experiment=learning/toy", "world_model.image.channels=[4]"]
    words += ["demo.clips_per_scene=8", "tracking.enabled=false", "callbacks.told=0"]
    train(in_tmp, *words, "run_dir=runs/one")
    measure_study([Path("runs")])
    said = capsys.readouterr().out
    assert re.search(r"one: error 5 frames ahead [\d.]+ thousandths", said)
    assert re.search(r"one: reward foreseen -?\d\.\d\d, ten steps -?\d\.\d\d", said)
    dreams = json.loads((in_tmp / "runs/one/dreams.json").read_text())
    assert {"told 5", "untold 5", "copy 5", "still_scene 10"} <= dreams.keys()
    for name in ("dreams.json", "foresight.json"):  # a number of our own, to be read again
        path = in_tmp / "runs/one" / name
        kept = json.loads(path.read_text())
        path.write_text(json.dumps(kept | {"told 5": 9.5} if name == "dreams.json" else [1.0, 0.5]))
    measure_study([Path("runs")])
    said = capsys.readouterr().out
    assert "ahead 9.5 thousandths" in said
    assert "reward foreseen 1.00, ten steps 0.50" in said
