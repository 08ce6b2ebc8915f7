"""How a dream looks, on all pixels and on those that move.

Shapes: C contexts, T frames, H W image, K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from mapo_lightning.judging.measure import Measure, reachable
from mapo_lightning.training.told import moving_pixels

# Frames are bytes: rounding alone makes this squared error, and a PSNR of 58.9 dB.
_ROUNDING = 1.0 / (12 * 255**2)

Distance = Callable[[Tensor, Tensor], Tensor]
"""Pictures (N, 3, H, W) in [0, 1] and others -> mean distance, a scalar; such as LPIPS."""


def looks(
    truth: Tensor,
    dream: Tensor,
    seen: int,
    horizons: Sequence[int] | None = None,
    perceptual: Distance | None = None,
) -> dict[str, Measure]:
    """Compare dreamt frames with what happened, at each horizon.

    ``psnr`` (dB) and ``ssim`` over whole frames are reported because others report them. Where
    little moves they cannot tell a dream from a copy of the last frame: on a toy video, copying
    scores 30.7 dB. ``psnr_moving`` and ``ssim_moving`` are over the pixels that move in the
    context; they cannot tell a dream that blurs everything that moves from the still scene.
    PSNR is bounded by the rounding of frames to bytes, 58.9 dB.

    Args:
        truth: (C, T, H, W, 3) in [0, 1].
        dream: The same shape; only frames from ``seen`` on are compared.
        seen: Frames that were shown.
        horizons: Frames ahead of the last one shown; None: the usual ones.
        perceptual: Adds ``lpips``, lower is better.
    """
    steps = truth.shape[1] - seen
    ahead = reachable(steps) if horizons is None else reachable(steps, horizons)
    at = [seen + horizon - 1 for horizon in ahead]
    moving = moving_pixels(truth).movedim(-1, 1).float()  # (C, 1, H, W)
    found: dict[str, list[Tensor]] = {}
    for step in at:
        real, dreamt = (x[:, step].movedim(-1, 1).float() for x in (truth, dream))
        for name, value in _frame(real, dreamt, moving).items():
            found.setdefault(name, []).append(value)
        if perceptual is not None:
            each = [perceptual(a[None], b[None]) for a, b in zip(dreamt, real, strict=True)]
            found.setdefault("lpips", []).append(torch.stack(each))
    return {
        name: Measure(ahead, torch.stack(columns, dim=1).double().cpu().numpy())
        for name, columns in found.items()
    }


def _frame(real: Tensor, dreamt: Tensor, moving: Tensor) -> dict[str, Tensor]:
    """Of one time, (C,) each; NaN on moving pixels where nothing moves."""
    squared = (real - dreamt).square().mean(dim=1, keepdim=True)
    result = structural_similarity_index_measure(
        dreamt, real, data_range=1.0, reduction="none", return_full_image=True
    )
    assert isinstance(result, tuple)
    ssim, full = result
    whole, part = squared.mean(dim=(1, 2, 3)), _masked(squared, moving)
    return {
        "psnr": _psnr(whole),
        "psnr_moving": _psnr(part),
        "ssim": ssim.reshape(-1),
        "ssim_moving": _masked(full.mean(dim=1, keepdim=True), moving),
    }


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of (C, 1, H, W) where the mask is one, (C,)."""
    return (values * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))


def _psnr(error: Tensor) -> Tensor:
    """DB of squared errors (C,), colours in [0, 1]."""
    return -10.0 * error.clamp(min=_ROUNDING).log10()
