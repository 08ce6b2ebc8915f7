"""MLflow under real conditions: a server that crashes, eight runs at once, PostgreSQL."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pytest
from mlflow_server import free_port, mlflow_server
from program import ENVIRONMENT, SMALL, TRAIN, Forked, end, start, train

from mapo_lightning.tracking.settings import TrackingConfig

pytestmark = pytest.mark.hard

FINETUNE = [*SMALL, "stage=finetune", "callbacks.rollout_every=1000"]


def curve(client: mlflow.MlflowClient, name: str) -> list[int]:
    """Steps of a curve of the only fine-tuning."""
    experiment = client.get_experiment_by_name("mapo")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "attributes.run_name = 'run/finetune'")
    assert [run.info.status for run in runs] == ["FINISHED"]
    return [point.step for point in client.get_metric_history(runs[0].info.run_id, name)]


def test_a_whole_training_outlives_a_crash_of_the_server(tmp_path: Path) -> None:
    with mlflow_server(tmp_path) as server:
        client = mlflow.MlflowClient(server.uri)
        words = [*FINETUNE, "tracking.enabled=true", f"tracking.uri={server.uri}", "run_dir=run"]
        words += ["finetune.agent_steps=6110", "callbacks.checkpoint_every=20"]
        last = tmp_path / "run/finetune/last.ckpt"
        with_it: list[float] = []
        without: list[float] = []
        with (tmp_path / "said.txt").open("w") as said:
            process = start(tmp_path, TRAIN, *words, said=said)
            try:
                wait_for(lambda: last.exists(), process)
                for _ in range(3):
                    with_it += saves(last, process, 6)
                    server.kill()
                    without += saves(last, process, 6)
                    server.start()
                process.wait(900)
            finally:
                end(process)
        assert process.returncode == 0, (tmp_path / "said.txt").read_text()
        pace = [statistics.median(found) for found in (with_it, without)]
        print(
            "\nseconds per 20 updates, median of 18: {:.2f} with, {:.2f} without it".format(*pace)
        )
        steps = curve(client, "train/actor")
        initial = curve(client, "initial/train/actor")
    # One of every update; the first that acts begins where the prefill has ended.
    assert (steps[0], len(steps), len(set(steps))) == (220, 1200, 1200)
    assert initial == [1, 2]


def test_a_report_of_a_server_is_that_of_the_folders(tmp_path: Path) -> None:
    with mlflow_server(tmp_path) as server:
        store = [f"tracking.uri={server.uri}", "tracking.experiment=study"]
        words = [*SMALL, *store, "tracking.enabled=true", "env=toy", "stage=finetune", "seed=0,1"]
        words += ["method=mapo,apv", "finetune.agent_steps=400", "evaluate.every=40"]
        train(tmp_path, *words, "run_dir=sweep")
        for name, runs in (("folders", ["sweep"]), ("server", ["experiment=study", store[0]])):
            command = [sys.executable, "-m", "mapo_lightning.report", *runs, f"out={name}"]
            subprocess.run(command, check=True, cwd=tmp_path, env=ENVIRONMENT)

    def table(name: str, file: str, rows: slice) -> list[list[str]]:
        with (tmp_path / name / f"{file}.csv").open() as lines:
            return [row[rows] for row in csv.reader(lines)]

    for file in ("curves", "comparisons"):
        assert table("server", file, slice(None)) == table("folders", file, slice(None))
    runs = table("server", "runs", slice(10))  # up to its return
    assert runs == table("folders", "runs", slice(10))
    assert [row[1] for row in runs] == ["state"] + ["finished"] * 4
    # The success of policies that learn nothing is in the folders only.
    scores = table("server", "scores", slice(8))
    assert scores == table("folders", "scores", slice(8))
    assert [row[1] for row in scores[1:]] == ["mapo", "apv", "random", "random_held", "still"]


def wait_for(true: object, process: Forked | subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while not true():  # type: ignore[operator]
        assert process.poll() is None, "the training ended"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def saves(path: Path, process: Forked | subprocess.Popen[str], count: int) -> list[float]:
    """Wait until a file has been replaced so many times; returns the seconds between."""
    at = []
    for _ in range(count + 1):
        before = path.stat().st_mtime_ns
        wait_for(lambda before=before: path.stat().st_mtime_ns != before, process)
        at.append(time.monotonic())
    return [later - earlier for earlier, later in itertools.pairwise(at)]


RUN = """
import sys
from mapo_lightning.tracking.logger import *
cfg = TrackingConfig(uri=sys.argv[1], artifacts=sys.argv[2])
parent = start_parent(cfg, "run", {})
logger = make_logger(cfg, "finetune", parent)
for step in range(400):
    logger.log_metrics({f"m{i}": float(step) for i in range(5)}, step)
assert logger.flush(240)
logger.finalize("success")
finish_parent(parent, "FINISHED", cfg)
print(logger.active_run)
"""


def test_eight_runs_at_once_write_to_one_sqlite_file(tmp_path: Path) -> None:
    cfg = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", artifacts=str(tmp_path / "a"))
    words = [sys.executable, "-c", RUN, cfg.uri, cfg.artifacts]
    began = time.monotonic()
    runs = [
        subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    outs = [run.communicate(timeout=600)[0] for run in runs]
    assert [run.returncode for run in runs] == [0] * 8
    client = mlflow.MlflowClient(cfg.uri)
    for out in outs:
        for name in ("m0", "m4"):
            history = client.get_metric_history(out.split()[-1], name)
            assert [point.step for point in history] == list(range(400))
    print(f"\n8 runs x 2,000 values in one file: {time.monotonic() - began:.0f} s")


@contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL of Debian's package on 127.0.0.1, owned by an unprivileged user."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not binaries:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    if importlib.util.find_spec("psycopg2") is None:
        pytest.skip("needs psycopg2: pip install psycopg2-binary")
    user: dict[str, str] = {"user": "nobody"} if os.geteuid() == 0 else {}
    folder, port = Path(tempfile.mkdtemp(prefix="mapo-pg-", dir="/tmp")), free_port()
    if user:
        shutil.chown(folder, "nobody")
    data = folder / "data"
    command = [str(binaries[-1] / "pg_ctl"), "-D", str(data), "-w", "-l", str(folder / "log")]

    def call(*words: str) -> None:
        subprocess.run(words, check=True, cwd=folder, stdout=subprocess.DEVNULL, **user)  # type: ignore[call-overload]

    call(str(binaries[-1] / "initdb"), "-D", str(data), "-U", "mlflow", "--auth=trust")
    call(*command, "-o", f"-p {port} -k {folder} -h 127.0.0.1", "start")
    try:
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
    finally:
        call(*command, "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def test_a_training_is_recorded_in_postgresql(tmp_path: Path) -> None:
    with postgres() as store, mlflow_server(tmp_path, store) as server:
        words = ["tracking.enabled=true", f"tracking.uri={server.uri}", "run_dir=run"]
        train(tmp_path, *FINETUNE, *words)
        client = mlflow.MlflowClient(server.uri)
        assert len(curve(client, "initial/train/actor") + curve(client, "train/actor")) == 6
        experiment = client.get_experiment_by_name("mapo")
        wanted = "attributes.run_name = 'run/finetune'"
        (run,) = client.search_runs([experiment.experiment_id], wanted)
        place = Path(client.download_artifacts(run.info.run_id, "checkpoints"))
        assert (place / "last.ckpt").stat().st_size > 0
