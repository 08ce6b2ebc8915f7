"""What a run learns from and what it keeps, in MLflow: data sets, and checkpoints as models.

Like :mod:`mapo_lightning.tracking.mlflow_client`, of which it is the second half, this file talks
to MLflow's client, and :mod:`mapo_lightning.tracking.logger` is what others talk to.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mapo_lightning.config.redact import redact_text
from mapo_lightning.tracking.mlflow_client import exists, shorten

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Metric

_SCORES = ("eval/", "told/", "val/", "rollout/", "reconstruction/")
"""Groups of metrics that say how good a checkpoint is."""
_RESULTS = (*_SCORES, "dream/", "labels/direction", "labels/still_null")
"""Groups of metrics that a phase ends with and that belong into the list of runs."""
_MAX_DIGEST, _MAX_VALUE = 36, 250  # characters MLflow keeps of a digest, of a model's parameter
_REQUIREMENTS = "requirements.txt"


class Source(NamedTuple):
    """A data set that a run learns from."""

    name: str
    """Such as ``videos``."""
    digest: str
    """Equal for equal content."""
    place: str
    """Folder or task that it comes from."""
    profile: Mapping[str, Any]
    """Numbers about it."""


class Kept(NamedTuple):
    """A checkpoint that a run keeps."""

    name: str
    """Such as ``last`` or ``best``."""
    path: Path | None = None
    """The file; None: it will be written."""
    step: int = 0
    """Position on the x-axis of the curves at which it was written."""
    final: bool = True
    """Whether it stays as it is; a better one may still replace it otherwise."""


def log_sources(
    mlflow: MlflowClient, run_id: str, sources: Sequence[Source], models: Iterable[str] = ()
) -> None:
    """Record data sets and models as inputs of a run; those that it has already are left out.

    Args:
        mlflow: A client.
        run_id: The run.
        sources: Data sets.
        models: Ids of models.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput

    had = mlflow.get_run(run_id).inputs
    known = {one.model_id for one in (had.model_inputs if had else ())}
    tags = [InputTag("mlflow.data.context", "training")]
    datasets = [
        DatasetInput(
            Dataset(
                one.name,
                one.digest[:_MAX_DIGEST],
                "local",
                json.dumps({"uri": redact_text(one.place)}),
                profile=json.dumps(dict(one.profile)),
            ),
            tags,
        )
        for one in sources
    ]
    new = [LoggedModelInput(name) for name in models if name not in known]
    mlflow.log_inputs(run_id, datasets, new)


def model_of(mlflow: MlflowClient, run_id: str, name: str = "last") -> str | None:
    """Id of the model that stands for a checkpoint of a run; None where this store has none."""
    found = _find(mlflow, run_id, name) if exists(mlflow, run_id) else None
    return None if found is None else str(found.model_id)


def keep(mlflow: MlflowClient, run_id: str, kept: Kept, params: Mapping[str, str]) -> str:
    """List a checkpoint among MLflow's models, with the scores recorded at its step.

    A model stands for one file with one content: where another checkpoint has taken the place of
    the file since, as a better agent does, its model takes the place of the model. Otherwise,
    calling this again changes nothing.

    Args:
        mlflow: A client.
        run_id: The run that keeps it.
        kept: Which one.
        params: What to say about it.

    Returns:
        The model's id.
    """
    from mlflow.entities import LoggedModelOutput

    model = _find(mlflow, run_id, kept.name)
    step = str(kept.step)
    if model is not None and kept.path is not None and model.tags.get("step", step) != step:
        mlflow.delete_logged_model(model.model_id)
        model = None
    if model is None:
        info = mlflow.get_run(run_id).info
        model = mlflow.create_logged_model(
            info.experiment_id,
            re.sub(r"[/:.%\"']", "-", f"{info.run_name}-{kept.name}"),
            source_run_id=run_id,
            tags={"kept_as": kept.name},
            params={key: shorten(text, _MAX_VALUE) for key, text in params.items()},
            model_type="checkpoint",
        )
    identity = str(model.model_id)
    if kept.path is None:
        return identity
    artifact = f"runs:/{run_id}/checkpoints/{kept.path.name}"
    tags = {"checkpoint": str(kept.path), "artifact": artifact, "step": step}
    mlflow.set_logged_model_tags(identity, tags)
    _link_scores(mlflow, run_id, model, kept.step)
    had = mlflow.get_run(run_id).outputs
    if kept.final and identity not in {one.model_id for one in (had.model_outputs if had else ())}:
        mlflow.log_outputs(run_id, [LoggedModelOutput(identity, kept.step)])
    if str(model.status) != "READY":
        mlflow.finalize_logged_model(identity, "READY")
    return identity


def give_up(mlflow: MlflowClient, run_id: str, name: str) -> None:
    """Say of a checkpoint that was never written that it will not be."""
    model = _find(mlflow, run_id, name)
    if model is not None and str(model.status) == "PENDING":
        mlflow.finalize_logged_model(model.model_id, "FAILED")


def _find(mlflow: MlflowClient, run_id: str, name: str) -> LoggedModel | None:
    experiment = mlflow.get_run(run_id).info.experiment_id
    wanted = f"source_run_id = '{run_id}' AND tags.kept_as = '{name}'"
    return next(iter(mlflow.search_logged_models([experiment], wanted, max_results=1)), None)


def _link_scores(mlflow: MlflowClient, run_id: str, model: LoggedModel, step: int) -> None:
    """Give a model the scores that its run has recorded at a step.

    MLflow records a value of a model in the curve of its run too. With the time stamp that the
    value has there, it is the same point.
    """
    from mlflow.entities import Metric

    known = {(one.key, one.step, one.timestamp) for one in model.metrics or ()}
    points = [
        Metric(one.key, one.value, one.timestamp, one.step, model_id=model.model_id)
        for one in _scores(mlflow, run_id, step)
        if (one.key, one.step, one.timestamp) not in known
    ]
    if points:
        mlflow.log_batch(run_id, metrics=points)


def _scores(mlflow: MlflowClient, run_id: str, step: int) -> list[Metric]:
    names = [name for name in mlflow.get_run(run_id).data.metrics if name.startswith(_SCORES)]
    # A second evaluation at the same step is one of a resumed run, and is not recorded.
    newest = {
        name: one
        for name in names
        for one in mlflow.get_metric_history(run_id, name)
        if one.step == step and math.isfinite(one.value)
    }
    return list(newest.values())


def results(mlflow: MlflowClient, run_id: str) -> dict[str, float]:
    """The figures that a phase has ended with."""
    found = mlflow.get_run(run_id).data.metrics
    return {name: value for name, value in found.items() if name.startswith(_RESULTS)}


def log_results(mlflow: MlflowClient, run_id: str, figures: Mapping[str, float]) -> None:
    """Make figures those of a run, whatever their number of frames: later ones replace earlier."""
    from mlflow.entities import Metric

    known, now = mlflow.get_run(run_id).data.metrics, int(time.time() * 1000)
    new = {k: v for k, v in figures.items() if math.isfinite(v) and known.get(k) != v}
    if new:
        mlflow.log_batch(run_id, metrics=[Metric(k, v, now, 0) for k, v in new.items()])


def write_pyfunc(
    folder: Path, model_id: str, run_id: str, loader: str, data: str, requirement: str
) -> None:
    """Make a folder with an agent a model of MLflow's flavour ``python_function``.

    It holds no code: what loads it has to be installed.

    Args:
        folder: Where the agent lies; gets ``MLmodel`` and ``requirements.txt``.
        model_id: The model that it belongs to.
        run_id: The run that it comes from.
        loader: Module with ``_load_pyfunc(path, model_config)``.
        data: Name of the agent in the folder.
        requirement: What has to be installed, as pip names it.
    """
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec

    params = ParamSchema(
        [ParamSpec("reset", DataType.boolean, False), ParamSpec("seed", DataType.long, -1)]
    )
    # MLflow's own saving would copy the weights once more, and look for packages to require.
    model: Any = Model(run_id=run_id, model_id=model_id, signature=ModelSignature(params=params))
    pyfunc.add_to_model(model, loader_module=loader, data=data)
    model.model_size_bytes = sum(x.stat().st_size for x in folder.rglob("*") if x.is_file())
    model.save(str(folder / "MLmodel"))
    (folder / _REQUIREMENTS).write_text(f"{requirement}\n", encoding="utf-8")


def upload(mlflow: MlflowClient, model_id: str, folder: Path) -> None:
    """Put a folder's files into a model."""
    mlflow.log_model_artifacts(model_id, str(folder))


def is_complete(mlflow: MlflowClient, model_id: str) -> bool:
    """Whether a model can be loaded: its files are there."""
    return any(one.path == "MLmodel" for one in mlflow.list_logged_model_artifacts(model_id))
