"""Shows at the end of pre-training whether the phrases lead the dream."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from PIL import Image

from callbacks.recorder import recorder_of
from mapo_lightning.models.interfaces import WorldModel
from mapo_lightning.training.datamodule import VideoDataModule
from mapo_lightning.training.told import ToldReport, measure_told, told_strip
from mapo_lightning.types import MapoError

log = logging.getLogger(__name__)


class ToldUntold(L.Callback):
    """Log ``told/...``, a picture and a table of dreams with and without the phrases.

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
        data: VideoDataModule = trainer.datamodule  # type: ignore[attr-defined]
        world_model = pl_module.world_model
        assert isinstance(world_model, WorldModel)
        try:
            batch = data.held_out_batch(self.clips)
            self.report = measure_told(
                world_model,
                {key: value.to(pl_module.device) for key, value in batch.items()},
                data.still_scenes(batch["video"]),
                data.mean_picture(),
                body=data.body_width,
            )
        except (ValueError, MapoError) as error:  # the model is trained, whatever happens here
            log.info("whether the phrases lead the dream was not measured: %s", error)
            return
        if recorder is not None:
            step = trainer.global_step
            recorder.log_metrics(trainer, self.report.metrics(), step)
            recorder.log_image(trainer, "told", told_strip(self.report), step)
            recorder.log_table(trainer, "told", rows(self.report), step)

    def save(self, folder: Path) -> None:
        """Write ``told.md``, ``told.png`` and ``told.json`` into a folder."""
        if self.report is not None:
            save_report(self.report, folder)

    def __str__(self) -> str:
        return self.report.sentence() if self.report is not None else ""


def save_report(report: ToldReport, folder: Path) -> None:
    """Write ``told.md`` (sentence and table), ``told.png`` (strip) and ``told.json`` (figures)."""
    folder.mkdir(parents=True, exist_ok=True)
    gains = [
        {"dream": f"{name} - told", "frames_ahead": h, **report.gain(name, h)._asdict()}
        for name in ("untold", "mistold")
        for h in report.horizons
    ]
    figures = json.dumps(rows(report) + gains, indent=1, allow_nan=False)
    (folder / "told.json").write_text(figures + "\n", encoding="utf-8")
    (folder / "told.md").write_text(f"{report.sentence()}\n\n{report.table()}", encoding="utf-8")
    Image.fromarray(told_strip(report)).save(folder / "told.png")


def rows(report: ToldReport) -> list[dict[str, Any]]:
    """A row per dream or yardstick and horizon: error and interval, in thousandths."""
    found: list[dict[str, Any]] = []
    for name in report.errors:
        for horizon in report.horizons:
            error = {
                k: float(np.round(v, 3)) for k, v in report.at(name, horizon)._asdict().items()
            }
            found.append({"dream": name, "frames_ahead": horizon, **error})
    return found
