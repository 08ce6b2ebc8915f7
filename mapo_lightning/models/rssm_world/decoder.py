"""Image decoders: residual with optional cross-attention to the scene, and DreamerV2's plain CNN.

Shapes: B clips, T frames of each, N = B*T, C channels, G heads, L tokens.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mapo_lightning.models.blocks import RESAMPLE, recomputed, residual_stack, transposed, xavier
from mapo_lightning.models.rssm_world.context import SCALES
from mapo_lightning.models.rssm_world.encoder import CHANNELS
from mapo_lightning.models.rssm_world.settings import ContextConfig, ImageConfig


class CrossAttention(nn.Module):
    """Lets every place of a decoder map ask a random quarter of the scene's tokens.

    Keys and values are projected once per clip and then drawn per frame; the published code repeats
    the scene T times and projects every copy.

    Source: facts 3.3.
    """

    def __init__(self, width: int, side: int, cfg: ContextConfig) -> None:
        super().__init__()
        self.kept = max(1, round(side * side * (1.0 - cfg.key_mask)))
        self.dropout, self.heads = cfg.dropout, cfg.heads
        self.query_position = nn.Parameter(torch.zeros(side * side, width))
        self.key_position = nn.Parameter(torch.zeros(side * side, width))
        self.in_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_bias = nn.Parameter(torch.zeros(3 * width))
        self.out = nn.Linear(width, width)
        self.norm = nn.BatchNorm2d(width)
        nn.init.xavier_uniform_(self.in_weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x_NCHW: Tensor, scene_BCHW: Tensor) -> Tensor:
        """Decoder maps (N, C, s, s), scene maps (B, C, s, s), N a multiple of B -> (N, C, s, s)."""
        count, width = x_NCHW.shape[:2]
        query_weight, kv_weight = self.in_weight.split_with_sizes([width, 2 * width])
        query_bias, kv_bias = self.in_bias.split_with_sizes([width, 2 * width])
        x_NLC = x_NCHW.flatten(2).transpose(1, 2)
        query_NLC = F.linear(x_NLC + self.query_position, query_weight, query_bias)
        scene_BLC = scene_BCHW.flatten(2).transpose(1, 2) + self.key_position
        scene_BLC = F.linear(scene_BLC, kv_weight, kv_bias)
        keys_NLC, values_NLC = self._draw(scene_BLC, count).chunk(2, dim=-1)
        out_NGLC = F.scaled_dot_product_attention(
            self._headed(query_NLC),
            self._headed(keys_NLC),
            self._headed(values_NLC),
            dropout_p=self.dropout if self.training else 0.0,
        )
        out_NLC = self.out(out_NGLC.transpose(1, 2).flatten(2))
        out_NLC = F.dropout(out_NLC, self.dropout, self.training)
        out_NCHW = out_NLC.transpose(1, 2).reshape(x_NCHW.shape)
        return F.relu(self.norm(out_NCHW).add_(x_NCHW), inplace=True)

    def _draw(self, scene_BLC: Tensor, count: int) -> Tensor:
        """A fresh random subset of the tokens for each of ``count`` frames, (N, kept, 2C)."""
        clips, tokens = scene_BLC.shape[:2]
        lottery_NL = torch.rand(count, tokens, device=scene_BLC.device)
        chosen_NL = lottery_NL.topk(self.kept, dim=1, sorted=False).indices
        clip_N1 = torch.arange(count, device=scene_BLC.device)[:, None] // (count // clips)
        rows_NL = chosen_NL + clip_N1 * tokens
        return scene_BLC.flatten(0, 1)[rows_NL]

    def _headed(self, x_NLC: Tensor) -> Tensor:
        """(N, L, C) -> (N, heads, L, C / heads)."""
        return x_NLC.view(*x_NLC.shape[:2], self.heads, -1).transpose(1, 2)


class ResNetDecoder(nn.Module):
    """Linear to 4x4, three times nearest up-sampling and a residual stack, transposed convolution.

    Source: facts 3.3.
    """

    def __init__(self, cfg: ImageConfig, feat: int, context: ContextConfig) -> None:
        super().__init__()
        widths = [*cfg.channels[::-1], cfg.channels[0] // 2]
        self.side, self.recompute = 4, cfg.recompute
        self.convin = xavier(nn.Linear(feat, widths[0] * self.side**2))
        self.stages = nn.ModuleList(
            residual_stack(before, after, cfg.layers, change_last=True)
            for before, after in pairwise(widths)
        )
        self.attention = nn.ModuleDict()
        if context.kind != "none":
            sides = sorted(SCALES)
            self.attention.update(
                {
                    str(side): CrossAttention(width, side, context)
                    for side, width in zip(sides, widths, strict=False)
                }
            )
        self.convout = xavier(
            nn.ConvTranspose2d(widths[-1], CHANNELS, 3, stride=2, padding=1, output_padding=1)
        )

    def forward(self, feat_NF: Tensor, scene: dict[int, Tensor]) -> Tensor:
        """Features (N, F) and the scene's maps (B, C, s, s) -> mean frames (N, 3, H, W)."""
        x: Tensor = self.convin(feat_NF)
        x = x.view(len(x), -1, self.side, self.side)
        x = x.contiguous(memory_format=torch.channels_last)
        for stage in self.stages:
            x = F.interpolate(x, scale_factor=float(RESAMPLE), mode="nearest")
            assert isinstance(stage, nn.ModuleList)
            side = str(x.shape[-1])
            attention = dict(self.attention.items()).get(side)
            seen = (x, scene[int(side)]) if attention is not None else (x,)
            run = partial(_through, stage, attention)
            x = recomputed(self.recompute, [stage, attention or stage], run, *seen)
        mean_NCHW: Tensor = self.convout(x)
        return mean_NCHW


def _through(
    stage: nn.ModuleList, attention: nn.Module | None, x: Tensor, *scene: Tensor
) -> Tensor:
    """A residual stage, whose first layer adds what attention made of its input."""
    attended = attention(x, *scene) if attention is not None else None
    for i, layer in enumerate(stage):
        x = layer(x, attended) if i == 0 else layer(x)
    return x


class CNNDecoder(nn.Module):
    """DreamerV2's transposed convolutions, stride 2, ELU, from a 1x1 map (facts 3.4).

    Kernels 5, 5, 6 and 6 at 64 pixels, as published; one of 5 fewer at 32 and one more at 128. A
    scene's backdrop is added to the picture that they draw.
    """

    def __init__(self, cfg: ImageConfig, feat: int) -> None:
        super().__init__()
        base = cfg.channels[0]
        self.dense = xavier(nn.Linear(feat, 32 * base))
        inner = [base * 2**i for i in reversed(range(cfg.halvings - 1))]
        kernels = [5] * (cfg.halvings - 2) + [6, 6]
        self.layers = nn.ModuleList(
            xavier(nn.ConvTranspose2d(before, after, kernel, stride=2))
            for (before, after), kernel in zip(
                pairwise([32 * base, *inner, CHANNELS]), kernels, strict=True
            )
        )

    def forward(self, feat_NF: Tensor, scene: dict[int, Tensor]) -> Tensor:
        """Features (N, F) and backdrops (B, 3, H, W), if any -> mean frames (N, 3, H, W)."""
        x: Tensor = self.dense(feat_NF)[:, :, None, None]
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, nn.ConvTranspose2d)
            x = transposed(layer, F.elu(x) if i else x)
        for backdrop_BCHW in scene.values():
            each = len(x) // len(backdrop_BCHW)  # frames of a clip
            x = x + backdrop_BCHW.repeat_interleave(each, dim=0)
        return x


def build_decoder(
    cfg: ImageConfig, feat: int, context: ContextConfig
) -> ResNetDecoder | CNNDecoder:
    """Decoder of the chosen kind, from features (N, ``feat``) to frames (N, 3, H, W)."""
    if cfg.kind == "resnet":
        return ResNetDecoder(cfg, feat, context)
    return CNNDecoder(cfg, feat)
