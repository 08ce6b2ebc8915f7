"""LPIPS: how different two pictures look, by what a classifier of photographs makes of them.

Shapes: N pictures, H W image, C channels.

Source: LPIPS, arXiv:1801.03924; VGG, arXiv:1409.1556; facts 7.5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mapo_lightning.types import ConfigError

# Channels of VGG16's convolutions, in stages with a 2x2 pooling before all but the first.
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPS = 1e-10


class PerceptualDistance(nn.Module):
    """LPIPS with VGG16; no part of it learns.

    Args:
        vgg: Weights of VGG16 under torchvision's names.
        comparison: Weight of every channel after each of the five stages, (1, C, 1, 1).
        origin: Where VGG16's weights come from, for messages.

    Raises:
        ConfigError: They are not those of VGG16.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, vgg: Mapping[str, Any], comparison: Sequence[Tensor], origin: str) -> None:
        super().__init__()
        below, place = 3, 0
        self.stages = nn.ModuleList()
        for stage, widths in enumerate(_STAGES):
            place += bool(stage)  # torchvision counts poolings and ReLUs too
            convs: list[nn.Module] = []
            for width in widths:
                conv = nn.Conv2d(below, width, 3, padding=1)
                _fill(conv, vgg, f"features.{place}", origin)
                convs += [conv, nn.ReLU()]
                below, place = width, place + 2
            self.stages.append(nn.Sequential(*convs))
        self.weights = nn.ParameterList(comparison)
        self.requires_grad_(False)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(3, 1, 1))

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        """Mean distance, a scalar, of pictures (N, 3, H, W) in [0, 1] from others."""
        x, y = ((2.0 * z - 1.0 - self.shift) / self.scale for z in (one, two))
        total = x.new_zeros(())
        for stage, (convs, weight) in enumerate(zip(self.stages, self.weights, strict=True)):
            if stage:
                x, y = F.max_pool2d(x, 2), F.max_pool2d(y, 2)
            x, y = convs(x), convs(y)
            apart = (_unit(x) - _unit(y)).square()
            total = total + F.conv2d(apart, weight).mean()
        return total


def _unit(x: Tensor) -> Tensor:
    """Every place of maps (N, C, H, W) as a vector of length one."""
    return x / (x.square().sum(dim=1, keepdim=True).sqrt() + _EPS)


def _fill(conv: nn.Conv2d, stored: Mapping[str, Any], name: str, origin: str) -> None:
    for part, parameter in conv.named_parameters():
        found = stored.get(f"{name}.{part}")
        if not isinstance(found, Tensor) or found.shape != parameter.shape:
            raise ConfigError(
                f"{origin} is not VGG16: it has no '{name}.{part}' of shape "
                f"{tuple(parameter.shape)}"
            )
        parameter.data.copy_(found)
