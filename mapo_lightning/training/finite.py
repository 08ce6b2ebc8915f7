"""Notices losses, gradients and weights that are no finite numbers, without waiting for the device.

An update adds its scalars to counters on the device. The host reads them where it waits anyway:
when values are logged, and before a checkpoint is written.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from mapo_lightning.types import CheckpointError, DivergedError

TOTAL = "total"
"""Name of the loss that is back-propagated, among the scalars of an update."""


class FiniteWatch:
    """Counts, for every scalar of an update, the updates in which it was a finite number.

    Attributes:
        begun: Updates made before the first that is counted.
    """

    def __init__(self) -> None:
        self.begun = 0
        self._made = 0
        self._names: tuple[str, ...] = ()
        self._count = self._finite = torch.zeros(0)

    def add(self, scalars: Mapping[str, Tensor]) -> None:
        """Count one update. Four kernels, which a graph may record while the names are the same.

        Where the names change, as when an agent begins to learn, counting starts afresh.

        Raises:
            DivergedError: They change, and what was counted so far was not finite; on all ranks.
        """
        values = torch.stack([value.detach() for value in scalars.values()])
        if self._names != tuple(scalars):
            self.check()
            self.begun, self._made = self.begun + self._made, 0
            self._names = tuple(scalars)
            self._count, self._finite = torch.zeros_like(values), torch.zeros_like(values)
        self._made += 1
        self._count.add_(values, alpha=0)  # adds zero, or NaN, which stays
        self._count.add_(1)
        torch.fmax(self._finite, self._count, out=self._finite)  # passes over NaN

    def check(self) -> None:
        """See whether all scalars were finite, on all ranks; waits for the device.

        Raises:
            DivergedError: The loss or a gradient was not.
        """
        if not self._names:
            return
        # The number of finite updates of what broke; infinity for what did not.
        made = torch.where(self._count.isnan(), self._finite, torch.inf)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(made, dist.ReduceOp.MIN)
        broke = dict(zip(self._names, made.tolist(), strict=True))
        # Other scalars are logged only: they may be undefined for a while and do no harm.
        at = min(broke[name] for name in self._names if name == TOTAL or "grad_norm/" in name)
        if at == float("inf"):
            return
        names = [name for name, updates in broke.items() if updates <= at]
        terms = [name for name in names if "grad_norm/" not in name and name != TOTAL]
        raise DivergedError(
            f"training diverged at update {self.begun + int(at) + 1}: "
            f"{', '.join(terms or names)} became infinite or NaN. The checkpoints so far hold "
            "finite weights, and resume= goes on from the last of them; take a smaller learning "
            "rate, or trainer.precision=32-true"
        )


def broken_weights(weights: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds an infinite number or NaN; None if none does.

    Args:
        weights: Tensors on one device, or on the meta device, whose numbers nobody knows.
    """
    floats = {
        name: tensor
        for name, tensor in weights.items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.is_meta
    }
    if not floats:
        return None
    finite = torch.stack([tensor.isfinite().all() for tensor in floats.values()]).tolist()
    return next((name for name, fine in zip(floats, finite, strict=True) if not fine), None)


def refuse_broken_weights(weights: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights that nothing can be learnt from.

    Args:
        weights: As `broken_weights`.
        what: Where they come from, for the message.

    Raises:
        CheckpointError: One of them is infinite or NaN.
    """
    name = broken_weights(weights)
    if name is not None:
        raise CheckpointError(
            f"{what} holds infinite numbers or NaN in '{name}': its training had diverged; take an "
            "earlier checkpoint"
        )
