"""Runs and curves read back from MLflow stores, by the report and by themselves."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
from studies import make_run

from mapo_lightning.reporting.gather import Stores, from_folders, from_store
from mapo_lightning.reporting.runs import Policy
from mapo_lightning.reporting.study import study
from mapo_lightning.tracking.histories import Store
from mapo_lightning.tracking.logger import (
    RunLogger,
    Status,
    finish_parent,
    make_logger,
    open_store,
    start_parent,
    store_uri,
)
from mapo_lightning.tracking.settings import TrackingConfig
from mapo_lightning.types import ConfigError

pytestmark = pytest.mark.slow


def phase(
    cfg: TrackingConfig, parent: str, name: str, values: dict[int, float], keep_best: bool = False
) -> str:
    """Record a phase of a run of apv on the toy, with the returns of its evaluations."""
    logger = make_logger(cfg, name, parent)
    assert isinstance(logger, RunLogger)
    params = {"method": "apv", "seed": 4, "env.kind": "toy", "env.name": "disc", "stage": "all"}
    logger.log_hyperparams(params | {"evaluate.keep_best": keep_best})
    for step, value in values.items():
        told = {"eval/return": value, "eval/return_iqm": 0.0, "eval/success": 0.5}
        logger.log_metrics(
            {**told, "eval/return_random": 7.0, "eval/return_random_held": 8.0}, step
        )
    logger.finalize()
    return logger.active_run


def recorded(
    cfg: TrackingConfig, folder: Path, name: str = "r", status: Status = "FINISHED"
) -> tuple[str, str]:
    """A run with its fine-tuning; returns their ids."""
    tags = {"run_dir": str(folder), "method": "apv", "stage": "all"}
    parent = start_parent(cfg, name, tags)
    assert parent is not None
    tuned = phase(cfg, parent, f"{name}/finetune", {2000: 3.0, 4800: 21.0})
    finish_parent(parent, status, cfg)
    return parent, tuned


def own(name: str, cfg: TrackingConfig) -> TrackingConfig:
    return TrackingConfig(uri=cfg.uri, artifacts=cfg.artifacts, experiment=name)


def test_a_run_that_only_mlflow_knows_counts(cfg: TrackingConfig, tmp_path: Path) -> None:
    mine = own("alone", cfg)
    parent = start_parent(mine, "sweep", {"run_dir": "s", "sweep": "seed"})
    finish_parent(parent, "FINISHED", mine)
    _, tuned = recorded(mine, tmp_path / "gone")
    recorded(mine, tmp_path / "killed", "k", "KILLED")
    runs = from_store(store_uri(mine), "alone", Stores())
    assert [run.name for run in runs] == ["r", "k"]
    run = runs[0]
    assert (run.state, run.method, run.task, run.seed) == ("finished", "apv", "toy/disc", 4)
    assert (run.agent, run.frames) == (Policy(21.0, 0.5), 4800)
    assert run.curve == ((2000, 3.0), (4800, 21.0))
    assert {name: policy.mean for name, policy in run.baselines.items()} == {
        "random": 7.0, "random_held": 8.0,
    }  # fmt: skip
    assert (run.mlflow, run.page) == (tuned, "")
    assert run.seconds is not None
    assert (runs[1].state, runs[1].why) == ("unfinished", "MLflow: KILLED")
    assert [cell.values.tolist() for cell in study(runs).cells] == [[21.0]]


def test_of_a_kept_agent_its_own_evaluation_counts(cfg: TrackingConfig, tmp_path: Path) -> None:
    mine = own("kept", cfg)
    parent = start_parent(mine, "r", {"run_dir": str(tmp_path / "x"), "stage": "all"})
    assert parent is not None
    phase(mine, parent, "finetune", {2000: 30.0, 4800: 10.0}, keep_best=True)
    phase(mine, parent, "evaluate", {2000: 28.0}, keep_best=True)
    finish_parent(parent, "FINISHED", mine)
    (run,) = from_store(store_uri(mine), "kept", Stores())
    assert run.agent == Policy(28.0, 0.5)
    assert run.curve == ((2000, 30.0), (4800, 10.0))


@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize("name", ["finetune", "a/finetune"])
def test_a_folder_finds_its_curve_in_its_store(
    name: str, noted: bool, cfg: TrackingConfig, tmp_path: Path
) -> None:
    mine = own("folders", cfg)
    words = ["env=toy", "method=apv", "seed=4", "tracking.enabled=true", f"tracking.uri={cfg.uri}"]
    folder = make_run(tmp_path / "a", *words, score=21.0)
    parent = start_parent(mine, "a", {"run_dir": str(folder)})
    assert parent is not None
    tuned = phase(mine, parent, name, {2000: 3.0, 4800: 21.0})
    finish_parent(parent, "FINISHED", mine)
    if noted:
        (folder / "mlflow.json").write_text(json.dumps({"parent": parent, "finetune": tuned}))
    (run,) = from_folders([folder], Stores())
    assert run.curve == ((2000, 3.0), (4800, 21.0))
    assert run.mlflow == tuned
    # A file of the run itself comes first, and the ids stay.
    (folder / "finetune").mkdir()
    (folder / "finetune/curves.csv").write_text("name,step,value,time\neval/return,5,1.0,0\n")
    (run,) = from_folders([folder], Stores())
    assert (run.curve, run.mlflow) == (((5, 1.0),), tuned)


def test_settings_of_somebody_else_do_not_choose_a_store(
    cfg: TrackingConfig, tmp_path: Path
) -> None:
    words = ["env=toy", "method=apv", "tracking.enabled=true", f"tracking.uri={cfg.uri}"]
    folder = make_run(tmp_path / "a", *words, score=21.0)
    recorded(own("foreign", cfg), folder, "a")
    text = (folder / "config.yaml").read_text().partition("\n")[2]
    (folder / "config.yaml").write_text(text)
    (run,) = from_folders([folder], Stores())
    assert (run.curve, run.mlflow) == ((), "")
    (run,) = from_folders([folder], Stores(store_uri(cfg)))  # unless the user names it
    assert run.curve == ((2000, 3.0), (4800, 21.0))


def test_a_folder_of_the_store_is_read_itself(cfg: TrackingConfig, tmp_path: Path) -> None:
    mine = own("both", cfg)
    folder = make_run(tmp_path / "a", "env=toy", "method=mapo", "seed=9", score=33.0)
    recorded(mine, folder)
    (run,) = from_store(store_uri(mine), "both", Stores(store_uri(mine)))
    assert (run.method, run.seed, run.agent) == ("mapo", 9, Policy(33.0, None))
    assert run.curve == ((2000, 3.0), (4800, 21.0))


def test_a_step_that_was_recorded_twice_has_its_later_value(cfg: TrackingConfig) -> None:
    parent = start_parent(own("twice", cfg), "r", {})
    store = Store(store_uri(cfg))
    assert parent is not None
    for value, at in ((1.0, 1000), (5.0, 2000)):
        store._client.log_metric(parent, "eval/return", value, timestamp=at, step=10)
    assert store.curve(parent, "eval/return") == ((10, 5.0),)
    finish_parent(parent, "FINISHED", cfg)


def test_what_is_no_store_is_refused_and_left_alone(tmp_path: Path, cfg: TrackingConfig) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        Store(f"sqlite:///{tmp_path}/none.db")
    assert not (tmp_path / "none.db").exists()
    with sqlite3.connect(tmp_path / "other.db") as file:
        file.execute("CREATE TABLE shopping (item TEXT)")
    with pytest.raises(ConfigError, match="the database of another program"):
        Store(f"sqlite:///{tmp_path}/other.db")
    (tmp_path / "text.db").write_text("no database at all, but long enough to be one" * 100)
    with pytest.raises(ConfigError, match="SQLite cannot read it"):
        Store(f"sqlite:///{tmp_path}/text.db")
    with pytest.raises(ConfigError, match=r"has no experiment 'nope', only .*mapo"):
        Store(store_uri(cfg)).runs("nope")
    open_store(own("empty", cfg))
    with pytest.raises(ConfigError, match="holds no run of mapo-train"):
        from_store(store_uri(cfg), "empty", Stores())
