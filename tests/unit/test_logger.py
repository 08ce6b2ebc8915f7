from __future__ import annotations

import json
import math
import os
import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import mlflow
import numpy as np
import pytest

from mapo_lightning.tracking import artifacts
from mapo_lightning.tracking import mlflow_client as mlflow_store
from mapo_lightning.tracking.logger import (
    RunLogger,
    finish_parent,
    make_logger,
    open_store,
    start_parent,
    store_uri,
)
from mapo_lightning.tracking.settings import TrackingConfig
from mapo_lightning.types import ConfigError


@pytest.fixture
def run(cfg: TrackingConfig) -> Iterator[RunLogger]:
    logger = make_logger(cfg, "child")
    assert isinstance(logger, RunLogger)
    yield logger
    logger.finalize("success")


def client(cfg: TrackingConfig) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(store_uri(cfg))


@pytest.mark.slow
def test_the_experiment_has_its_page_and_its_artifacts_beside_the_store(
    cfg: TrackingConfig,
) -> None:
    experiment = client(cfg).get_experiment_by_name("mapo")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert experiment.artifact_location == Path(cfg.artifacts).as_uri()
    assert open_store(cfg) == experiment.experiment_id  # a second time finds the same


def test_relative_stores_are_anchored_where_the_program_starts(in_tmp: Path) -> None:
    assert store_uri(TrackingConfig()) == f"sqlite:///{in_tmp}/runs/mlflow.db"
    assert store_uri(TrackingConfig(uri="http://host:5000")) == "http://host:5000"


@pytest.mark.slow
def test_a_child_belongs_to_its_parent(cfg: TrackingConfig) -> None:
    parent = start_parent(cfg, "demo", {"stage": "all"})
    logger = make_logger(cfg, "pretrain", parent, {"stage": "pretrain"})
    assert isinstance(logger, RunLogger)
    assert parent is not None
    child = client(cfg).get_run(logger.active_run)
    assert child.data.tags["mlflow.parentRunId"] == parent
    assert child.data.tags["stage"] == "pretrain"
    assert child.info.run_name == "pretrain"
    assert child.info.status == "RUNNING"

    logger.finalize("success")
    finish_parent(parent, "FAILED", cfg)
    assert client(cfg).get_run(logger.active_run).info.status == "FINISHED"
    assert client(cfg).get_run(parent).info.status == "FAILED"


@pytest.mark.slow
def test_metrics_arrive_in_order_under_clean_names(cfg: TrackingConfig, run: RunLogger) -> None:
    for step in range(2500):  # more than one delivery
        run.log_metrics({"train/loss": 1.0 / (step + 1), "a@b[0]": 1.0}, step)
    run.log_metrics({"odd": math.nan}, 1)
    assert run.flush()
    history = client(cfg).get_metric_history(run.active_run, "train/loss")
    assert [point.step for point in history] == list(range(2500))
    assert history[-1].value == 1.0 / 2500
    assert set(client(cfg).get_run(run.active_run).data.metrics) == {"train/loss", "a_b_0_", "odd"}


@pytest.mark.slow
def test_on_a_full_disk_values_wait_until_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", artifacts=str(tmp_path / "a"))
    run = make_logger(cfg, "full")
    assert isinstance(run, RunLogger)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "mlflow.db").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # bytes of a file; stops root too
    try:
        run.log_metrics({f"m{i}": 1.0 for i in range(3000)}, 1)
        assert not run.flush(timeout=0.0)
        assert not artifacts.log_text(run, "x" * size, "large.txt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.flush(timeout=60.0)
    run.finalize("success")
    assert len(client(cfg).get_run(run.active_run).data.metrics) == 3000
    assert "does not answer, values wait" in caplog.text


@pytest.mark.slow
def test_resuming_adds_neither_a_run_nor_a_point_twice(cfg: TrackingConfig) -> None:
    first = make_logger(cfg, "long")
    assert isinstance(first, RunLogger)
    first.log_hyperparams({"rate": 0.1, "seed": 1})
    for step in range(10):
        first.log_metrics({"loss": float(step)}, step)
    first.finalize("failed")

    for attempt in (1, 2):
        again = make_logger(cfg, "long", run_id=first.active_run)
        assert isinstance(again, RunLogger)
        assert client(cfg).get_run(again.active_run).info.status == "RUNNING"
        again.log_hyperparams({"rate": 0.1 * (attempt + 1), "seed": 1, "new": attempt})
        for step in range(7, 10 + attempt):  # the checkpoint was older than the last point
            again.log_metrics({"loss": -1.0}, step)
        again.finalize("success")

    found = client(cfg).get_run(first.active_run)
    steps = [p.step for p in client(cfg).get_metric_history(first.active_run, "loss")]
    assert steps == list(range(12))
    assert found.data.params == {"rate": "0.1", "seed": "1", "new": "1"}
    assert json.loads(found.data.tags["resume.1.changed"]) == ["rate: 0.1 -> 0.2"]
    assert len(json.loads(found.data.tags["resume.2.changed"])) == 2
    assert found.info.status == "FINISHED"


@pytest.mark.slow
@pytest.mark.parametrize("arrived", [0, 4, 5, 7])
def test_curves_go_on_from_a_checkpoint_without_gap_or_repetition(
    cfg: TrackingConfig, arrived: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many values had arrived when the process was killed; some share their step."""
    points = list(enumerate([10, 10, 10, 12, 14, 14, 16, 18, 20]))
    broken: list[RunLogger] = []
    send = RunLogger._send

    def deliver(self: RunLogger, values: list[mlflow_store.Point]) -> None:
        if self in broken:
            raise ConnectionError("the process is dead")
        send(self, values)

    monkeypatch.setattr(RunLogger, "_send", deliver)
    first = make_logger(cfg, "killed")
    assert isinstance(first, RunLogger)
    state = first.state()
    for value, step in points[:7]:
        if value == 5:
            state = first.state()  # the checkpoint
        if value == arrived:
            assert first.flush()
            broken.append(first)
        first.log_metrics({"loss": float(value)}, step)
    if arrived == 7:
        assert first.flush()
        broken.append(first)
    again = make_logger(cfg, "killed", run_id=first.active_run)
    assert isinstance(again, RunLogger)
    again.resume(json.loads(json.dumps(state)))
    for value, step in points[5:]:
        again.log_metrics({"loss": float(value)}, step)
    assert again.state()["counts"] == {"loss": 9}
    again.finalize("success")
    history = client(cfg).get_metric_history(first.active_run, "loss")
    assert [(point.value, point.step) for point in history] == points


def test_parameters_are_shortened_aloud_and_more_than_a_call_takes(
    cfg: TrackingConfig, run: RunLogger
) -> None:
    run.log_hyperparams({"long": "x" * 7000, **{f"p{i}": i for i in range(150)}})
    params = client(cfg).get_run(run.active_run).data.params
    assert len(params) == 151
    assert len(params["long"]) == 6000
    assert params["long"].endswith("[shortened, 7000 characters]")


def test_secrets_stay_here(cfg: TrackingConfig, run: RunLogger) -> None:
    token = "hf_" + "canary" * 4
    run.log_hyperparams({"vlm.api_key": "canary-1", "uri": "http://me:canary-2@host"})
    mlflow_store.set_tags(run.experiment, run.active_run, {"note": token})
    artifacts.log_text(run, f"key {token}", "note.txt")
    artifacts.log_dict(run, {"password": "canary-3", "rows": [{"token": "canary-4"}]}, "d.json")
    artifacts.log_table(run, [{"secret": "canary-5"}], "table")
    run.flush()
    for path in Path(cfg.artifacts).parent.rglob("*"):
        if path.is_file() and path.suffix != ".csv":
            assert b"canary" not in path.read_bytes(), path


def test_artifacts_lie_where_the_pages_look_for_them(cfg: TrackingConfig, run: RunLogger) -> None:
    image_HWC = np.full((8, 8, 3), 200, np.uint8)
    assert artifacts.log_image(run, image_HWC, "images/a.png")
    assert artifacts.log_html(run, "<p>hello</p>", "pages/a.html", "<script>")
    assert artifacts.log_table(run, [{"text": "=1+1", "n": -1}, {"text": "ok\x1b[31m"}], "t/x")
    place = Path(client(cfg).download_artifacts(run.active_run, ""))
    page = (place / "pages/a.html").read_text()
    assert "default-src 'none'" in page
    assert "<script>" not in page
    assert (place / "t/x.csv").read_text().splitlines() == ["text,n", "'=1+1,-1", "ok [31m,"]
    assert json.loads((place / "t/x.json").read_text())[0] == {"text": "=1+1", "n": -1}


def test_an_artifact_that_cannot_be_stored_is_counted_not_raised(
    run: RunLogger, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not artifacts.log_file(run, tmp_path / "missing.ckpt", "checkpoints")
    assert run.failed_calls == 1
    assert "missing.ckpt" in caplog.text
    assert not artifacts.log_text(None, "no logger", "a.txt")  # does nothing, says so


def test_runs_of_dead_processes_are_closed(cfg: TrackingConfig) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    dead = start_parent(cfg, "killed", {"pid": str(gone.pid)})
    silent = start_parent(cfg, "number taken over", {"heartbeat": "1000"})
    alive = start_parent(cfg, "alive", {})
    elsewhere = start_parent(cfg, "elsewhere", {"pid": str(gone.pid), "host": "another"})
    # Two containers of one name: a process number says nothing there, a heartbeat does.
    inside = {"pid": str(gone.pid), "pid_namespace": "another"}
    beating = start_parent(cfg, "beating", {**inside, "heartbeat": str(int(time.time()))})
    fresh = start_parent(cfg, "fresh", inside)
    quiet = start_parent(cfg, "quiet", {**inside, "heartbeat": "1000"})
    odd = start_parent(cfg, "odd", {"pid": "abc"})
    # Of these two, begun yesterday, one has a run that lives.
    held, left = (start_parent(cfg, name, inside) for name in ("held", "left"))
    start_parent(cfg, "inner", {"mlflow.parentRunId": str(held)})
    with sqlite3.connect(store_uri(cfg).removeprefix("sqlite:///")) as store:
        store.execute("UPDATE runs SET start_time = start_time - 86400000 WHERE name IN (?, ?)",
                      ("held", "left"))  # fmt: skip
    open_store(cfg)
    runs = {"KILLED": (dead, silent, quiet, left)}
    runs["RUNNING"] = (alive, elsewhere, beating, fresh, odd, held)
    for status, those in runs.items():
        assert {client(cfg).get_run(run).info.status for run in those} == {status}
    for run in runs["RUNNING"]:
        finish_parent(run, "FINISHED", cfg)


def test_a_run_that_goes_on_after_a_long_break_counts_as_alive(cfg: TrackingConfig) -> None:
    broken_off = start_parent(cfg, "run", {"heartbeat": "1000"})
    start_parent(cfg, "run", {}, broken_off)
    open_store(cfg)  # as another run does when it starts
    assert client(cfg).get_run(broken_off).info.status == "RUNNING"
    finish_parent(broken_off, "FINISHED", cfg)


def test_switched_off_means_nothing_is_written(in_tmp: Path) -> None:
    off = TrackingConfig(enabled=False)
    assert open_store(off) is None
    assert start_parent(off, "x", {}) is None
    assert make_logger(off, "x") is None
    finish_parent(None)
    assert list(in_tmp.iterdir()) == []


OTHER_RANK = """
from mapo_lightning.tracking.logger import *
cfg = TrackingConfig()
assert start_parent(cfg, "p", {}) is None
logger = make_logger(cfg, "c")
assert isinstance(logger, SilentLogger) and logger.run_id is None
logger.log_metrics({"a": 1.0}, 1)
logger.log_hyperparams({"a": 1})
logger.finalize("success")
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [{"LOCAL_RANK": "1"}, {"NODE_RANK": "1"}], ids=str)
def test_other_ranks_write_nothing(in_tmp: Path, root: Path, rank: dict[str, str]) -> None:
    env = {**os.environ, **rank, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", OTHER_RANK], env=env, check=True, timeout=120)
    assert list(in_tmp.iterdir()) == []


FIRST_USE = """
import sys
from mapo_lightning.tracking.logger import *
cfg = TrackingConfig(uri=sys.argv[1], artifacts=sys.argv[2])
logger = make_logger(cfg, "racer")
for step in range(50):
    logger.log_metrics({"a": 1.0}, step)
logger.finalize("success")
print(logger.active_run)
"""


@pytest.mark.slow
def test_many_first_users_at_once_do_not_ruin_the_store(tmp_path: Path, root: Path) -> None:
    cfg = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", artifacts=str(tmp_path / "a"))
    words = [sys.executable, "-c", FIRST_USE, cfg.uri, cfg.artifacts]
    env = {**os.environ, "PYTHONPATH": str(root)}
    racers = [subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outs = [racer.communicate(timeout=240)[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    for out in outs:
        assert len(client(cfg).get_metric_history(out.split()[-1], "a")) == 50


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("file:./mlruns", "uri must start with sqlite:/// or http"),
        ("ftp://me:canary@host", r"got 'ftp://\*\*\*@host'"),
    ],
)
def test_stores_that_cannot_work_are_refused(uri: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrackingConfig(uri=uri)
    with pytest.raises(ConfigError, match="experiment must be a name"):
        TrackingConfig(experiment=" ")


def test_a_store_that_does_not_open_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cfg = TrackingConfig(uri=f"sqlite:///{tmp_path}/file/mlflow.db")
    with pytest.raises(ConfigError, match=r"cannot open the MLflow store .*tracking.enabled=false"):
        open_store(cfg)


class TrackingServer(BaseHTTPRequestHandler):
    """As much of MLflow's server as ends a run."""

    ended: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        self.ended.append(self.path)
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        info = {"run_id": "r", "experiment_id": "1", "run_name": "one", "status": "FINISHED"}
        body = json.dumps({"run": {"info": info, "data": {}}, "run_info": info}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_mlflow_itself_prints_no_address_with_a_password(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = mlflow.get_tracking_uri()
    server = ThreadingHTTPServer(("127.0.0.1", 0), TrackingServer)
    Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://me:canary-7@127.0.0.1:{server.server_address[1]}"
    try:
        monkeypatch.delenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", raising=False)
        mlflow.set_tracking_uri(uri)
        mlflow.MlflowClient().set_terminated("r")  # what MLflow does by itself
        assert "canary-7" in capfd.readouterr().out
        finish_parent("r", cfg=TrackingConfig(uri=uri))
        assert sum("runs/update" in path for path in TrackingServer.ended) == 2
        assert "canary-7" not in "".join(capfd.readouterr())
    finally:
        mlflow.set_tracking_uri(before)
        server.shutdown()
        server.server_close()
