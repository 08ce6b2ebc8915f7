"""An MLflow store that cannot be used is told in one sentence, before anything begins."""

from __future__ import annotations

import logging
import socket
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest

from mapo_lightning.run.main import main
from mapo_lightning.tracking import mlflow_client
from mapo_lightning.tracking.logger import (
    RunLogger,
    check_store,
    make_logger,
    open_store,
    start_parent,
    store_uri,
)
from mapo_lightning.tracking.settings import TrackingConfig
from mapo_lightning.tracking.store_check import SERVER_SECONDS
from mapo_lightning.types import ConfigError

pytestmark = pytest.mark.slow  # making MLflow's tables takes seconds


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a real store."""
    folder = tmp_path_factory.mktemp("store")
    open_store(at(folder))
    return folder


def at(folder: Path, **words: str) -> TrackingConfig:
    return TrackingConfig(
        uri=f"sqlite:///{folder}/mlflow.db", artifacts=str(folder / "artifacts"), **words
    )


def refused(cfg: TrackingConfig) -> str:
    """What the check says; opening says the same, and both leave the file as it is."""
    path = Path(cfg.uri.removeprefix("sqlite:///"))
    before = path.read_bytes() if path.is_file() else None
    said = []
    calls: tuple[Callable[[TrackingConfig], object], ...] = (check_store, open_store)
    for call in calls:
        with pytest.raises(ConfigError) as caught:
            call(cfg)
        said.append(str(caught.value))
    assert (path.read_bytes() if path.is_file() else None) == before
    assert said[0] == said[1]
    assert said[0].startswith("cannot open the MLflow store '")
    assert "\n" not in said[0]
    assert said[0].endswith(
        "Give another with tracking.uri=..., or switch it off with tracking.enabled=false."
    )
    return said[0]


def test_a_store_that_works_is_only_looked_at(place: Path, tmp_path: Path) -> None:
    before = (place / "mlflow.db").read_bytes()
    check_store(at(place))
    check_store(at(place, experiment="not there yet"))
    assert (place / "mlflow.db").read_bytes() == before
    check_store(at(tmp_path / "later"))
    check_store(TrackingConfig(enabled=False, uri="http://127.0.0.1:9"))
    assert list(tmp_path.iterdir()) == []


def test_a_deleted_experiment_is_named_and_can_come_back(place: Path) -> None:
    cfg = at(place, experiment="gone")
    identity = open_store(cfg)
    client = mlflow.MlflowClient(store_uri(cfg))
    client.delete_experiment(identity)
    said = refused(cfg)
    assert "its experiment 'gone' is deleted" in said
    assert f"'mlflow experiments restore --experiment-id {identity}'" in said
    with pytest.raises(ConfigError, match="is deleted"):
        start_parent(cfg, "run", {})
    client.restore_experiment(identity)
    assert open_store(cfg) == identity


def test_the_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "mlflow.db") as file:
        file.execute("CREATE TABLE labels (key TEXT)")
    assert "it is the database of another program, with the tables labels" in refused(at(tmp_path))


def test_what_is_no_database_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"not a database" * 100)
    assert "SQLite cannot read it (file is not a database)" in refused(at(tmp_path))


@pytest.mark.parametrize("table", ["experiments", "runs"])
def test_a_damaged_store_is_one_sentence(table: str, place: Path, tmp_path: Path) -> None:
    """The page of a table is overwritten: found by SQLite, or by MLflow when it comes there."""
    content = bytearray((place / "mlflow.db").read_bytes())
    with sqlite3.connect(place / "mlflow.db") as file:
        (page,) = file.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)
        ).fetchone()
        (size,) = file.execute("PRAGMA page_size").fetchone()
    content[(page - 1) * size : page * size] = b"\xff" * size
    (tmp_path / "mlflow.db").write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot open the MLflow store .*malformed") as caught:
        open_store(at(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("folder", ["/proc/mlflow", "/dev/null/mlflow"])
def test_a_folder_that_cannot_be_written_is_one_sentence(folder: str) -> None:
    with pytest.raises(ConfigError, match="cannot open the MLflow store"):
        open_store(at(Path(folder)))


def test_a_place_for_artifacts_that_cannot_be_made_is_told_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cfg = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", artifacts=f"{tmp_path}/file/a")
    assert f"'{tmp_path}/file' is not a folder that you may write to" in refused(cfg)


@pytest.fixture
def silent() -> Iterator[str]:
    """Address of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_server_that_says_nothing_is_given_up(
    silent: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert SERVER_SECONDS <= 15.0
    monkeypatch.setattr(mlflow_client, "SERVER_SECONDS", 0.5)
    with caplog.at_level(logging.INFO):
        said = refused(TrackingConfig(uri=silent))
    assert "the server does not answer within 0.5 s" in said
    assert f"asking the MLflow server at {silent}" in caplog.text


def test_a_server_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    said = refused(TrackingConfig(uri="http://me:canary@127.0.0.1:9"))
    assert "it cannot be reached (Connection refused)" in said
    assert "canary" not in said


def test_the_program_stops_before_it_makes_anything(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MAPO_RUN_DIR", raising=False)
    store = in_tmp / "mlflow.db"
    store.write_bytes(b"not a database" * 100)
    words = ["env=toy", "tracking.enabled=true", f"tracking.uri=sqlite:///{store}"]
    assert main(words) == 2
    assert list(in_tmp.iterdir()) == [store]
    assert capsys.readouterr().err.startswith("error: cannot open the MLflow store")


def test_one_bad_parameter_loses_itself_only(
    place: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_logger(at(place), "parameters")
    assert isinstance(run, RunLogger)
    monkeypatch.setattr(mlflow_client, "clean_name", lambda name: name)
    run.log_hyperparams({f"p{n}": n for n in range(120)} | {"a//b": "bad", "odd": "\udcff.mp4"})
    found = mlflow.MlflowClient(store_uri(at(place))).get_run(run.active_run).data.params
    assert found == {f"p{n}": str(n) for n in range(120)} | {"odd": "?.mp4"}
    assert "MLflow does not take a parameter, which is left out: " in caplog.text
    assert "a//b" in caplog.text
    assert run.failed_calls == 0
    run.finalize("success")


def test_one_bad_value_does_not_hold_up_the_others(
    place: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_logger(at(place), "values")
    assert isinstance(run, RunLogger)
    monkeypatch.setattr("mapo_lightning.tracking.logger.clean_name", lambda name: name)
    for step in range(1, 41):
        run.log_metrics({"good": float(step), "bad//name": 1.0}, step)
    assert run.flush()
    run.log_metrics({"good": 41.0, "bad//name": 1.0}, 41)
    assert run.flush()
    client = mlflow.MlflowClient(store_uri(at(place)))
    steps = [point.step for point in client.get_metric_history(run.active_run, "good")]
    assert steps == list(range(1, 42))
    assert set(client.get_run(run.active_run).data.metrics) == {"good"}
    assert 1 <= caplog.text.count("MLflow does not take a metric") <= 40
    run.finalize("success")


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("train/loss", "train/loss"),
        ("a@b[0]", "a_b_0_"),
        ("a//b", "a/b"),
        ("/a/./b/../c/", "a/b/c"),
        ("..", "_"),
        ("", "_"),
        ("x" * 249 + "/y", "x" * 249),
    ],
)
def test_every_name_becomes_one_that_mlflow_takes(name: str, clean: str, place: Path) -> None:
    assert mlflow_client.clean_name(name) == clean
    identity = open_store(at(place))
    client = mlflow.MlflowClient(store_uri(at(place)))
    run = client.create_run(identity).info.run_id
    client.log_metric(run, mlflow_client.clean_name(name), 1.0)
    client.log_param(run, mlflow_client.clean_name(name), 1.0)
    client.set_terminated(run)
