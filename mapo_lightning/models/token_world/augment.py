"""Changes clips at random, each as a whole, so that a tokenizer meets more scenes than there are.

Shapes: B clips, T frames, H W image.

Source: facts 7.5 (crops and colours of iVideoGPT's pre-training).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_AREA = (0.8, 1.0)  # of the crop, as a share of the picture
_ASPECT = (0.9, 1.1)
_COLOUR = 0.1  # brightness, contrast and saturation are multiplied by 1 +- this
_HUE = 0.05  # of a turn
_GREY = (0.299, 0.587, 0.114)


def augmented(clips: Tensor) -> Tensor:
    """Crop every clip, and change its colours: (B, T, 3, H, W) in [0, 1] -> the same."""
    out = cropped(clips, *_drawn_crops(len(clips), clips.device))
    changes = [brighter, contrasted, saturated, turned]
    for number in torch.randperm(len(changes)).tolist():
        span = _HUE if changes[number] is turned else _COLOUR
        drawn = (2.0 * torch.rand(len(clips), device=clips.device) - 1.0) * span
        out = changes[number](out, drawn).clamp(0.0, 1.0)
    return out


def _drawn_crops(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sizes and centres of crops, (B, 2) each, x before y; pictures reach from -1 to 1."""
    uniform = torch.rand(4, count, device=device)
    area = _AREA[0] + uniform[0] * (_AREA[1] - _AREA[0])
    low, high = (math.log(aspect) for aspect in _ASPECT)
    root = torch.exp(0.5 * (low + uniform[1] * (high - low)))
    size = torch.stack([area.sqrt() * root, area.sqrt() / root], dim=1).clamp(max=1.0)
    return size, (2.0 * uniform[2:].T - 1.0) * (1.0 - size)


def cropped(clips: Tensor, size: Tensor, centre: Tensor) -> Tensor:
    """Cut rectangles out and bring them to the full size.

    Args:
        clips: (B, T, 3, H, W).
        size: Width and height, (B, 2), as shares of the picture's.
        centre: (B, 2), x and y, from -1 to 1.
    """
    batch, time = clips.shape[:2]
    shift = torch.cat([torch.diag_embed(size), centre[..., None]], dim=2)
    flat = clips.flatten(0, 1)
    grid = F.affine_grid(
        shift.repeat_interleave(time, dim=0).to(flat.dtype), list(flat.shape), align_corners=False
    )
    found = F.grid_sample(flat, grid, padding_mode="border", align_corners=False)
    return torch.unflatten(found, 0, (batch, time))


def brighter(clips: Tensor, by: Tensor) -> Tensor:
    """Multiply colours by 1 + ``by`` (B,)."""
    return clips * (1.0 + _wide(by))


def contrasted(clips: Tensor, by: Tensor) -> Tensor:
    """Move colours away from the mean grey of their clip, by the factor 1 + ``by`` (B,)."""
    mean = _grey(clips).mean(dim=(1, 2, 3, 4), keepdim=True)
    return mean + (clips - mean) * (1.0 + _wide(by))


def saturated(clips: Tensor, by: Tensor) -> Tensor:
    """Move colours away from their own grey, by the factor 1 + ``by`` (B,)."""
    grey = _grey(clips)
    return grey + (clips - grey) * (1.0 + _wide(by))


def turned(clips: Tensor, by: Tensor) -> Tensor:
    """Turn hues by ``by`` (B,) of a turn; lightness and saturation of HSV stay."""
    high, which = clips.max(dim=2)
    range_ = high - clips.amin(dim=2)
    red, green, blue = clips.unbind(2)
    safe = range_.clamp(min=1e-8)
    sextant = torch.where(
        which == 0,
        (green - blue) / safe,
        torch.where(which == 1, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe),
    )
    sextant = (sextant + 6.0 * _wide(by)[:, :, 0]) % 6.0
    # A colour is at its height in a third of the circle, and away from it by sixths.
    place = torch.tensor([5.0, 3.0, 1.0], device=clips.device).view(3, 1, 1)
    away = (place + sextant[:, :, None]) % 6.0
    share = torch.minimum(away, 4.0 - away).clamp(0.0, 1.0)
    return high[:, :, None] - range_[:, :, None] * share


def _grey(clips: Tensor) -> Tensor:
    weight = torch.tensor(_GREY, device=clips.device, dtype=clips.dtype).view(3, 1, 1)
    return (clips * weight).sum(dim=2, keepdim=True)


def _wide(by: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1, 1)."""
    return by.view(-1, 1, 1, 1, 1)
