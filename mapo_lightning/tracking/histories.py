"""Reads runs and their curves back from an MLflow store; writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mapo_lightning.config.redact import redact_text
from mapo_lightning.tracking import mlflow_client
from mapo_lightning.tracking.store_check import SERVER_SECONDS, check_readable, within
from mapo_lightning.types import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

_PARENT = "mlflow.parentRunId"
_SQLITE = "sqlite:///"

Curve = tuple[tuple[int, float], ...]
"""Steps and values, by step; of one step the value that was written last."""


class StoredRun(NamedTuple):
    """A run as a store holds it."""

    identity: str
    name: str
    status: str
    experiment: str
    """Id of its experiment."""
    parent: str
    """Id of the run that it belongs to; empty: none."""
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    """Newest values."""
    started: float
    """Seconds since 1970."""
    ended: float | None
    """The same; None while it runs, or after it was killed."""

    @property
    def phase(self) -> str:
        """Which phase it records: ``finetune`` also of a run that is called ``NAME/finetune``."""
        return self.name.rpartition("/")[2]


class Store:
    """An MLflow store that is read.

    Args:
        uri: Its address, with an absolute path; a password in it is not shown.

    Raises:
        ConfigError: It cannot be read.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        try:
            if uri.startswith(_SQLITE):
                check_readable(Path(uri.removeprefix(_SQLITE)))
                self._client = mlflow_client.client(uri)
            else:
                self._client = within(SERVER_SECONDS, lambda: mlflow_client.client(uri))
        except mlflow_client.errors() as error:
            raise self._unreadable(error) from error

    def runs(self, experiment: str | None = None) -> list[StoredRun]:
        """All runs that are not deleted, the oldest first.

        Args:
            experiment: Name of the only experiment to look into; None: all.

        Raises:
            ConfigError: The store has no such experiment, or cannot be read.
        """
        try:
            known = {e.name: str(e.experiment_id) for e in self._client.search_experiments()}
            if experiment is not None and experiment not in known:
                raise ConfigError(
                    f"the MLflow store '{redact_text(self.uri)}' has no experiment '{experiment}', "
                    f"only {', '.join(sorted(known))}: give experiment=NAME of one of them, or "
                    "another store with tracking.uri=..."
                )
            wanted = list(known.values()) if experiment is None else [known[experiment]]
            return sorted(self._search(wanted), key=lambda run: run.started)
        except mlflow_client.errors() as error:
            raise self._unreadable(error) from error

    def curve(self, run: str, metric: str) -> Curve:
        """All values of a metric of a run, in finite numbers; empty where there is none.

        Raises:
            ConfigError: The store cannot be read, or does not hold the run.
        """
        try:
            points = self._client.get_metric_history(run, metric)
        except mlflow_client.errors() as error:
            raise self._unreadable(error) from error
        newest = {p.step: float(p.value) for p in sorted(points, key=lambda p: p.timestamp)}
        return tuple(sorted(newest.items()))

    def page(self, run: StoredRun) -> str:
        """Address of a run's page on a server; empty for a file, which has no page."""
        if self.uri.startswith(_SQLITE) or redact_text(self.uri) != self.uri:
            return ""
        return f"{self.uri.rstrip('/')}/#/experiments/{run.experiment}/runs/{run.identity}"

    def _search(self, experiments: list[str]) -> Iterator[StoredRun]:
        token: str | None = None
        while True:
            found = self._client.search_runs(experiments, max_results=1000, page_token=token)
            for run in found:
                info, data = run.info, run.data
                yield StoredRun(
                    str(info.run_id), str(info.run_name), str(info.status), str(info.experiment_id),
                    data.tags.get(_PARENT, ""), data.tags, data.params, data.metrics,
                    info.start_time / 1000, info.end_time / 1000 if info.end_time else None,
                )  # fmt: skip
            token = found.token
            if not token:
                return

    def _unreadable(self, error: BaseException) -> ConfigError:
        return ConfigError(
            f"cannot read the MLflow store '{redact_text(self.uri)}': "
            f"{mlflow_client.reason(error)}. Give another with tracking.uri=..."
        )
