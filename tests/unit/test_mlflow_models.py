"""Checkpoints as models of a real MLflow, data sets as inputs, results in the list of runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch

from callbacks.recorder import list_kept
from mapo_lightning.tracking.logger import (
    Kept,
    RunLogger,
    Source,
    finish_parent,
    log_results,
    make_logger,
    open_store,
    start_parent,
    store_uri,
    where_to_look,
)
from mapo_lightning.tracking.settings import TrackingConfig
from mapo_lightning.training.checkpoint import write_checkpoint

pytestmark = pytest.mark.slow

ABOUT = {"method": "mapo", "task": "toy/disc", "seed": "3", "stage": "finetune"}
BY_RETURN = [{"field_name": "metrics.eval/return", "ascending": False}]


@pytest.fixture
def run(cfg: TrackingConfig) -> Iterator[RunLogger]:
    logger = make_logger(cfg, "v1.2: tests/finetune")  # a name that no model may have
    assert isinstance(logger, RunLogger)
    yield logger
    logger.finalize("success")


def client(cfg: TrackingConfig) -> Any:
    return mlflow.MlflowClient(store_uri(cfg))


def models(cfg: TrackingConfig, run: RunLogger) -> list[Any]:
    """Models of a run, the best evaluation first."""
    mlflow.set_tracking_uri(store_uri(cfg))
    found = mlflow.search_logged_models(
        experiment_ids=[open_store(cfg) or ""], order_by=BY_RETURN, output_format="list"
    )
    return [one for one in found if one.source_run_id == run.active_run]


def checkpoint(path: Path, frames: int) -> Path:
    metadata = {"stage": "finetune", "method": "mapo", "action_dim": 2, "env_frames": frames}
    state = {"weight": torch.zeros(2)}
    write_checkpoint({"state_dict": state, "mapo": metadata, "global_step": 7}, path)
    return path


def test_the_search_by_return_names_the_file_that_is_kept(
    cfg: TrackingConfig, run: RunLogger, tmp_path: Path
) -> None:
    best, last = tmp_path / "best.ckpt", tmp_path / "last.ckpt"
    run.keep(Kept("last"), ABOUT)
    (pending,) = models(cfg, run)
    assert (str(pending.status), pending.params) == ("PENDING", ABOUT)
    for frames, score in ((100, 5.0), (200, 9.0), (300, 7.0)):
        run.log_metrics({"eval/return": score, "eval/success": 0.5, "train/image": 1.0}, frames)
        if score != 7.0:
            list_kept(run, checkpoint(best, frames), ABOUT, final=False)
    list_kept(run, checkpoint(last, 300), ABOUT)
    list_kept(run, best, ABOUT)
    first, second = models(cfg, run)  # that of the agent that was replaced is gone
    assert first.tags["checkpoint"] == str(best)
    assert [(one.key, one.step) for one in first.metrics if one.key == "eval/return"] == [
        ("eval/return", 200)
    ]
    assert first.tags["artifact"] == f"runs:/{run.active_run}/checkpoints/best.ckpt"
    assert second.tags["checkpoint"] == str(last)
    assert {str(one.status) for one in (first, second)} == {"READY"}
    assert first.name == "v1-2- tests-finetune-best"
    newest = {one.key: (one.step, one.value) for one in second.metrics}
    assert newest == {"eval/return": (300, 7.0), "eval/success": (300, 0.5)}
    # The curve of the run has every point once, although its points belong to models too.
    history = client(cfg).get_metric_history(run.active_run, "eval/return")
    assert [(one.step, one.value) for one in history] == [(100, 5.0), (200, 9.0), (300, 7.0)]
    out = client(cfg).get_run(run.active_run).outputs.model_outputs
    assert {(one.model_id, one.step) for one in out} == {
        (first.model_id, 200),
        (second.model_id, 300),
    }


def test_among_equals_the_kept_one_comes_first(
    cfg: TrackingConfig, run: RunLogger, tmp_path: Path
) -> None:
    """The last agent may be the best: both files then hold the same."""
    run.keep(Kept("last"), ABOUT)
    run.log_metrics({"eval/return": 5.0}, 100)
    for name in ("best", "last"):
        list_kept(run, checkpoint(tmp_path / f"{name}.ckpt", 100), ABOUT)
    assert [one.tags["kept_as"] for one in models(cfg, run)] == ["best", "last"]


def test_a_resumed_run_adds_no_model_no_output_and_no_point(
    cfg: TrackingConfig, run: RunLogger, tmp_path: Path
) -> None:
    path = checkpoint(tmp_path / "best.ckpt", 100)
    state = run.state()  # of the checkpoint that it goes on from
    run.log_metrics({"eval/return": 5.0}, 100)
    list_kept(run, path, ABOUT)
    before = models(cfg, run)
    run.finalize("success")
    again = make_logger(cfg, "v1.2: tests/finetune", run_id=run.active_run)
    assert isinstance(again, RunLogger)
    again.resume(json.loads(json.dumps(state)))
    again.log_metrics({"eval/return": 5.0}, 100)
    list_kept(again, path, ABOUT)
    list_kept(again, path, ABOUT)
    again.finalize("success")
    after = models(cfg, run)
    assert [one.model_id for one in after] == [one.model_id for one in before]
    assert [(m.key, m.step) for m in after[0].metrics] == [("eval/return", 100)]
    found = client(cfg).get_run(run.active_run)
    assert len(found.outputs.model_outputs) == 1
    assert len(client(cfg).get_metric_history(run.active_run, "eval/return")) == 1


def test_a_checkpoint_that_never_comes_is_a_failed_model(
    cfg: TrackingConfig, run: RunLogger, tmp_path: Path
) -> None:
    run.keep(Kept("last"), ABOUT)
    run.give_up("last")
    assert [str(one.status) for one in models(cfg, run)] == ["FAILED"]
    list_kept(run, checkpoint(tmp_path / "last.ckpt", 1), ABOUT)
    run.give_up("last")  # it is there now
    assert [str(one.status) for one in models(cfg, run)] == ["READY"]


def test_a_file_that_is_no_checkpoint_is_no_model(
    cfg: TrackingConfig, run: RunLogger, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"half a file")
    assert list_kept(run, tmp_path / "last.ckpt", ABOUT) is None
    assert models(cfg, run) == []
    assert "not among MLflow's models" in caplog.text


def test_data_sets_and_the_pretrained_model_are_inputs_once(
    cfg: TrackingConfig, run: RunLogger, tmp_path: Path
) -> None:
    before = make_logger(cfg, "tests/pretrain")
    assert isinstance(before, RunLogger)
    model = list_kept(before, checkpoint(tmp_path / "last.ckpt", 0), ABOUT)
    before.finalize("success")
    videos = Source("videos clips", "a" * 32, str(tmp_path), {"videos": 3, "frames": 150})
    for _ in range(2):
        run.learn_from([videos], before.active_run)
    found = client(cfg).get_run(run.active_run).inputs
    (dataset,) = found.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("videos clips", "a" * 32)
    assert json.loads(dataset.dataset.profile) == {"videos": 3, "frames": 150}
    assert mlflow.data.get_source(dataset.dataset).load() == str(tmp_path)
    assert [one.model_id for one in found.model_inputs] == [model]
    # A checkpoint from another store names a run that this one has not.
    run.learn_from([videos._replace(digest="b" * 32)], "0" * 32)
    found = client(cfg).get_run(run.active_run).inputs
    assert sorted(one.dataset.digest[0] for one in found.dataset_inputs) == ["a", "b"]
    assert run.failed_calls == 0


def test_the_list_of_runs_is_a_table_of_results(cfg: TrackingConfig) -> None:
    tags = {"method": "mapo", "seed": "3"}
    parent = start_parent(cfg, "tests", tags, params={"seed": 3, "vlm.api_key": "canary"})
    assert parent is not None
    log_results(cfg, parent, {"told/told_5": 30.0, "eval/return": 5.0, "none": float("nan")})
    log_results(cfg, parent, {"told/told_5": 30.0, "eval/return": 4.0})  # later, though lower
    log_results(cfg, parent, {"eval/return": 4.0})
    finish_parent(parent, "FINISHED", cfg)
    found = client(cfg).get_run(parent)
    assert found.data.metrics == {"told/told_5": 30.0, "eval/return": 4.0}
    assert found.data.params["seed"] == "3"
    assert "canary" not in str(found.data.params)
    assert [len(client(cfg).get_metric_history(parent, name)) for name in found.data.metrics] == [
        1, 2,
    ]  # fmt: skip
    log_results(cfg, None, {"eval/return": 1.0})  # other ranks


def test_the_address_opens_the_list_with_its_columns(cfg: TrackingConfig) -> None:
    identity = open_store(cfg)
    said = where_to_look(cfg)
    assert said is not None
    assert said.startswith(f"mlflow ui --backend-store-uri {store_uri(cfg)}, and then http")
    page = f"#/experiments/{identity}/runs?viewStateShareKey=mapo"
    assert said.endswith(page)
    view = client(cfg).get_experiment(identity).tags["mlflow.sharedViewState.mapo"]
    columns = json.loads(view)["selectedColumns"]
    assert {"metrics.`eval/return`", "tags.`method`", "tags.`seed`"} <= set(columns)
    assert where_to_look(TrackingConfig(enabled=False)) is None
