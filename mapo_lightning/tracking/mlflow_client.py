"""What this project asks of MLflow's client: the only file that imports it.

:mod:`mapo_lightning.tracking.logger` is what the rest of the package talks to.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil

from mapo_lightning.config.redact import redact, redact_text
from mapo_lightning.files import FileLock
from mapo_lightning.tracking.versions import own_git_state

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
Point = tuple[str, float, int, int]
"""Name, value, time in ms since 1970, step."""

MAX_PARAM = 6000  # characters MLflow keeps of one parameter
_MAX_TAG = 5000  # characters MLflow keeps of one tag
_SILENT = 600.0  # seconds without a heartbeat after which a run of this machine counts as dead


def errors() -> tuple[type[Exception], ...]:
    """Return the exceptions by which MLflow and the disk under it say no."""
    from mlflow.exceptions import MlflowException

    return (MlflowException, OSError)


def client(uri: str | None) -> MlflowClient:
    """Return a client of a store; of the one opened last where ``uri`` is None."""
    # Before the first import: a run does not phone home, nor list the migrations of a new store.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    import mlflow

    if uri is not None:
        mlflow.set_tracking_uri(uri)
    return mlflow.MlflowClient()


def open_experiment(uri: str, name: str, artifacts: str) -> str:
    """Make the store's tables and the experiment where they are missing.

    Args:
        uri: Absolute address.
        name: Name of the experiment.
        artifacts: Folder for artifacts of a new experiment in a local store.

    Returns:
        The experiment's id.
    """
    with _first_use_lock(uri):
        mlflow = client(uri)
        found = mlflow.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        local = uri.startswith("sqlite:")
        folder = Path(artifacts).expanduser().absolute()
        # Without this tag the UI opens its page for language-model applications.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        return str(mlflow.create_experiment(name, folder.as_uri() if local else None, tags))


@contextlib.contextmanager
def _first_use_lock(uri: str) -> Iterator[None]:
    """Hold a file lock beside a SQLite store: two first users at once ruin it for good."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///"))
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield


def start_run(
    mlflow: MlflowClient,
    experiment: str,
    name: str,
    tags: Mapping[str, str],
    run_id: str | None = None,
) -> str:
    """Start a run, or set a run that ended going again; return its id."""
    ours = {"host": socket.gethostname(), "pid": str(os.getpid()), **tags}
    if run_id is not None and not _exists(mlflow, run_id):
        log.warning("this MLflow store has no run %s to go on with: a new one is started", run_id)
        run_id = None
    if run_id is None:
        git = own_git_state()
        about = {"mlflow.runName": name, "mlflow.source.name": Path(sys.argv[0]).name or "python"}
        about |= {"mlflow.source.git.commit": git.commit} if git else {}
        run = mlflow.create_run(experiment, tags={**about, **_short_tags(ours)}, run_name=name)
        return str(run.info.run_id)
    count = int(mlflow.get_run(run_id).data.tags.get("resume.count", "0")) + 1
    mlflow.update_run(run_id, status="RUNNING")
    set_tags(mlflow, run_id, {**ours, "resume.count": str(count)})
    return run_id


def _exists(mlflow: MlflowClient, run_id: str) -> bool:
    try:
        return str(mlflow.get_run(run_id).info.lifecycle_stage) == "active"
    except errors():
        return False


def close_dead_runs(mlflow: MlflowClient, experiment: str) -> None:
    """Mark as KILLED the runs of this machine whose process is gone (SIGKILL leaves RUNNING)."""
    here = socket.gethostname()
    for run in mlflow.search_runs([experiment], "attributes.status = 'RUNNING'"):
        tags = run.data.tags
        if tags.get("host") == here and not _lives(tags):
            mlflow.set_terminated(run.info.run_id, "KILLED")


def _lives(tags: Mapping[str, str]) -> bool:
    if not psutil.pid_exists(int(tags.get("pid", "0"))):
        return False
    beat = tags.get("heartbeat")  # the process number may belong to another program by now
    return beat is None or time.time() - int(beat) < _SILENT


def log_points(mlflow: MlflowClient, run_id: str, points: list[Point]) -> None:
    """Record values; at most 1,000 at once."""
    from mlflow.entities import Metric

    mlflow.log_batch(run_id, metrics=[Metric(*point) for point in points])


def last_steps(mlflow: MlflowClient, run_id: str) -> dict[str, int]:
    """Return the last recorded step of every metric of a run."""
    names = mlflow.get_run(run_id).data.metrics
    history = {name: mlflow.get_metric_history(run_id, name) for name in names}
    return {name: max(point.step for point in points) for name, points in history.items()}


def log_params(mlflow: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    """Record parameters without their secrets.

    MLflow refuses to change a parameter. Those that differ after a resume go into the tag
    ``resume.N.changed`` as ``name: old -> new``.
    """
    from mlflow.entities import Param

    run = mlflow.get_run(run_id)
    wanted = {
        clean_name(k): _short_param(redact(v, k.rpartition(".")[2])) for k, v in params.items()
    }
    new = [Param(name, text) for name, text in wanted.items() if name not in run.data.params]
    for start in range(0, len(new), 100):  # MLflow's limit of one call
        mlflow.log_batch(run_id, params=new[start : start + 100])
    changed = _changed(run, wanted)
    if changed:
        count = run.data.tags.get("resume.count", "0")
        set_tags(mlflow, run_id, {f"resume.{count}.changed": json.dumps(changed)})


def _changed(run: Run, wanted: Mapping[str, str]) -> list[str]:
    old = run.data.params
    return [f"{k}: {old[k]} -> {v}" for k, v in wanted.items() if k in old and old[k] != v]


def set_tags(mlflow: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags; the last value wins."""
    from mlflow.entities import RunTag

    pairs = [RunTag(name, text) for name, text in _short_tags(tags).items()]
    for start in range(0, len(pairs), 100):
        mlflow.log_batch(run_id, tags=pairs[start : start + 100])


def system_monitor(run_id: str) -> Any:
    """Return a monitor of CPU, memory and GPU; the caller calls ``start()`` and ``finish()``."""
    from mlflow.system_metrics import system_metrics_monitor as monitor

    make: Any = monitor.SystemMetricsMonitor  # untyped
    return make(run_id, resume_logging=True)


def clean_name(name: str) -> str:
    """Replace what MLflow does not take in the name of a metric or parameter by ``_``."""
    return re.sub(r"[^A-Za-z0-9_\-./ :]", "_", name)[:250] or "_"


def shorten(text: str, limit: int) -> str:
    """Cut a text to ``limit`` characters and say so at its end."""
    if len(text) <= limit:
        return text
    note = f" ... [shortened, {len(text)} characters]"
    return text[: limit - len(note)] + note


def _short_param(value: Any) -> str:
    return shorten(str(value), MAX_PARAM)


def _short_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: shorten(redact_text(str(text)), _MAX_TAG) for name, text in tags.items()}
