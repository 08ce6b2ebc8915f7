"""When and how to log: the one place that knows which updates reach the logger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import lightning as L
from torch import Tensor


class Place(NamedTuple):
    """Where in the curves a value stands."""

    prefix: str
    """Comes before the name of the curve: ``initial/`` before the agent acts, else nothing."""
    step: int
    """Position on the x-axis: updates, or simulator frames."""


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
        module: The module in training; its ``curve``, if it has one, is the place, otherwise the
            number of updates.
        values: By name.
    """
    module.log_dict(dict(values), logger=False)
    if module.trainer.loggers:
        log_at(
            module.trainer, values, getattr(module, "curve", Place("", module.trainer.global_step))
        )


def log_at(trainer: L.Trainer, values: Mapping[str, Tensor | float], place: Place) -> None:
    """Hand scalars to all loggers.

    Args:
        trainer: The trainer at work.
        values: By name.
        place: Where in the curves they stand.
    """
    scalars = {f"{place.prefix}{name}": float(value) for name, value in values.items()}
    for logger in trainer.loggers:
        logger.log_metrics(scalars, place.step)


def place_of(module: L.LightningModule, updates: int) -> Place:
    """Where in the curves stands what is found out after so many updates of a module."""
    place = getattr(module, "place", None)
    found: Place = Place("", updates) if place is None else place(updates)
    return found
