"""Where runs are recorded."""

from __future__ import annotations

from dataclasses import dataclass

from mapo_lightning.config.redact import redact_text
from mapo_lightning.types import ConfigError


@dataclass
class TrackingConfig:
    """Where runs are recorded."""

    enabled: bool = True
    """Record runs in MLflow; false records nothing."""

    uri: str = "sqlite:///runs/mlflow.db"
    """MLflow store: ``sqlite:///FILE`` (a relative FILE starts in the working folder) or the
    ``http(s)://`` address of a server."""

    experiment: str = "mapo"
    """Name of the MLflow experiment that collects the runs."""

    parent: str = ""
    """MLflow run that this run is shown under, as a sweep does with its runs; empty: none."""

    artifacts: str = "runs/artifacts"
    """Folder for videos, pictures and checkpoints; counts when the experiment is first created, and
    not with a server, which has its own."""

    system_metrics: bool = False
    """Also record CPU, memory and GPU use of the machine."""

    git_diff: bool = False
    """Also record what the checkout that this package runs from changes since its commit, as
    git.diff, and the names of its untracked files. Commit and whether it has changes are recorded
    in any case."""

    def __post_init__(self) -> None:
        if not self.experiment.strip():
            raise ConfigError("experiment must be a name, got an empty text")
        if not self.uri.startswith(("sqlite:///", "http://", "https://")):
            shown = redact_text(self.uri)
            raise ConfigError(
                "uri must start with sqlite:/// or http(s):// (MLflow no longer takes plain "
                f"folders), got {shown!r}"
            )
