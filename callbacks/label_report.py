"""Reports on the labels: how many there were, how good they are, and what they look like."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import lightning as L
import torch

from callbacks.recorder import MLflowRecorder, recorder_of
from callbacks.settings import CallbacksConfig
from mapo_lightning.data.clips import ClipDataset
from mapo_lightning.label_tools.gallery import draw
from mapo_lightning.label_tools.page import page
from mapo_lightning.label_tools.quality_report import measure_clips
from mapo_lightning.semantics.describer import NullDescriber
from mapo_lightning.training.datamodule import VideoDataModule
from mapo_lightning.training.log_due import log_due, log_now
from mapo_lightning.types import Batch, MapoError
from mapo_lightning.waiting import counting

log = logging.getLogger(__name__)

COUNTS = ("asked", "hits", "null", "rejected", "corrected", "unanswered", "windows")


class LabelReport(L.Callback):
    """Log ``vlm/...`` counts while training; phrases, a page and the labels' quality at the end.

    Args:
        cfg: Number of windows for each report at the end; 0 skips it.
    """

    def __init__(self, cfg: CallbacksConfig) -> None:
        self.cfg = cfg
        self.total = dict.fromkeys(COUNTS, torch.zeros((), dtype=torch.long))

    def state_dict(self) -> dict[str, Any]:
        """The counts go into the checkpoints."""
        return {name: int(total) for name, total in self.total.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on."""
        self.total = {name: torch.tensor(int(state_dict.get(name, 0))) for name in COUNTS}

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Add up the counts of the batch on the device; they are read only when a log is due."""
        for name in COUNTS:
            self.total[name] = self.total[name].to(pl_module.device) + batch[f"vlm_{name}"].sum()
        if log_due(trainer):
            windows = self.total["windows"].clamp(min=1)
            log_now(
                pl_module,
                {
                    "vlm/asked": self.total["asked"].float(),
                    "vlm/hit_rate": self.total["hits"] / windows,
                    "vlm/null_rate": self.total["null"] / windows,
                    "vlm/rejected": self.total["rejected"].float(),
                    "vlm/corrected": self.total["corrected"].float(),
                    "vlm/unanswered": self.total["unanswered"].float(),
                },
            )

    def __str__(self) -> str:
        """What became of the windows of this process, in one line."""
        count = {name: int(total) for name, total in self.total.items()}
        return (
            f"labels of {count['windows']} windows: {count['asked']} queried, "
            f"{count['hits']} known before; {count['null']} count as null, "
            f"{count['unanswered']} of them for lack of an answer"
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record phrases and the page, and judge the labels; a failure only logs a warning."""
        recorder = recorder_of(trainer)
        if recorder is None or not recorder.records(trainer):
            return
        data: VideoDataModule = trainer.datamodule  # type: ignore[attr-defined]
        clips = data.clips("all")
        try:
            self._show(trainer, recorder, clips)
            if self.cfg.quality and not isinstance(clips.labeler.describer, NullDescriber):
                with self._bar("quality of the labels", "window") as report:
                    found = measure_clips(clips, self.cfg.quality, progress=report)
                recorder.log_table(trainer, "label_quality", [found.row()], trainer.global_step)
                figures = {
                    "labels/direction_as_points": found.flow.share,
                    "labels/direction_as_simulator": found.truth.share,
                    "labels/direction_as_class": found.sentence.share,
                    "labels/still_null": found.still_null,
                }
                known = {name: x for name, x in figures.items() if math.isfinite(x)}
                recorder.log_metrics(trainer, known, trainer.global_step)
        except MapoError as error:  # the model is trained; this report can be made again
            log.warning("the report on the labels is incomplete: %s", error)
        finally:
            clips.labeler.close()

    def _show(self, trainer: L.Trainer, recorder: MLflowRecorder, clips: ClipDataset) -> None:
        step = trainer.global_step
        if self.cfg.phrases:
            recorder.log_phrases(trainer, clips.label_examples(self.cfg.phrases), step)
        store = clips.labeler.store
        if self.cfg.gallery and store.root.is_dir():
            sample = draw(store, [video.path for video in clips.videos], self.cfg.gallery)
            title = ", ".join(sorted({video.path.parent.name for video in clips.videos})[:3])
            with self._bar("gallery", "label") as report:
                drawn = page(sample, title, clips.labeler.reviews, report)
            recorder.log_page(trainer, "labels", drawn, step)

    def _bar(self, what: str, unit: str) -> AbstractContextManager[Callable[..., None]]:
        return counting(what, unit, show=self.cfg.progress, stays=False)
