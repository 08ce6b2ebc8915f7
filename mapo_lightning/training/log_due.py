"""When and how to log: the one place that knows which updates reach the logger."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
from torch import Tensor


def log_due(trainer: L.Trainer, *, counted: bool = True) -> bool:
    """Whether what is logged at this update reaches the logger.

    Args:
        trainer: The trainer at work.
        counted: Whether ``trainer.global_step`` includes this update: true in a callback's
            ``on_train_batch_end``, false in the module's ``training_step``.
    """
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return (trainer.global_step + (not counted)) % every == 0


def log_now(module: L.LightningModule, values: Mapping[str, Tensor | float]) -> None:
    """Hand scalars of this update to the logger at once, and show them to other callbacks.

    Lightning's own log would reach the logger after the checkpoint of this update: a run killed in
    between and resumed would lack the point. It would also repeat a value at all later points of
    the curve until there is another one.

    Args:
        module: The module in training; its ``curve_step``, if it has one, is the position on the
            x-axis, otherwise the number of updates.
        values: By name.
    """
    module.log_dict(dict(values), logger=False)
    if module.trainer.loggers:
        step = getattr(module, "curve_step", module.trainer.global_step)
        scalars = {name: float(value) for name, value in values.items()}
        for logger in module.trainer.loggers:
            logger.log_metrics(scalars, step)
