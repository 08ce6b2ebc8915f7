"""Shows at the end of pre-training whether the phrases lead the dream."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import lightning as L
from PIL import Image

from callbacks.recorder import recorder_of
from mapo_lightning.models.interfaces import WorldModel
from mapo_lightning.training.told import ToldReport, measure_held_out, told_strip
from mapo_lightning.types import MapoError

log = logging.getLogger(__name__)


class ToldUntold(L.Callback):
    """Log ``told/...``, a picture and a table of dreams with and without the phrases.

    In MLflow, the run's description says it in words.

    Args:
        clips: Held-out clips that are dreamt; 0 skips it.
    """

    def __init__(self, clips: int) -> None:
        self.clips = clips
        self.report: ToldReport | None = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Dream every version of the held-out clips."""
        recorder = recorder_of(trainer)
        if not self.clips or not trainer.is_global_zero:
            return
        world_model = pl_module.world_model
        assert isinstance(world_model, WorldModel)
        try:
            self.report = measure_held_out(world_model, trainer.datamodule, self.clips)  # type: ignore[attr-defined]
        except ValueError as error:
            log.info("whether the phrases lead the dream was not measured: %s", error)
            return
        except MapoError as error:  # the model is trained, whatever happens here
            log.warning("whether the phrases lead the dream was not measured: %s", error)
            return
        if recorder is not None:
            step = trainer.global_step
            recorder.describe(trainer, self.report.sentence())
            recorder.log_metrics(trainer, self.report.metrics(), step)
            recorder.log_image(trainer, "told", told_strip(self.report), step)
            recorder.log_table(trainer, "told", rows(self.report), step)


def save_report(report: ToldReport, folder: Path) -> None:
    """Write ``told.md`` (sentence and table), ``told.png`` (strip) and ``told.json`` (figures)."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = json.dumps(rows(report), indent=1, allow_nan=False)
    (folder / "told.json").write_text(figures + "\n", encoding="utf-8")
    (folder / "told.md").write_text(f"{report.sentence()}\n\n{report.table()}", encoding="utf-8")
    Image.fromarray(told_strip(report)).save(folder / "told.png")


def rows(report: ToldReport) -> list[dict[str, Any]]:
    """A row per dream, yardstick or difference and horizon, in thousandths with its interval."""
    return [
        {"dream": name, "frames_ahead": horizon}
        | {key: round(number, 3) for key, number in value._asdict().items()}
        for name, horizon, value in report.rows()
    ]
