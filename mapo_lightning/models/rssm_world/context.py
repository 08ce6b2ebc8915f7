"""Scene context: what one random frame of a clip says about all of it.

Shapes: B batch, C channels, H W image, Z code width, L tokens.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from mapo_lightning.models.blocks import transposed, xavier
from mapo_lightning.models.rssm_world.encoder import CHANNELS, ResNetEncoder, normalised
from mapo_lightning.models.rssm_world.quantizer import Quantizer
from mapo_lightning.models.rssm_world.settings import ContextConfig, ImageConfig

SCALES = (16, 8)
"""Sides of the feature maps that the residual decoder reads."""


class Context(NamedTuple):
    """What the decoder is told about the scene."""

    maps: dict[int, Tensor]  # side -> (B, C, side, side); (B*T, ...) where chunks are joined
    # for the plain CNN: the backdrop, (B, 3, H, W), under the side of the frames
    terms: dict[str, Tensor]  # scalar loss terms
    codes: dict[int, Tensor]  # side -> (frames, L) code indices; empty without a codebook


NO_CONTEXT = Context({}, {}, {})
"""What a decoder without cross-attention is told."""


class Backdrop(nn.Module):
    """The plain CNN's context: features of a frame on an 8x8 map, and the picture drawn of them.

    What stays the same in a clip so reaches its frames by addition, before the latent state has
    learned anything; the recurrent part then spends itself on what moves. Ours: DreamerV2's CNN has
    no context. docs/decisions.md has what it was measured against.
    """

    SIDE = 8
    started: Tensor

    def __init__(self, cfg: ImageConfig) -> None:
        super().__init__()
        base, halvings = 2 * cfg.channels[0], cfg.halvings - 1
        widths = [CHANNELS, *(base * 2**i for i in range(halvings))]
        self.width = base
        self.down = nn.ModuleList(
            xavier(nn.Conv2d(before, after, 4, stride=2, padding=1))
            for before, after in pairwise(widths)
        )
        self.code = xavier(nn.Conv2d(widths[-1], self.width, 1))
        self.decode = xavier(nn.Conv2d(self.width, widths[-1], 3, padding=1))
        self.up = nn.ModuleList(
            xavier(nn.ConvTranspose2d(before, after, 4, stride=2, padding=1))
            for before, after in pairwise(widths[::-1])
        )
        self.mean = nn.Parameter(torch.zeros(CHANNELS, cfg.size, cfg.size))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self._must_start = True  # a Python flag, so that asking it needs no host sync

    def maps(self, frame_BCHW: Tensor) -> dict[int, Tensor]:
        """Features of frames (B, 3, H, W): 8 -> (B, C, 8, 8)."""
        if self.training and self._must_start:
            self._start(frame_BCHW)
        x = frame_BCHW
        for layer in self.down:
            x = F.elu(layer(x))
        return {self.SIDE: self.code(x)}

    def draw(self, maps: dict[int, Tensor]) -> dict[int, Tensor]:
        """Pictures of such features: side -> (B, 3, H, W), to be added to the frames."""
        x: Tensor = self.decode(maps[self.SIDE])
        for layer in self.up:
            assert isinstance(layer, nn.ConvTranspose2d)
            x = transposed(layer, F.elu(x))
        return {x.shape[-1]: x + self.mean}

    @torch.no_grad()
    def _start(self, frame_BCHW: Tensor) -> None:
        """Draw the mean of the first frames at first; the same on every rank."""
        self._must_start = False
        if bool(self.started):  # asked once per process: what was resumed stays as it is
            return
        mean_CHW = frame_BCHW.mean(dim=0)
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(mean_CHW, src=0)
        self.mean.copy_(mean_CHW)
        self.started.fill_(True)


class FrameContext(nn.Module):
    """Features of one frame per clip, quantised if the method says so.

    At 16x16 and 8x8 for the residual decoder, which attends to them; at 8x8 for the plain CNN,
    which gets the picture drawn of them.

    A clip that was joined from several episodes shows as many scenes: one frame of each is used.

    Args:
        cfg: What is looked at, and how.
        image: Sizes of the encoder.
        augment: Erase rectangles while training, as ``cfg`` says; the published systems do so in
            fine-tuning only.

    Source: Sec. 4.2 and Algorithm 1, lines 6 and 7 of the MAPO paper; facts 3.2.
    """

    def __init__(self, cfg: ContextConfig, image: ImageConfig, augment: bool = False) -> None:
        super().__init__()
        self.cfg, self.erase = cfg, cfg.erase if augment else 0.0
        self.encoder: ResNetEncoder | Backdrop
        if image.kind == "resnet":
            self.encoder = ResNetEncoder(image)
            widths = dict(zip(SCALES, image.channels[-2:], strict=True))
        else:
            self.encoder = Backdrop(image)
            widths = {Backdrop.SIDE: self.encoder.width}
        self.sides = tuple(widths)
        self.quantizers = nn.ModuleDict()
        self.terms = ("commitment",) if cfg.kind == "quantized" else ()
        if cfg.kind == "quantized" and cfg.quantizer.shape == "spatial":
            self.quantizers.update({str(s): Quantizer(cfg.quantizer, widths[s]) for s in widths})
        elif cfg.kind == "quantized":
            self.quantizers["frame"] = Quantizer(cfg.quantizer, sum(widths.values()))

    def forward(self, obs: Tensor, episode_BT: Tensor | None = None) -> Context:
        """Look at one frame of each clip.

        Args:
            obs: Frames, (B, T, H, W, 3) uint8.
            episode_BT: Where clips are joined from episodes: the number of each frame's episode,
                (B, T). One frame of each episode is looked at then.
        """
        if episode_BT is None:
            return self._of_frames(self._pick(obs))
        chosen_S, scene_N = self._pick_of_each(episode_BT)
        found = self._of_frames(obs.flatten(0, 1)[chosen_S])
        return found._replace(maps={side: x[scene_N] for side, x in found.maps.items()})

    def _of_frames(self, frame_BHWC: Tensor) -> Context:
        """What one frame each, (B, H, W, 3) uint8, says."""
        frame_BCHW = self._augment(normalised(frame_BHWC))
        maps = self.encoder.maps(frame_BCHW)
        found = Context({side: maps[side] for side in self.sides}, {}, {})
        if "frame" in self.quantizers:
            found = self._per_frame(found.maps)
        elif self.quantizers:
            found = self._per_place(found.maps)
        if isinstance(self.encoder, Backdrop):
            found = found._replace(maps=self.encoder.draw(found.maps))
        return found

    def _pick_of_each(self, episode_BT: Tensor) -> tuple[Tensor, Tensor]:
        """One frame of each of S episodes, (S,) in [0, B*T), and every frame's episode, (B*T,)."""
        begins_BT = episode_BT.diff(dim=1, prepend=episode_BT[:, :1] - 1) != 0
        scene_N = begins_BT.flatten().cumsum(0) - 1
        first_S, length_S = begins_BT.flatten().nonzero().squeeze(1), scene_N.bincount()
        if self.cfg.frame == "first":
            return first_S, scene_N
        if self.cfg.frame == "last":
            return first_S + length_S - 1, scene_N
        share_S = torch.rand(len(first_S), device=episode_BT.device)
        return first_S + (share_S * length_S).long().minimum(length_S - 1), scene_N

    def _pick(self, obs: Tensor) -> Tensor:
        """One frame of each clip, (B, H, W, 3)."""
        batch, steps = obs.shape[:2]
        if self.cfg.frame == "first":
            return obs[:, 0]
        if self.cfg.frame == "last":
            return obs[:, -1]
        tau_B = torch.randint(steps, (batch,), device=obs.device)
        return obs[torch.arange(batch, device=obs.device), tau_B]

    def _augment(self, frame_BCHW: Tensor) -> Tensor:
        """Grey out one rectangle in some frames: 2-33 % of the area, aspect 0.3-3.3, whole pixels.

        As many are tall as wide, and each aspect of the half is as likely as another: the
        augmentation that ContextWM took from kornia 0.6.5 (facts 3.2, 10.1).
        """
        if not self.training or self.erase == 0.0:
            return frame_BCHW
        batch, _, height, width = frame_BCHW.shape
        u = torch.rand(6, batch, 1, 1, 1, device=frame_BCHW.device)
        area = (0.02 + 0.31 * u[0]) * height * width
        aspect = torch.where(u[5] < 0.5, 0.3 + 0.7 * u[1], 1.0 + 2.3 * u[1])
        tall = (area * aspect).sqrt().round().clamp(1, height)
        wide = (area / aspect).sqrt().round().clamp(1, width)
        top = (u[2] * (height - tall + 1)).floor()
        left = (u[3] * (width - wide + 1)).floor()
        y = torch.arange(height, device=u.device).view(1, 1, -1, 1)
        x = torch.arange(width, device=u.device).view(1, 1, 1, -1)
        inside = (y >= top) & (y < top + tall) & (x >= left) & (x < left + wide)
        return frame_BCHW.masked_fill(inside & (u[4] < self.erase), 0.0)

    def _per_place(self, maps: dict[int, Tensor]) -> Context:
        """Quantise every location of every map with the codebook of its scale."""
        coded: dict[int, Tensor] = {}
        codes: dict[int, Tensor] = {}
        commitment = torch.zeros((), device=next(iter(maps.values())).device)
        for side, map_BCHW in maps.items():
            batch, width = map_BCHW.shape[:2]
            rows_RZ = map_BCHW.permute(0, 2, 3, 1).reshape(-1, width)
            found = self.quantizers[str(side)](rows_RZ)
            coded[side] = found.code.view(batch, side, side, width).permute(0, 3, 1, 2)
            codes[side] = found.chosen.view(batch, -1)
            commitment = commitment + found.commitment
        return Context(coded, {"commitment": commitment}, codes)

    def _per_frame(self, maps: dict[int, Tensor]) -> Context:
        """Quantise the pooled features of both scales as one vector, spread over the maps."""
        pooled = [maps[side].mean(dim=(2, 3)) for side in self.sides]
        found = self.quantizers["frame"](torch.cat(pooled, dim=1))
        parts = found.code.split([p.shape[1] for p in pooled], dim=1)
        coded = {
            side: part[:, :, None, None].expand(-1, -1, side, side)
            for side, part in zip(self.sides, parts, strict=True)
        }
        codes = {side: found.chosen[:, None] for side in self.sides}
        return Context(coded, {"commitment": found.commitment}, codes)
