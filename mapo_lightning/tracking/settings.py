"""Where runs are recorded."""

from __future__ import annotations

from dataclasses import dataclass

from mapo_lightning.config.redact import redact_text
from mapo_lightning.types import ConfigError


@dataclass
class TrackingConfig:
    """Where runs are recorded."""

    enabled: bool = True
    """Record runs in MLflow. With false, the run's folder still has curves.csv (tracking.csv)."""

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

    csv: bool = True
    """Append every value of the curves to ``<phase>/curves.csv`` in the run's folder, with MLflow
    and without."""

    tensorboard: bool = False
    """Write the curves for TensorBoard too, into the folder ``tensorboard`` of the run; needs the
    extra ``tensorboard`` (``pip install 'mapo-lightning[tensorboard]'``)."""

    models: bool = True
    """At the end of fine-tuning, put the kept agent (the best one, or the last) into MLflow as a
    model that ``mlflow.pyfunc.load_model`` loads and whose ``predict`` acts: its weights once more,
    without the optimiser. Checkpoints are listed as models in any case."""

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
