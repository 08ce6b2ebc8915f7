"""Image encoders: a residual network (APV, ContextWM, PreLAR, MAPO) and DreamerV2's plain CNN."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mapo_lightning.models.blocks import RESAMPLE, recomputed, residual_stack, xavier
from mapo_lightning.models.rssm_world.settings import ImageConfig

CHANNELS = 3
"""Colours of a frame."""


def normalised(obs: Tensor) -> Tensor:
    """uint8 frames (..., H, W, 3) -> float (N, 3, H, W) in [-0.5, 0.5].

    The result keeps the frames' memory order, which is what convolutions call channels-last.
    """
    frame_NHWC = obs.flatten(0, -4) if obs.ndim > 4 else obs
    return frame_NHWC.permute(0, 3, 1, 2).to(torch.float32, copy=True).div_(255.0).sub_(0.5)


class ResNetEncoder(nn.Module):
    """Stride-2 convolution, then three residual stages, each followed by average pooling.

    ``maps`` returns what each stage sees before pooling: the context path reads those of 16x16 and
    8x8. Source: facts 3.1 and 3.2.
    """

    def __init__(self, cfg: ImageConfig, inputs: int = CHANNELS) -> None:
        super().__init__()
        widths, self.recompute = cfg.channels, cfg.recompute
        self.convin = xavier(nn.Conv2d(inputs, widths[0], 3, stride=2, padding=1))
        self.stages = nn.ModuleList(
            residual_stack(before, after, cfg.layers, change_last=False)
            for before, after in zip([widths[0], *widths], widths, strict=False)
        )
        self.embed_dim = widths[-1] * 4**2

    def maps(self, frame_NCHW: Tensor) -> dict[int, Tensor]:
        """Feature maps before pooling, by their side: 32, 16 and 8 for frames of 64 pixels."""
        x = F.elu(self.convin(frame_NCHW))
        maps: dict[int, Tensor] = {}
        for i, stage in enumerate(self.stages):
            x = F.avg_pool2d(x, RESAMPLE) if i else x
            assert isinstance(stage, nn.ModuleList)
            run = partial(_through, stage)
            x = recomputed(self.recompute, [stage], run, x)
            maps[x.shape[-1]] = x
        return maps

    def forward(self, frame_NCHW: Tensor) -> Tensor:
        """(N, 3, H, W) in [-0.5, 0.5] -> (N, E)."""
        *_, last = self.maps(frame_NCHW).values()
        return F.avg_pool2d(last, RESAMPLE).flatten(1)


def _through(stage: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in stage:
        x = layer(x)
    return x


class CNNEncoder(nn.Module):
    """DreamerV2's convolutions, kernel 4, stride 2, ELU, down to a 2x2 map (facts 3.4).

    Four at 64 pixels, as published; three at 32 and five at 128.
    """

    def __init__(self, cfg: ImageConfig, inputs: int = CHANNELS) -> None:
        super().__init__()
        widths = [inputs, *(cfg.channels[0] * 2**i for i in range(cfg.halvings))]
        self.layers = nn.ModuleList(
            xavier(nn.Conv2d(before, after, 4, stride=2)) for before, after in pairwise(widths)
        )
        self.embed_dim = widths[-1] * 4

    def forward(self, frame_NCHW: Tensor) -> Tensor:
        """(N, 3, H, W) in [-0.5, 0.5] -> (N, E)."""
        x = frame_NCHW
        for layer in self.layers:
            x = F.elu(layer(x))
        return x.flatten(1)


def build_encoder(cfg: ImageConfig, inputs: int = CHANNELS) -> ResNetEncoder | CNNEncoder:
    """Encoder of the chosen kind, from frames (N, ``inputs``, H, W) to (N, ``embed_dim``)."""
    return ResNetEncoder(cfg, inputs) if cfg.kind == "resnet" else CNNEncoder(cfg, inputs)


def frame_pairs(frame_BTCHW: Tensor) -> Tensor:
    """Stack each frame on its predecessor: (B, T, C, H, W) -> (B, T-1, 2C, H, W)."""
    return torch.cat([frame_BTCHW[:, :-1], frame_BTCHW[:, 1:]], dim=2)
