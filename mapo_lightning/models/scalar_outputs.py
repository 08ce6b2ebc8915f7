"""How a network says one number: as the mean of a unit normal, or as weights of fixed values.

Shapes: the leading axes are free; N bins.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from mapo_lightning.models.settings import ScalarKind

BINS = 255
"""Values that a two-hot output weighs."""
_REACH = 20.0  # the largest value is symexp(20) = 4.9e8


class ScalarOutput(Protocol):
    """Reads numbers off a network's last layer, and says how wrong they are."""

    width: int
    """Numbers that the layer puts out."""

    def read(self, raw: Tensor) -> Tensor:
        """The expected number, (..., width) -> (...), float32."""
        ...

    def error(self, raw: Tensor, target: Tensor) -> Tensor:
        """-ln p(target) up to a constant, (..., width) and (...) -> (...)."""
        ...


class UnitNormal:
    """The mean of a normal with variance 1: half a squared error (facts 4)."""

    width = 1

    def read(self, raw: Tensor) -> Tensor:
        """The mean."""
        return raw.float().squeeze(-1)

    def error(self, raw: Tensor, target: Tensor) -> Tensor:
        """Half the squared difference."""
        return 0.5 * F.mse_loss(self.read(raw), target, reduction="none")


class TwoHot:
    """Weights of values that lie evenly on a symlog scale, so that no unit of reward is special.

    A target is the mixture of its two neighbours that has it as its mean; the error is the cross
    entropy with that mixture. Targets beyond the last value count as the last value.

    Source: DreamerV3, Hafner et al., Nature 640 (2025), "Critic learning", and arXiv:2301.04104v2.
    """

    width = BINS

    def read(self, raw: Tensor) -> Tensor:
        """The weighted sum of the values."""
        probs = raw.float().softmax(dim=-1)
        half = BINS // 2
        # Value by value with its negative: weights that are equal cancel to exactly zero, which
        # sums of numbers up to 5e8 in float32 would not.
        surplus = probs[..., half + 1 :] - probs[..., :half].flip(-1)
        total: Tensor = (surplus * _values(raw)[half + 1 :]).sum(dim=-1)
        return total

    def error(self, raw: Tensor, target: Tensor) -> Tensor:
        """Cross entropy with the two values around the target, in nats."""
        values, target = _values(raw), target.float()
        above = torch.searchsorted(values, target.contiguous()).clamp(1, BINS - 1)
        low, high = values[above - 1], values[above]
        share = ((target - low) / (high - low)).clamp(0.0, 1.0)
        both = torch.stack([above - 1, above], dim=-1)
        log_low, log_high = raw.float().log_softmax(dim=-1).gather(-1, both).unbind(-1)
        return -torch.lerp(log_low, log_high, share)


def symlog(x: Tensor) -> Tensor:
    """sign(x) ln(1 + |x|): squeezes large numbers of either sign (arXiv:2301.04104, eq. 9)."""
    return x.sign() * torch.log1p(x.abs())


def symexp(x: Tensor) -> Tensor:
    """sign(x) (e^|x| - 1), the inverse of sign(x) ln(1 + |x|)."""
    return x.sign() * torch.expm1(x.abs())


def _values(like: Tensor) -> Tensor:
    """The values, (N,) float32, ascending and symmetric."""
    half = symexp(torch.linspace(0.0, _REACH, BINS // 2 + 1, device=like.device))
    return torch.cat([-half[1:].flip(0), half])


SCALARS: dict[ScalarKind, ScalarOutput] = {"normal": UnitNormal(), "twohot": TwoHot()}
