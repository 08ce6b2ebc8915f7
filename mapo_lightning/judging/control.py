"""Does a dream obey what drives it? Controllability, as Genie measures it.

Source: arXiv:2402.15391, section 3.1: how much PSNR is lost when the actions are random ones.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mapo_lightning.judging.looks import looks
from mapo_lightning.judging.measure import HORIZONS, Measure

GENIE = 4
"""Frames ahead at which Genie reports it."""


def controllability(
    truth: Tensor, dream: Tensor, misled: Mapping[str, Tensor], seen: int
) -> dict[str, dict[str, Measure]]:
    """PSNR (dB) that a dream loses when it is misled, 4 frames ahead and at each horizon.

    0: what drives the dream makes no difference to how near it comes to the truth. It cannot tell a
    dream that goes the wrong way from one that ignores its driver if both are far off: a dream that
    obeys the wrong way round *gains* from the negated driver, so the sign of that difference does.

    Args:
        truth: (C, T, H, W, 3) in [0, 1].
        dream: With the true driver, the same shape.
        misled: The same model's dreams with other drivers, by name.
        seen: Frames that were shown.

    Returns:
        Name of the driver -> ``control`` (whole frames) and ``control_moving``.
    """
    ahead = sorted({GENIE, *HORIZONS})
    right = looks(truth, dream, seen, ahead)
    found = {}
    for name, frames in misled.items():
        wrong = looks(truth, frames, seen, ahead)
        found[name] = {
            "control": right["psnr"].less(wrong["psnr"]),
            "control_moving": right["psnr_moving"].less(wrong["psnr_moving"]),
        }
    return found
