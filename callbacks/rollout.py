"""Looks at the dream: open-loop videos, and how fast they drift from the truth."""

from __future__ import annotations

import logging
from typing import Any, Protocol

import lightning as L
import numpy as np
import torch
from torch import Tensor

from callbacks.recorder import recorder_of
from mapo_lightning.data.video import FILM_HEIGHT
from mapo_lightning.judging.looks import looks
from mapo_lightning.models.interfaces import WorldModel
from mapo_lightning.training.log_due import log_at, place_of
from mapo_lightning.training.told import HORIZONS
from mapo_lightning.types import Batch, Frames

log = logging.getLogger(__name__)


class _HasRollouts(Protocol):
    def rollout_batch(self, count: int) -> Batch: ...


class ImaginationRollout(L.Callback):
    """Show the model a few frames, let it dream the rest, and compare it with the truth.

    Args:
        every: Updates between rollouts; one more is made at the end.
        seen: Frames that the model is shown.
        clips: Clips side by side in the video.
        fps: Frames per second of the video.
        name: Of the video and of the metrics.
    """

    def __init__(
        self, every: int, seen: int = 5, clips: int = 6, fps: int = 8, name: str = "rollout"
    ) -> None:
        self.every, self.seen, self.clips, self.fps = every, seen, clips, fps
        self.name = name

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Roll out on schedule."""
        if trainer.global_step % self.every == 0:
            self._roll(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Roll out what the trained model dreams."""
        if trainer.global_step % self.every:
            self._roll(trainer, pl_module)

    def _roll(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        recorder = recorder_of(trainer)
        if not trainer.is_global_zero or recorder is None or trainer.logger is None:
            return
        data: _HasRollouts = trainer.datamodule  # type: ignore[attr-defined]
        batch = {k: v.to(pl_module.device) for k, v in data.rollout_batch(self.clips).items()}
        length = batch["obs"].shape[1]
        if length <= self.seen:
            log.info(
                "no dream is shown: the longest sequence has %d frames, and the model sees the "
                "first %d of each",
                length,
                self.seen,
            )
            return
        world_model = pl_module.world_model
        assert isinstance(world_model, WorldModel)
        dream = world_model.open_loop(batch, self.seen)
        truth = batch["obs"].float() / 255.0
        place = place_of(pl_module, trainer.global_step)
        log_at(trainer, drift(truth, dream, self.seen, self.name), place)
        if recorder.records(trainer):
            film, name = strip(truth, dream, self.seen), f"{place.prefix}{self.name}"
            high = round(film.shape[1] * max(1.0, FILM_HEIGHT / truth.shape[2]))  # for every row
            recorder.log_video(trainer, name, film, self.fps, place.step, high)


def drift(truth: Tensor, dream: Tensor, seen: int, name: str = "rollout") -> dict[str, float]:
    """PSNR (dB) and SSIM of the dream at each horizon, for frames (B, T, H, W, 3) in [0, 1].

    ``rollout/psnr_moving_*`` is over the pixels that move. Beside it stand what repeating the last
    shown frame would score, ``rollout/psnr_moving_copy_*``, and the clip's still scene: a dream
    that does not beat both has not learned what moves.
    """
    yardsticks = {
        "copy": truth[:, seen - 1 : seen],
        "still_scene": truth.median(dim=1, keepdim=True).values,
    }
    metrics: dict[str, float] = {}
    for who, frames in {"": dream, **yardsticks}.items():
        for measure, found in looks(truth, frames.expand_as(truth), seen, HORIZONS).items():
            if who and not measure.startswith("psnr"):
                continue
            label = f"{name}/{measure}_{who}" if who else f"{name}/{measure}"
            for column, horizon in enumerate(found.ahead):
                value = float(np.nanmean(found.values[:, column]))
                if np.isfinite(value):  # no pixel may have moved
                    metrics[f"{label}_{horizon}"] = value
    return metrics


def strip(truth: Tensor, dream: Tensor, seen: int) -> Frames:
    """Video frames with rows truth, dream, error and a column per clip, (T, H', W', 3) uint8.

    The dream's row has a green edge while the model is shown the truth, a red one once it dreams.
    """
    rows = [truth, dream, (dream - truth).abs()]
    tiles = torch.stack([row.cpu() for row in rows], dim=2)  # (B, T, row, H, W, 3)
    pixels = (tiles.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    pixels = np.pad(pixels, ((0, 0), (0, 0), (0, 0), (2, 2), (2, 2), (0, 0)))
    edge = np.zeros_like(pixels[:, :, 1], dtype=bool)
    edge[:, :, :2], edge[:, :, -2:], edge[:, :, :, :2], edge[:, :, :, -2:] = True, True, True, True
    for t in range(pixels.shape[1]):
        colour = (60, 180, 75) if t < seen else (230, 60, 60)
        pixels[:, t, 1][edge[:, t, :, :, 0]] = np.array(colour, np.uint8)
    clips, steps, count, high, wide, _ = pixels.shape
    return pixels.transpose(1, 2, 3, 0, 4, 5).reshape(steps, count * high, clips * wide, 3)
