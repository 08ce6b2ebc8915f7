"""Curves beside MLflow, or without it: a file of values in the run's folder, and TensorBoard."""

from __future__ import annotations

import csv
import importlib.util
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from mapo_lightning.tracking.settings import TrackingConfig
from mapo_lightning.types import ConfigError

log = logging.getLogger(__name__)

CURVES = "curves.csv"
"""File of all values of a phase, in the phase's folder."""
COLUMNS = ("name", "step", "value", "time")
"""Of that file; time is in whole seconds since 1970."""


def check_tensorboard(cfg: TrackingConfig) -> None:
    """See that TensorBoard is there where it is asked for.

    Raises:
        ConfigError: It is not installed.
    """
    if cfg.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "tracking.tensorboard=true needs TensorBoard, which is not installed: "
            "pip install 'mapo-lightning[tensorboard]', or leave it out"
        )


def local_loggers(
    cfg: TrackingConfig, folder: Path, phase: str, resumed_at: int | None = None
) -> list[Logger]:
    """Make the loggers of a phase that write into the run's folder.

    Args:
        cfg: Which ones.
        folder: Of the run.
        phase: Such as ``pretrain``.
        resumed_at: Position on the x-axis of the checkpoint that the phase goes on from; None: it
            starts.
    """
    found: list[Logger] = []
    if cfg.csv:
        found.append(CurvesFile(folder / phase / CURVES))
    if cfg.tensorboard:
        # TensorBoard hides what an earlier start has written beyond the checkpoint.
        purge = None if resumed_at is None else resumed_at + 1
        board = folder / "tensorboard"
        found.append(TensorBoardLogger(board, name=phase, version="", purge_step=purge))
    return found


class CurvesFile(Logger):
    """Appends every value to a CSV file, a row each; what is written is never written again.

    Args:
        path: The file. It begins anew unless `resume` is called before the first value.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.rows = path, 0
        self._file: TextIO | None = None
        self._kept: int | None = None

    @property
    def name(self) -> str:
        """Of the file."""
        return self.path.name

    @property
    def version(self) -> str:
        """There is one only."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the settings are in the run's config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write values; a disk that is full loses them, and training goes on."""
        now = int(time.time())
        rows = [(name, step or 0, repr(float(value)), now) for name, value in metrics.items()]
        self.rows += len(rows)
        try:
            file = self._file or self._open()
            csv.writer(file, lineterminator="\n").writerows(rows)
            file.flush()
        except OSError as error:
            log.warning("values could not be written to '%s': %s", self.path, error.strerror)

    def resume(self, rows: int) -> None:
        """Go on behind the first rows of the file, which a checkpoint knows of.

        Args:
            rows: As many as had been written at the checkpoint.
        """
        self._kept = self.rows = rows

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file; a later value would open it again."""
        if self._file is not None:
            self._file.close()
            self._file, self._kept = None, self.rows

    def _open(self) -> TextIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._kept is not None and self.path.is_file():
            # A kill may have left rows that training will write again, or half of one.
            with self.path.open("r+b") as old:
                old.truncate(
                    sum(len(line) for line, _ in zip(old, range(self._kept + 1), strict=False))
                )
        else:
            self.path.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8", newline="")
        return self._file
