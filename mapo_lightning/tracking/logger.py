"""Runs, metrics and parameters in MLflow. Only rank 0 ever talks to it.

One parent run holds a child run per phase. Metrics go through a :class:`MetricQueue`, so that a
slow store costs no training time; files go through :mod:`mapo_lightning.tracking.artifacts`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only

from mapo_lightning.config.redact import redact_text
from mapo_lightning.tracking import mlflow_client, mlflow_models
from mapo_lightning.tracking.curves import check_tensorboard
from mapo_lightning.tracking.mlflow_client import Point, Status, clean_name
from mapo_lightning.tracking.mlflow_models import Kept, Source
from mapo_lightning.tracking.queue import MetricQueue
from mapo_lightning.tracking.settings import TrackingConfig
from mapo_lightning.tracking.store_check import StoreError
from mapo_lightning.types import ConfigError
from mapo_lightning.waiting import waiting

__all__ = [
    "Kept",
    "RunLogger",
    "SilentLogger",
    "Source",
    "Status",
    "TrackingConfig",
    "check_store",
    "finish_parent",
    "is_main_process",
    "log_results",
    "make_logger",
    "open_store",
    "run_logger",
    "start_parent",
    "store_uri",
    "where_to_look",
]

log = logging.getLogger(__name__)

_HEARTBEAT = 60.0  # seconds between two signs of life
_LAST_WAIT = 120.0  # seconds that the end of a run waits for a store that is away


def is_main_process() -> bool:
    """Tell whether this process is rank 0 of node 0; also right before a Trainer exists."""
    # NODE_RANK and GROUP_RANK: the first process of a second node does not know its rank yet.
    nodes = (os.environ.get(name) or "0" for name in ("NODE_RANK", "GROUP_RANK"))
    return not getattr(rank_zero_only, "rank", 0) and all(node == "0" for node in nodes)


def store_uri(cfg: TrackingConfig) -> str:
    """Return the store's address with an absolute path."""
    if not cfg.uri.startswith("sqlite:///"):
        return cfg.uri
    return f"sqlite:///{Path(cfg.uri.removeprefix('sqlite:///')).expanduser().absolute()}"


def open_store(cfg: TrackingConfig) -> str | None:
    """Make the store and the experiment where they are missing, and close runs whose process died.

    Safe to call from several processes at once: MLflow itself ruins a fresh SQLite file when two
    processes create its tables together, so the first use happens under a file lock.

    Returns:
        The experiment's id, or None where tracking is off or this is not the main process.

    Raises:
        ConfigError: The store cannot be opened.
    """
    if not cfg.enabled or not is_main_process():
        return None
    uri = store_uri(cfg)
    with _in_one_sentence(uri):
        identity = mlflow_client.open_experiment(uri, cfg.experiment, cfg.artifacts)
        mlflow_client.close_dead_runs(mlflow_client.client(uri), identity)
    return identity


def check_store(cfg: TrackingConfig) -> None:
    """See whether the store can take the run; makes and changes nothing.

    Raises:
        ConfigError: It cannot; or TensorBoard is asked for and missing.
    """
    check_tensorboard(cfg)
    if cfg.enabled and is_main_process():
        with _in_one_sentence(store_uri(cfg)):
            mlflow_client.check_experiment(store_uri(cfg), cfg.experiment, cfg.artifacts)


@contextmanager
def _in_one_sentence(uri: str) -> Iterator[None]:
    try:
        yield
    except mlflow_client.errors() as error:
        raise ConfigError(
            f"cannot open the MLflow store '{redact_text(uri)}': {mlflow_client.reason(error)}. "
            "Give another with tracking.uri=..., or switch it off with tracking.enabled=false."
        ) from error


def start_parent(
    cfg: TrackingConfig,
    name: str,
    tags: Mapping[str, str],
    run_id: str | None = None,
    params: Mapping[str, Any] | None = None,
) -> str | None:
    """Start the run that holds the runs of all phases.

    Args:
        cfg: Where to.
        name: Name of the run.
        tags: Further tags.
        run_id: A run to continue instead.
        params: Its parameters.

    Returns:
        Its id, or None where tracking is off or this is not the main process.
    """
    experiment = open_store(cfg)
    if experiment is None:
        return None
    uri = store_uri(cfg)
    with _in_one_sentence(uri):
        client = mlflow_client.client(uri)
        found = mlflow_client.start_run(client, experiment, name, tags, run_id)
        if params:
            mlflow_client.log_params(client, found, params)
        return found


def log_results(
    cfg: TrackingConfig, run_id: str | None, figures: Mapping[str, float], words: str = ""
) -> None:
    """Show what came out in the list of runs: the figures become metrics of the parent.

    Args:
        cfg: The store.
        run_id: As returned by :func:`start_parent`; None does nothing.
        figures: By name; where one was there before, the later counts.
        words: What the description of the parent says of it, after what is there; Markdown.
    """
    if run_id is None or not is_main_process():
        return
    named = {clean_name(name): float(value) for name, value in figures.items()}
    try:
        client = mlflow_client.client(store_uri(cfg))
        mlflow_models.log_results(client, run_id, named)
        if words:
            mlflow_client.describe(client, run_id, words)
    except mlflow_client.errors() as error:
        reason = mlflow_client.reason(error)
        log.warning("MLflow did not take the results of run %s: %s", run_id, reason)


def where_to_look(cfg: TrackingConfig) -> str | None:
    """How to open the page of the runs, for people; None where nothing is tracked."""
    if not cfg.enabled or not is_main_process():
        return None
    uri = store_uri(cfg)
    try:
        page = mlflow_client.runs_page(uri, cfg.experiment)
    except mlflow_client.errors():  # the run is over, and the store away
        page = None
    shown = redact_text(uri)
    if not shown.startswith("sqlite:"):
        return page or shown
    command = f"mlflow ui --backend-store-uri {shown}"
    return command if page is None else f"{command}, and then {page}"


def finish_parent(
    run_id: str | None, status: Status = "FINISHED", cfg: TrackingConfig | None = None
) -> None:
    """End a run.

    Args:
        run_id: As returned by :func:`start_parent`; None does nothing.
        status: How it ended.
        cfg: The store; the one opened last where it is None.
    """
    if run_id is None or not is_main_process():
        return
    client = mlflow_client.client(store_uri(cfg) if cfg else None)
    try:
        client.set_terminated(run_id, status)
    except mlflow_client.errors() as error:
        log.warning("MLflow run %s could not be closed: %s", run_id, mlflow_client.reason(error))


def make_logger(
    cfg: TrackingConfig,
    run_name: str,
    parent_run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    run_id: str | None = None,
) -> RunLogger | SilentLogger | None:
    """Make the Lightning logger of one phase.

    Args:
        cfg: Where to.
        run_name: Name of the child run, such as ``NAME/pretrain``.
        parent_run_id: The run it belongs to.
        tags: Further tags.
        run_id: A run to continue instead of starting one.

    Returns:
        The logger; None where tracking is off; on other ranks one that does nothing.
    """
    if not cfg.enabled:
        return None
    experiment = open_store(cfg)
    if experiment is None:
        return SilentLogger()
    linked = {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
    uri, wanted = store_uri(cfg), {**linked, **(tags or {})}
    with _in_one_sentence(uri):
        client = mlflow_client.client(uri)
        identity = mlflow_client.start_run(client, experiment, run_name, wanted, run_id)
        return RunLogger(cfg, run_name, identity, resumed=run_id is not None)


def run_logger(loggers: Iterable[object]) -> RunLogger | None:
    """The one among loggers that writes to MLflow."""
    return next((one for one in loggers if isinstance(one, RunLogger)), None)


class SilentLogger(DummyLogger):
    """Stands in for :class:`RunLogger` on the ranks that must not touch the store."""

    run_id: None = None


class RunLogger(MLFlowLogger):
    """Lightning's MLflow logger with background delivery, clean names and safe resuming.

    Args:
        cfg: The store.
        run_name: Name of the run.
        run_id: The run, already started.
        resumed: The run has earlier values: steps that it already holds are not written again.
    """

    def __init__(
        self, cfg: TrackingConfig, run_name: str, run_id: str, resumed: bool = False
    ) -> None:
        super().__init__(
            cfg.experiment, run_name=run_name, tracking_uri=store_uri(cfg), run_id=run_id
        )
        self.cfg, self.active_run = cfg, run_id
        self._queue: MetricQueue[Point] | None = None
        recorded = mlflow_client.recorded_steps(self.experiment, run_id) if resumed else {}
        self._seen = {name: max(steps) for name, steps in recorded.items()}
        self._recorded = {name: len(steps) for name, steps in recorded.items()}
        self._counts: dict[str, int] = {}  # values of every metric since the run began
        self._repeated: dict[str, int] = {}  # of these, how many still to come are recorded already
        self._beat = time.monotonic()
        self._refused: set[str] = set()
        self.failed_calls = 0
        self.stopped = False
        """Whether somebody has stopped the run: it then ends as KILLED, not as FAILED."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Queue values; those that a resumed run has recorded before are left out."""
        now, at = int(time.time() * 1000), step or 0
        named = {clean_name(name): float(value) for name, value in metrics.items()}
        self._put(
            [(name, value, now, at) for name, value in named.items() if self._is_new(name, at)]
        )

    def _is_new(self, name: str, step: int) -> bool:
        """Count a value, and tell whether it has to be recorded."""
        self._counts[name] = self._counts.get(name, 0) + 1
        if self._repeated.get(name, 0):
            self._repeated[name] -= 1
            return False
        return step > self._seen.get(name, -1) and name not in self._refused

    def _put(self, points: list[Point]) -> None:
        if self._queue is None:
            self._queue = MetricQueue(self._send, tick=self._heartbeat)
        self._queue.put(points)

    def state(self) -> dict[str, Any]:
        """Number of values of every metric so far, and those on their way, for a checkpoint."""
        waiting = [] if self._queue is None else self._queue.waiting()
        return {"counts": dict(self._counts), "waiting": [list(point) for point in waiting]}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Take up the curves where a checkpoint was written.

        Values that were on their way then and never arrived are queued again. Of those that the
        run will log once more, as many are left out as the store has beyond the checkpoint.

        Args:
            state: What `state` returned.
        """
        self._counts, self._seen = dict(state["counts"]), {}
        beyond = {n: held - self._counts.get(n, 0) for n, held in self._recorded.items()}
        self._repeated = {name: count for name, count in beyond.items() if count > 0}
        lost: list[Point] = []
        missing = {n: count - self._recorded.get(n, 0) for n, count in self._counts.items()}
        for name, value, at, step in reversed(state["waiting"]):  # the newest have not arrived
            if missing.get(name, 0) > 0:
                missing[name] -= 1
                lost.append((name, value, at, step))
        self._put(lost[::-1])

    @rank_zero_only
    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Record parameters; those that changed since the run began become one tag per resume."""
        values = params if isinstance(params, Mapping) else vars(params)
        self.attempt(
            "parameters", lambda: mlflow_client.log_params(self.experiment, self.active_run, values)
        )

    def flush(self, timeout: float = 30.0) -> bool:
        """Deliver queued values; returns whether all arrived within ``timeout`` seconds."""
        return self._queue is None or self._queue.flush(timeout)

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Deliver queued values and end the run; waits a while for a store that is away."""
        if self._queue is not None:
            with waiting("the MLflow store, to deliver what is left"):
                self._queue.close(5.0 if self.stopped else _LAST_WAIT)
            self._queue = None
        ended: Status = "FAILED" if status == "failed" else "FINISHED"
        if self.stopped:
            ended = "KILLED"
        self.attempt(
            "the end of the run", lambda: self.experiment.set_terminated(self.active_run, ended)
        )

    def learn_from(self, sources: Sequence[Source], pretrained_run: str = "") -> None:
        """Record data sets, and the model of another run, as inputs.

        Args:
            sources: Data sets.
            pretrained_run: Id of the run whose last checkpoint this one starts from; empty: none.
        """

        def call() -> None:
            client = self.experiment
            model = mlflow_models.model_of(client, pretrained_run) if pretrained_run else None
            mlflow_models.log_sources(
                client, self.active_run, sources, [model] if model is not None else []
            )

        self.attempt("the data sets", call)

    def keep(self, kept: Kept, about: Mapping[str, str]) -> str | None:
        """List a checkpoint among MLflow's models, with its scores; may be called repeatedly.

        Args:
            kept: Which one.
            about: What to say about it.

        Returns:
            The model's id; None where the store did not take it.
        """
        found: list[str] = []

        def call() -> None:
            if not self.flush(0.0):  # its scores are on their way
                raise StoreError("the store does not answer")
            found.append(mlflow_models.keep(self.experiment, self.active_run, kept, about))

        self.attempt(f"the model of {kept.name}.ckpt", call)
        return found[0] if found else None

    def give_up(self, name: str) -> None:
        """Say of a checkpoint that was to be kept, and was never written, that it will not be."""
        self.attempt(
            f"the model of {name}.ckpt",
            lambda: mlflow_models.give_up(self.experiment, self.active_run, name),
        )

    def results(self) -> dict[str, float]:
        """The figures that the run has ended with; empty where the store is away."""
        found: dict[str, float] = {}
        self.attempt(
            "a question about the results",
            lambda: found.update(mlflow_models.results(self.experiment, self.active_run)),
        )
        return found

    def attempt(self, what: str, call: Callable[[], object]) -> bool:
        """Run a call that needs the store; a failure is logged and counted, never raised.

        While the store is away, it is not called: every call would hold up training for seconds.
        """
        if self._queue is not None and self._queue.away:
            self.failed_calls += 1
            log.warning("MLflow did not take %s: the store does not answer", what)
            return False
        try:
            call()
        except mlflow_client.errors() as error:
            self.failed_calls += 1
            log.warning("MLflow did not take %s: %s", what, mlflow_client.reason(error))
            return False
        return True

    def _send(self, points: list[Point]) -> None:
        # A value that MLflow does not take must not hold up those behind it for ever.
        self._refused.update(mlflow_client.log_points(self.experiment, self.active_run, points))

    def _heartbeat(self) -> None:
        if time.monotonic() - self._beat >= _HEARTBEAT:
            self._beat = time.monotonic()
            self.experiment.set_tag(self.active_run, mlflow_client.BEAT, str(int(time.time())))
