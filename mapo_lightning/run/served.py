"""A trained agent as a model of MLflow's flavour ``python_function``: `predict` acts.

    model = mlflow.pyfunc.load_model("models:/m-...", model_config={"device": "cpu"})
    action = model.predict(frame, params={"reset": True})   # the first frame of an episode
    action = model.predict(frame)                           # the next ones

The model is an export (docs/evaluate.md) and no code: this package has to be installed. MLflow
calls `_load_pyfunc`; MLflow itself is not imported here.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mapo_lightning.run.export import export
from mapo_lightning.tracking import mlflow_models
from mapo_lightning.tracking.logger import RunLogger
from mapo_lightning.tracking.versions import DISTRIBUTION, package_version
from mapo_lightning.types import ConfigError, MapoError

log = logging.getLogger(__name__)

_AGENT = "agent"  # folder of the export in the model
_CONFIG = ("device", "describe", "words")
_INPUTS = ("obs", "label_obs", "is_first")


def put_agent(run: RunLogger, model: str, checkpoint: Path) -> bool:
    """Export a checkpoint's agent into a model of MLflow; a failure is logged, never raised.

    Args:
        run: The run that the model belongs to.
        model: Id of the model.
        checkpoint: Of fine-tuning.

    Returns:
        Whether the model can be loaded.
    """

    def call() -> None:
        if mlflow_models.is_complete(run.experiment, model):
            return  # the agent of a run that was resumed after its end
        with tempfile.TemporaryDirectory(prefix="mapo-model-") as place:
            folder = Path(place)
            export(checkpoint, folder / _AGENT)
            wanted = f"{DISTRIBUTION}=={package_version()}"
            mlflow_models.write_pyfunc(folder, model, run.active_run, __name__, _AGENT, wanted)
            mlflow_models.upload(run.experiment, model, folder)

    try:
        return run.attempt(f"the agent of {checkpoint.name}", call)
    except MapoError as error:  # the agent is trained; mapo-export says the same
        log.warning("the agent was not put into MLflow: %s", error)
        return False


class ServedAgent:
    """One agent, which remembers its episode from one `predict` to the next.

    Args:
        path: Of the export.
        config: ``device`` (``cpu``), ``describe`` (true) and ``words``, as `load_agent` takes them.

    Raises:
        MapoError: As `load_agent`; or a setting that there is not.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any] | None = None) -> None:
        # Simulators and describers, which only an agent that acts needs.
        from mapo_lightning.run.agent import load_agent

        given = dict(config or {})
        if odd := sorted(set(given) - set(_CONFIG)):
            raise ConfigError(f"model_config has no '{odd[0]}'; it takes {', '.join(_CONFIG)}")
        self.agent = load_agent(path, **given)
        self._one_at_a_time = threading.Lock()  # servers answer in threads

    def predict(
        self, model_input: Any, params: Mapping[str, Any] | None = None
    ) -> NDArray[np.float32]:
        """Take in the newest frame and answer with an action.

        Args:
            model_input: Frames, (H, W, 3) uint8, or (N, H, W, 3) from N environments; or a dict
                with them as ``obs``, and with ``label_obs`` and ``is_first`` as of `Agent.act`.
                Whole numbers in [0, 255] of another type, which is what arrives as JSON, count as
                uint8.
            params: ``reset`` (false): this frame is the first of an episode. ``seed`` (-1): with
                ``reset``, of the agent's random numbers; below 0: the seed of its run.

        Returns:
            (A,) or (N, A), in [-1, 1].

        Raises:
            MapoError: The input is not what the agent was trained on.
        """
        given = model_input if isinstance(model_input, Mapping) else {"obs": model_input}
        if "obs" not in given or (odd := sorted(set(given) - set(_INPUTS))):
            found = ", ".join(map(str, given)) if "obs" not in given else odd[0]
            raise ConfigError(
                f"predict takes {', '.join(_INPUTS)}, of which obs must be there; got {found}"
            )
        wanted = dict(params or {})
        frames = {name: _frames(given[name]) for name in _INPUTS[:2] if given.get(name) is not None}
        first = given.get("is_first")
        with self._one_at_a_time:
            if wanted.get("reset"):
                seed = int(wanted.get("seed", -1))
                self.agent.reset(None if seed < 0 else seed)
            return self.agent.act(
                **frames, is_first=None if first is None else np.asarray(first, bool)
            )


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> ServedAgent:
    """What MLflow calls to load the model."""
    return ServedAgent(path, model_config)


def _frames(value: Any) -> NDArray[Any]:
    """An array as it is; whole numbers that fit become uint8."""
    array = np.asarray(value)
    fits = array.dtype.kind in "iu" and array.size > 0
    if fits and array.dtype != np.uint8 and array.min() >= 0 and array.max() <= 255:
        return array.astype(np.uint8)
    return array
