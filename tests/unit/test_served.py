"""An agent in MLflow: loaded by its own means, and acting as `load_agent` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from packaging.requirements import Requirement
from test_agent import SIDE, save

import mapo_lightning
from callbacks.recorder import list_kept
from mapo_lightning.run.agent import ObservationError
from mapo_lightning.run.served import ServedAgent, put_agent
from mapo_lightning.tracking.logger import Kept, RunLogger, make_logger, store_uri
from mapo_lightning.tracking.settings import TrackingConfig
from mapo_lightning.types import ConfigError

pytestmark = pytest.mark.slow

FRAMES = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), np.uint8)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Path]:
    """A checkpoint, the id of its model, and the folder of all artifacts."""
    place = tmp_path_factory.mktemp("served")
    cfg = TrackingConfig(uri=f"sqlite:///{place}/mlflow.db", artifacts=str(place / "artifacts"))
    path = place / "last.ckpt"
    save(path)
    run = make_logger(cfg, "run/finetune")
    assert isinstance(run, RunLogger)
    model = list_kept(run, path, {"method": "mapo"})
    assert model is not None
    run.finalize("success")
    assert put_agent(run, model, path)
    assert put_agent(run, model, path)  # a run that is resumed after its end
    mlflow.set_tracking_uri(store_uri(cfg))
    return path, model, place / "artifacts"


@pytest.fixture
def model(stored: tuple[Path, str, Path]) -> Any:
    return mlflow.pyfunc.load_model(f"models:/{stored[1]}")


def test_it_acts_as_the_agent_of_the_checkpoint(stored: tuple[Path, str, Path], model: Any) -> None:
    with mapo_lightning.load_agent(stored[0]) as agent:
        agent.reset(7)
        expected = [agent.act(frame) for frame in FRAMES]
    first = model.predict(FRAMES[0], params={"reset": True, "seed": 7})
    found = [first, *(model.predict(frame) for frame in FRAMES[1:])]
    assert found[0].shape == (2,)
    np.testing.assert_array_equal(found, expected)
    # It remembers: the same frame at another moment is another action.
    assert (model.predict(FRAMES[0]) != first).any()
    np.testing.assert_array_equal(
        model.predict({"obs": FRAMES[0]}, params={"reset": True, "seed": 7}), first
    )


def test_json_and_several_environments(model: Any) -> None:
    one = model.predict(FRAMES[0], params={"reset": True, "seed": 7})
    listed = model.predict({"obs": FRAMES[0].tolist()}, params={"reset": True, "seed": 7})
    np.testing.assert_array_equal(listed, one)
    model.predict(FRAMES[:2], params={"reset": True})
    both = model.predict({"obs": FRAMES[2:], "is_first": [True, False]})
    assert both.shape == (2, 2)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (FRAMES[0] / 255.0, ObservationError, "obs must be a numpy array of uint8"),
        (FRAMES[0].astype(np.int64) - 1, ObservationError, "obs must be a numpy array of uint8"),
        ({"image": FRAMES[0]}, ConfigError, "obs must be there; got image"),
        ({"obs": FRAMES[0], "reward": 1.0}, ConfigError, "got reward"),
    ],
)
def test_wrong_input_is_named(given: Any, error: type[Exception], says: str, model: Any) -> None:
    with pytest.raises(error, match=says):
        model.predict(given, params={"reset": True})


def test_the_loading_can_be_set(stored: tuple[Path, str, Path]) -> None:
    config = {"describe": False, "words": ["seed=5"]}
    quiet = mlflow.pyfunc.load_model(f"models:/{stored[1]}", model_config=config)
    assert quiet.predict(FRAMES[0]).shape == (2,)
    place = stored[2] / "models" / stored[1] / "artifacts/agent"
    cfg = ServedAgent(place, config).agent.cfg
    assert (cfg.vlm.kind, cfg.seed) == ("none", 5)
    with pytest.raises(ConfigError, match="model_config has no 'gpu'"):
        ServedAgent(stored[0], {"gpu": 1})


def test_it_holds_weights_and_no_code(stored: tuple[Path, str, Path]) -> None:
    path, model, artifacts = stored
    place = artifacts / "models" / model / "artifacts"
    files = {str(one.relative_to(place)) for one in place.rglob("*") if one.is_file()}
    assert {"MLmodel", "requirements.txt", "agent/model.safetensors", "agent/card.json"} <= files
    assert not [name for name in files if name.endswith((".py", ".pkl", ".ckpt"))]
    wanted = (place / "requirements.txt").read_text()
    assert [Requirement(line).name for line in wanted.splitlines()] == ["mapo-lightning"]
    text = (place / "MLmodel").read_text() + wanted
    assert "://" not in text
    assert "index" not in text
    assert (place / "agent/model.safetensors").stat().st_size < path.stat().st_size + 1e5


def test_a_checkpoint_that_is_no_agent_costs_a_warning(
    stored: tuple[Path, str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = TrackingConfig(uri=f"sqlite:///{stored[2].parent}/mlflow.db")
    run = make_logger(cfg, "run/finetune")
    assert isinstance(run, RunLogger)
    empty = run.keep(Kept("last", tmp_path / "last.ckpt"), {})
    (tmp_path / "last.ckpt").write_bytes(b"half")
    assert empty is not None
    assert not put_agent(run, empty, tmp_path / "last.ckpt")
    assert "the agent was not put into MLflow" in caplog.text
    run.finalize("success")
