"""Progress bar of a phase, with what it does and how long it will take."""

from __future__ import annotations

from typing import Any

import lightning as L
from tqdm import tqdm

from mapo_lightning.training.log_due import log_due, place_of
from mapo_lightning.waiting import pause


class PhaseProgress(L.Callback):
    """Bar with the phase's name, the loss and the latest return.

    It counts what the x-axis of the curves counts: simulator frames in fine-tuning, which may be
    few or many to an update, and updates in pre-training. The updates before the agent acts, which
    add no frames, have a bar of their own.

    Args:
        phase: Shown in front of the bar.
        watch: Short name -> logged metric, shown after the bar.
        frames_per_update: Simulator frames that an update adds once the agent acts, of all ranks.
    """

    def __init__(self, phase: str, watch: dict[str, str], frames_per_update: int = 0) -> None:
        self.phase, self.watch = phase, watch
        self.frames_per_update = frames_per_update
        self.bar: Any = None
        self._acts = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar."""
        if trainer.is_global_zero:
            self._open(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Move the bar."""
        if self.bar is None:
            return
        if log_due(trainer):
            seen = trainer.callback_metrics
            shown = {k: f"{float(seen[m]):.4g}" for k, m in self.watch.items() if m in seen}
            if self._acts:
                shown = {"update": f"{trainer.global_step:,}"} | shown
            self.bar.set_postfix(shown, refresh=False)
        self._move(trainer, pl_module)
        if not self._acts and self.frames_per_update and self._will_act(trainer, pl_module):
            self.bar.close()
            self._open(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the frames of the last update: they are played after the bar was moved."""
        if self.bar is not None:
            self._move(trainer, pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Close the bar, however training ended."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _move(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        done: Any = module.env_frames if self._acts else trainer.global_step
        self.bar.update(int(done) - self.bar.n)

    def _will_act(self, trainer: L.Trainer, module: L.LightningModule) -> bool:
        """Whether the next update stands on the axis of frames."""
        return not place_of(module, trainer.global_step + 1).prefix

    def _open(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        made, total = trainer.global_step, int(trainer.max_steps)
        self._acts = bool(self.frames_per_update) and self._will_act(trainer, module)
        if self._acts:
            made = int(module.env_frames)  # type: ignore[arg-type]
            total = made + (total - trainer.global_step) * self.frames_per_update
        elif self.frames_per_update:
            settings: Any = module.cfg
            total = min(total, settings.initial_updates)
        initial = bool(self.frames_per_update) and not self._acts
        self.bar = tqdm(
            total=total,
            initial=made,
            desc=f"{self.phase}, before acting" if initial else self.phase,
            unit="frame" if self._acts else "update",
            unit_scale=self._acts,
            mininterval=pause(),
            dynamic_ncols=True,
        )
