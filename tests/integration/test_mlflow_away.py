"""The MLflow server goes away during a training: it goes on, and every value arrives, once."""

from __future__ import annotations

import logging
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning as L
import mlflow
import pytest
import torch
from mlflow_server import Door, MlflowServer, mlflow_server

from callbacks.recorder import MLflowRecorder
from mapo_lightning.tracking.logger import Kept, RunLogger, make_logger
from mapo_lightning.tracking.mlflow_client import Point
from mapo_lightning.tracking.queue import MetricQueue
from mapo_lightning.tracking.settings import TrackingConfig

pytestmark = pytest.mark.slow


class Line(L.LightningModule):
    """The smallest thing that trains; calls something after an update."""

    def __init__(self, after: dict[int, Callable[[], object]]) -> None:
        super().__init__()
        self.layer, self.after = torch.nn.Linear(1, 1), after

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.layer(batch[0]).pow(2).mean()
        self.log("train/loss", loss)
        return loss

    def on_train_batch_end(self, *_: object) -> None:
        call = self.after.get(self.global_step)
        if call is not None:
            call()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as running:
        yield running


def test_a_training_outlives_an_outage_and_loses_and_doubles_no_value(
    server: MlflowServer, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    door = Door(server.port)
    door.open()
    cfg = TrackingConfig(uri=door.uri)
    run = make_logger(cfg, "fit")
    assert isinstance(run, RunLogger)
    refused, best = refusals(run), Kept("best", tmp_path / "best.ckpt", 7)
    run.log_metrics({"eval/return": 3.0}, 7)
    calls: list[str] = []

    def leave() -> None:
        assert run.flush(60)
        door.shut()

    def while_away() -> None:
        assert refused.wait(120)  # a delivery has failed, and training goes on
        assert run._queue is not None
        while not run._queue.away:
            time.sleep(0.01)
        assert not run.attempt("a file", lambda: calls.append("made"))
        assert not calls, "a store that does not answer was called"
        assert run.keep(best, {}) is None

    after = {30: leave, 60: while_away, 90: door.open}
    data = torch.utils.data.TensorDataset(torch.ones(120, 1))
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, log_every_n_steps=1, logger=run,
        callbacks=[MLflowRecorder(every=10)], enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        trainer.fit(Line(after), torch.utils.data.DataLoader(data, batch_size=1))
    assert trainer.global_step == 120
    model = run.keep(best, {"method": "mapo"})  # it is listed when the store is back
    door.shut()
    client = mlflow.MlflowClient(server.uri)
    check_model(client, model, run.active_run)
    found = client.get_run(run.active_run)
    assert found.info.status == "FINISHED"
    history = client.get_metric_history(run.active_run, "train/loss")
    assert [point.step for point in history] == list(range(120))
    assert caplog.text.count("The tracking store does not answer, values wait") == 1
    assert "MLflow did not take a file: the store does not answer" in caplog.text


def check_model(client: mlflow.MlflowClient, model: str | None, run: str) -> None:
    """The model has its score, of which the run's curve has one point only."""
    assert model is not None
    listed = client.get_logged_model(model)
    assert [(one.key, one.step, one.value) for one in listed.metrics] == [("eval/return", 7, 3.0)]
    assert len(client.get_metric_history(run, "eval/return")) == 1


def refusals(run: RunLogger) -> threading.Event:
    """An event that the first delivery that fails sets."""
    refused, send = threading.Event(), run._send

    def watched(points: list[Point]) -> None:
        try:
            send(points)
        except Exception:
            refused.set()
            raise

    run._send = watched  # type: ignore[method-assign]
    return refused


def test_what_waits_takes_at_most_50_mb() -> None:
    def send(_: object) -> None:
        raise ConnectionError("refused")

    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    box = MetricQueue(send, every=3600.0)
    name = "train/image"
    for step in range(210_000):
        box.put([(name, step * 0.1, 1_700_000_000_000 + step, step)])
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert box.dropped == 10_000
    print(f"\n200,000 values that wait take {used / 1e6:.1f} MB")
    assert used <= 50e6
    box.close(timeout=0.0)
