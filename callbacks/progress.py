"""Progress bars: one per phase, with what it does and how long it will take."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from tqdm import tqdm

from mapo_lightning.training.log_due import log_due


def pause() -> float:
    """Seconds between two updates of a bar: 0.1 on a terminal, 15 in a file."""
    return 0.1 if sys.stderr.isatty() else 15.0


@contextmanager
def counting(what: str, unit: str, *, show: bool = True) -> Iterator[Callable[..., None]]:
    """Show a bar for work that reports its progress with ``report(done, total, text="")``."""
    settings = {"mininterval": pause(), "dynamic_ncols": True, "disable": not show}
    with tqdm(desc=what, unit=unit, **settings) as bar:

        def report(done: int, total: int, text: str = "") -> None:
            bar.total = total
            bar.set_postfix_str(text, refresh=False)
            bar.update(done - bar.n)

        yield report


class PhaseProgress(L.Callback):
    """Bar over optimiser updates, with the phase's name, the loss and the latest return.

    Args:
        phase: Shown in front of the bar.
        watch: Short name -> logged metric, shown after the bar.
    """

    def __init__(self, phase: str, watch: dict[str, str]) -> None:
        self.phase, self.watch = phase, watch
        self.bar: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar."""
        if trainer.is_global_zero:
            self.bar = tqdm(
                total=trainer.max_steps,
                initial=trainer.global_step,
                desc=self.phase,
                unit="update",
                mininterval=pause(),
                dynamic_ncols=True,
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Move the bar."""
        if self.bar is None:
            return
        if log_due(trainer):
            seen = trainer.callback_metrics
            shown = {k: f"{float(seen[m]):.4g}" for k, m in self.watch.items() if m in seen}
            if getattr(pl_module, "env_frames", None) is not None:
                shown = {"frames": f"{pl_module.env_frames:,}"} | shown
            self.bar.set_postfix(shown, refresh=False)
        self.bar.update(trainer.global_step - self.bar.n)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Close the bar, however training ended."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
