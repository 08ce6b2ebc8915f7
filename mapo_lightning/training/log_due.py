"""When to log: the one place that knows which updates Lightning hands to the logger."""

from __future__ import annotations

import lightning as L


def log_due(trainer: L.Trainer, *, counted: bool = True) -> bool:
    """Whether what is logged at this update reaches the logger.

    Args:
        trainer: The trainer at work.
        counted: Whether ``trainer.global_step`` includes this update: true in a callback's
            ``on_train_batch_end``, false in the module's ``training_step``.
    """
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return (trainer.global_step + (not counted)) % every == 0
