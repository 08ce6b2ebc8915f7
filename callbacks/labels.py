"""Watches the labels: how many were asked for, how many said nothing, and what they look like."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any, Protocol

import lightning as L
import torch
from tqdm import tqdm

from callbacks.recorder import recorder_of
from mapo_lightning import build, tracking
from mapo_lightning.config import RunConfig
from mapo_lightning.data.clips import LabelExample
from mapo_lightning.data.corpus import LabelProgress
from mapo_lightning.types import Batch

log = logging.getLogger(__name__)

COUNTS = ("asked", "hits", "null", "windows")


class _HasExamples(Protocol):
    def label_examples(self, count: int) -> list[LabelExample]: ...


class RecordLabels(L.Callback):
    """Log ``vlm/...`` counts while training, and phrases next to their frames at the end.

    Args:
        examples: Windows in the picture; 0 draws none.
    """

    def __init__(self, examples: int) -> None:
        self.examples = examples
        self.total = dict.fromkeys(COUNTS, torch.zeros((), dtype=torch.long))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Add up what the loader's workers counted; nothing is read back until a point is due."""
        for name in COUNTS:
            self.total[name] = self.total[name].to(pl_module.device) + batch[f"vlm_{name}"].sum()
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            windows = self.total["windows"].clamp(min=1)
            pl_module.log_dict(
                {
                    "vlm/asked": self.total["asked"].float(),
                    "vlm/hit_rate": self.total["hits"] / windows,
                    "vlm/null_rate": self.total["null"] / windows,
                }
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the picture."""
        recorder = recorder_of(trainer)
        if recorder is not None and trainer.is_global_zero and self.examples:
            data: _HasExamples = trainer.datamodule  # type: ignore[attr-defined]
            recorder.log_phrases(trainer, data.label_examples(self.examples), trainer.global_step)


def label_corpus(cfg: RunConfig) -> None:
    """Fill the label store with every window of the videos, with a bar; or only count.

    Raises:
        ConfigError: There are no videos, or nobody to ask.
    """
    rank = int(os.environ.get("RANK", "0"))
    if cfg.data.kind == "demo" and tracking.is_main_process():
        build.render_demo(cfg)
    work = build.build_labelling(cfg, rank, int(os.environ.get("WORLD_SIZE", "1")))
    if cfg.label.dry:
        log.info("%s", work.estimate(cfg.label.probe))
        return
    pause = 0.1 if sys.stderr.isatty() else 15.0
    with tqdm(
        total=work.windows, desc="labelling", unit="window", mininterval=pause, disable=rank > 0
    ) as bar:
        done = work.run(lambda progress: _show(bar, progress))
    log.info("%s", done)


def _show(bar: Any, now: LabelProgress) -> None:
    eta = "?" if now.eta_seconds is None else tqdm.format_interval(now.eta_seconds)
    text = (
        f"{now.rate:.1f} asked/s, known {now.stats.hits}, null {now.null_rate:.0%}, "
        f"left {max(0, now.missing - now.stats.asked)} in {eta}"
    )
    bar.set_postfix_str(text, refresh=False)
    bar.update(now.done + now.lost - bar.n)
