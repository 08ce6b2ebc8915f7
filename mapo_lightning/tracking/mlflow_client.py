"""What this project asks of MLflow's client: the only file that imports it.

:mod:`mapo_lightning.tracking.logger` is what the rest of the package talks to.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import psutil

from mapo_lightning.config.redact import redact, redact_text
from mapo_lightning.files import FileLock
from mapo_lightning.tracking.store_check import (
    SERVER_SECONDS,
    StoreError,
    check_file,
    deleted,
    make_file,
    within,
)
from mapo_lightning.tracking.versions import own_git_state

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
Point = tuple[str, float, int, int]
"""Name, value, time in ms since 1970, step."""
T = TypeVar("T")

MAX_PARAM = 6000  # characters MLflow keeps of one parameter
_MAX_TAG = 5000  # characters MLflow keeps of one tag
_VIEW = "mapo"  # name of the columns that the page of the runs shows
_COLUMNS = [
    "metrics.`eval/return`",
    "metrics.`eval/success`",
    "metrics.`eval/return_random`",
    "metrics.`told/told_5`",
    "metrics.`told/untold_5`",
    "tags.`method`",
    "tags.`task`",
    "tags.`seed`",
    "tags.`stage`",
]
BEAT = "heartbeat"
"""Tag of a run: seconds since 1970 at which its process was last seen alive."""
_SPACE = "pid_namespace"
_SILENT = 600.0  # seconds without a heartbeat after which a run of this machine counts as dead


def errors() -> tuple[type[Exception], ...]:
    """Return the exceptions by which MLflow, its database and the disk under it say no."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError, StoreError)


def reason(error: BaseException) -> str:
    """Say why a call failed, in one line; a broken connection is at the bottom of many errors."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.strerror and found is not error:
            return f"it cannot be reached ({found.strerror})"
        found = found.__cause__ or found.__context__
    return " ".join(redact_text(str(error)).split())[:300].rstrip(".")


def client(uri: str | None) -> MlflowClient:
    """Return a client of a store; of the one opened last where ``uri`` is None."""
    # Before the first import: a run does not phone home, nor list the migrations of a new store.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    # MLflow's own patience with a server is minutes for every call, and training waits for some.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    # It prints the address of a server with the password in it; the summary names it without.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    import mlflow

    if uri is not None:
        mlflow.set_tracking_uri(uri)
    return mlflow.MlflowClient()


def check_experiment(uri: str, name: str, artifacts: str) -> None:
    """See whether a store can take runs of an experiment; changes nothing.

    Args:
        uri: Absolute address.
        name: Name of the experiment.
        artifacts: Folder for artifacts of a new experiment in a local store.

    Raises:
        StoreError: It cannot; other exceptions of :func:`errors` may come from a server.
    """
    path = _sqlite_file(uri)
    if path is not None:
        check_file(path, name, Path(artifacts).expanduser().absolute())
        return
    log.info("asking the MLflow server at %s", redact_text(uri))
    within(SERVER_SECONDS, lambda: _find_active(client(uri), name))


def open_experiment(uri: str, name: str, artifacts: str) -> str:
    """Make the store's tables and the experiment where they are missing.

    Args:
        uri: Absolute address.
        name: Name of the experiment.
        artifacts: Folder for artifacts of a new experiment in a local store.

    Returns:
        The experiment's id.

    Raises:
        StoreError: The store cannot be used; other exceptions of :func:`errors` may come too.
    """
    path = _sqlite_file(uri)
    # Without this tag the UI opens its page for language-model applications.
    tags = {"mlflow.experimentKind": "custom_model_development"}
    folder = Path(artifacts).expanduser().absolute()
    place = folder.as_uri() if path is not None else None

    def find_or_make() -> str:
        mlflow = client(uri)
        found = _find_active(mlflow, name) or str(mlflow.create_experiment(name, place, tags))
        _show_columns(mlflow, found)
        return found

    if path is None:
        return within(SERVER_SECONDS, find_or_make)
    check_file(path, name, folder)
    # Two first users at once ruin a SQLite store for good.
    with FileLock(path.with_name(f".{path.name}.lock")):
        make_file(path)
        return find_or_make()


def _show_columns(mlflow: MlflowClient, experiment: str) -> None:
    """Let the page of an experiment's runs show what tells them apart and what came out.

    MLflow's pages read the columns from a tag of the experiment that their address names.
    """
    tag, view = f"mlflow.sharedViewState.{_VIEW}", json.dumps({"selectedColumns": _COLUMNS})
    if mlflow.get_experiment(experiment).tags.get(tag) != view:
        mlflow.set_experiment_tag(experiment, tag, view)


def runs_page(uri: str, name: str, port: int = 5000) -> str | None:
    """Address of the page with the runs of an experiment; None where there is no such experiment.

    Args:
        uri: Absolute address of the store.
        name: Name of the experiment.
        port: At which ``mlflow ui`` serves a local store.
    """
    found = client(uri).get_experiment_by_name(name)
    if found is None:
        return None
    host = uri.rstrip("/") if uri.startswith("http") else f"http://127.0.0.1:{port}"
    return f"{redact_text(host)}/#/experiments/{found.experiment_id}/runs?viewStateShareKey={_VIEW}"


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _find_active(mlflow: MlflowClient, name: str) -> str | None:
    """Id of an experiment; None if there is none of that name.

    Raises:
        StoreError: It was deleted, so it takes no runs, and its name is not free either.
    """
    found = mlflow.get_experiment_by_name(name)
    if found is None:
        return None
    if found.lifecycle_stage != "active":
        raise StoreError(deleted(name, found.experiment_id))
    return str(found.experiment_id)


def start_run(
    mlflow: MlflowClient,
    experiment: str,
    name: str,
    tags: Mapping[str, str],
    run_id: str | None = None,
) -> str:
    """Start a run, or set a run that ended going again; return its id."""
    ours = {"host": socket.gethostname(), "pid": str(os.getpid()), _SPACE: _space(), **tags}
    if run_id is not None and not exists(mlflow, run_id):
        log.warning("this MLflow store has no run %s to go on with: a new one is started", run_id)
        run_id = None
    if run_id is None:
        git = own_git_state()
        about = {"mlflow.runName": name, "mlflow.source.name": Path(sys.argv[0]).name or "python"}
        about |= {"mlflow.source.git.commit": git.commit} if git else {}
        run = mlflow.create_run(experiment, tags={**about, **_short_tags(ours)}, run_name=name)
        return str(run.info.run_id)
    before = mlflow.get_run(run_id).data.tags
    ours["resume.count"] = str(int(before.get("resume.count", "0")) + 1)
    if BEAT in before:  # that of the run that ended
        ours[BEAT] = str(int(time.time()))
    mlflow.update_run(run_id, status="RUNNING")
    set_tags(mlflow, run_id, ours)
    return run_id


def exists(mlflow: MlflowClient, run_id: str) -> bool:
    """Whether a store has a run, and it was not deleted."""
    try:
        return str(mlflow.get_run(run_id).info.lifecycle_stage) == "active"
    except errors():
        return False


def close_dead_runs(mlflow: MlflowClient, experiment: str) -> None:
    """Mark as KILLED the runs of this machine whose process is gone (SIGKILL leaves RUNNING).

    A container may have the name of another one, whose process numbers it cannot see. There the
    newest heartbeat counts; a run that has none lives if one of those that belong to it does.
    """
    here = socket.gethostname()
    running = mlflow.search_runs([experiment], "attributes.status = 'RUNNING'")
    found = {r.info.run_id: r for r in running if r.data.tags.get("host") == here}
    lives = {name for name, run in found.items() if _lives(run.data.tags, run.info.start_time)}
    held = {found[name].data.tags.get("mlflow.parentRunId") for name in lives}
    for name, run in found.items():
        if name not in lives and not (name in held and _is_elsewhere(run.data.tags)):
            mlflow.set_terminated(name, "KILLED")


def _lives(tags: Mapping[str, str], started: int) -> bool:
    """Whether a run may still go on; it was ``started`` so many milliseconds after 1970."""
    try:
        pid, beat = int(tags.get("pid", "0")), int(tags.get(BEAT, "0"))
    except ValueError:
        return True  # these are not our tags
    if _is_elsewhere(tags):
        return time.time() - (beat or started / 1000) < _SILENT
    # The process number may belong to another program by now.
    return psutil.pid_exists(pid) and not (beat and time.time() - beat >= _SILENT)


def _is_elsewhere(tags: Mapping[str, str]) -> bool:
    return tags.get(_SPACE, _space()) != _space()


def _space() -> str:
    """In which container of this machine its process numbers count."""
    try:
        return str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return ""


def log_points(mlflow: MlflowClient, run_id: str, points: list[Point]) -> list[str]:
    """Record values; at most 1,000 at once.

    Returns:
        Names of those that MLflow does not take; all others are recorded.
    """
    from mlflow.entities import Metric

    def send(some: list[Point]) -> None:
        mlflow.log_batch(run_id, metrics=[Metric(*point) for point in some])

    return [point[0] for point in _all_but_refused(send, points, "metric")]


def _all_but_refused(send: Callable[[list[T]], object], items: list[T], what: str) -> list[T]:
    """Send items together; MLflow refuses a whole call because of one of them.

    Returns:
        The items that it refuses on their own, each of which is logged.

    Raises:
        Exception: One of :func:`errors`: the store does not take anything now.
    """
    from mlflow.exceptions import MlflowException

    try:
        send(items)
    except (MlflowException, ValueError, TypeError) as error:  # also text that is no Unicode
        code = getattr(error, "error_code", "INVALID_PARAMETER_VALUE")
        if code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
            raise
        if len(items) == 1:
            reason = " ".join(redact_text(str(error)).split())[:200]
            log.warning("MLflow does not take a %s, which is left out: %s", what, reason)
            return items
        half = len(items) // 2
        parts = (items[:half], items[half:])
        return [item for part in parts for item in _all_but_refused(send, part, what)]
    return []


def recorded_steps(mlflow: MlflowClient, run_id: str) -> dict[str, list[int]]:
    """Return the steps of all recorded values of every metric of a run."""
    names = mlflow.get_run(run_id).data.metrics
    history = {name: mlflow.get_metric_history(run_id, name) for name in names}
    return {name: [point.step for point in points] for name, points in history.items()}


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
        _all_but_refused(
            lambda some: mlflow.log_batch(run_id, params=some),
            new[start : start + 100],
            "parameter",
        )
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
        _all_but_refused(
            lambda some: mlflow.log_batch(run_id, tags=some), pairs[start : start + 100], "tag"
        )


def describe(mlflow: MlflowClient, run_id: str, text: str) -> None:
    """Add a paragraph of Markdown to the description that a run's page shows, unless it has it."""
    from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

    before = mlflow.get_run(run_id).data.tags.get(MLFLOW_RUN_NOTE, "")
    if text not in before:
        set_tags(mlflow, run_id, {MLFLOW_RUN_NOTE: f"{before}\n\n{text}".strip()})


def system_monitor(run_id: str) -> Any:
    """Return a monitor of CPU, memory and GPU; the caller calls ``start()`` and ``finish()``."""
    from mlflow.system_metrics import system_metrics_monitor as monitor

    make: Any = monitor.SystemMetricsMonitor  # untyped
    return make(run_id, resume_logging=True)


def clean_name(name: str) -> str:
    """Replace what MLflow does not take in the name of a metric or parameter by ``_``."""
    plain = re.sub(r"[^A-Za-z0-9_\-./ :]", "_", name)[:250]
    # It is part of a path there, which must be the shortest of its kind and lead downwards.
    return "/".join(part for part in plain.split("/") if part not in ("", ".", "..")) or "_"


def shorten(text: str, limit: int) -> str:
    """Cut a text to ``limit`` characters and say so at its end."""
    text = text.encode("utf-8", "replace").decode()  # odd file names hold half characters
    if len(text) <= limit:
        return text
    note = f" ... [shortened, {len(text)} characters]"
    return text[: limit - len(note)] + note


def _short_param(value: Any) -> str:
    return shorten(str(value), MAX_PARAM)


def _short_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: shorten(redact_text(str(text)), _MAX_TAG) for name, text in tags.items()}
