"""APV's video-based intrinsic bonus: how far the recent past lies from what was seen before.

Shapes: B batch, T time, F feat, Q queue, P projection.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mapo_lightning.models.rssm_world.settings import BonusConfig


class VideoBonus(nn.Module):
    """Mean distance of windowed features to their nearest neighbours in a queue.

    All state lives in buffers, so that a checkpoint resumes it exactly.

    Source: APV, arXiv:2203.13880, Sec. 3.3; facts 4.1.
    """

    projection: Tensor
    queue: Tensor
    filled: Tensor
    scale: Tensor

    def __init__(self, cfg: BonusConfig, feat: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.register_buffer("projection", torch.randn(feat, cfg.width) / cfg.width)
        self.register_buffer("queue", torch.zeros(cfg.queue, cfg.width))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def forward(self, feat_BTF: Tensor, episode_BT: Tensor | None = None) -> Tensor:
        """Normalised bonus of the windows that start at each of the first T - window + 1 steps.

        Args:
            feat_BTF: Features that no gradient shall reach, (B, T, F).
            episode_BT: Where sequences are joined from episodes: the number of each step's
                episode, (B, T). A window ends with the episode that it begins in.

        Returns:
            (B, T - window + 1), mean absolute value near 1.

        Raises:
            ValueError: The sequence is shorter than the window.
        """
        if feat_BTF.shape[1] < self.cfg.window:
            raise ValueError(
                f"the bonus compares windows of {self.cfg.window} states, the chunk has "
                f"{feat_BTF.shape[1]}; use longer chunks or beta=0"
            )
        with torch.autocast(feat_BTF.device.type, enabled=False):
            window_BTF = self._means(feat_BTF.float(), episode_BT)
            query = (window_BTF @ self.projection).flatten(0, 1)
            self._push(query)
            # A float32 product is 2 % off where states hardly move (facts 10.1); this one is as
            # exact as differences would be, which take eight times as long.
            distance = torch.cdist(query.double(), self.queue.double()).float()
            empty_Q = torch.arange(self.cfg.queue, device=query.device) >= self.filled
            nearest = distance.masked_fill(empty_Q, torch.inf).topk(
                self.cfg.neighbours, largest=False, sorted=False
            )
            # Before as many vectors are there, those that are; counted without a host sync.
            there = self.filled.clamp(max=self.cfg.neighbours)
            total = nearest.values.masked_fill(nearest.values.isinf(), 0.0).sum(dim=-1)
            bonus = (total / there).view(window_BTF.shape[:2])
            self.scale.lerp_(bonus.abs().mean(), 1.0 - self.cfg.momentum)
            return bonus / (self.scale + 1e-8)

    def _means(self, feat_BTF: Tensor, episode_BT: Tensor | None) -> Tensor:
        """Mean features of each window, (B, T - window + 1, F)."""
        steps_BTFW = feat_BTF.unfold(1, self.cfg.window, 1)
        if episode_BT is None:
            return steps_BTFW.mean(dim=-1)
        number_BTW = episode_BT.unfold(1, self.cfg.window, 1)
        same_BTW = (number_BTW == number_BTW[..., :1]).to(feat_BTF.dtype)
        weight_BTW = same_BTW / same_BTW.sum(dim=-1, keepdim=True)
        return torch.einsum("btfw,btw->btf", steps_BTFW, weight_BTW)

    def _push(self, query: Tensor) -> None:
        """Put the newest vectors first; the oldest fall out."""
        newest = query[: self.cfg.queue]
        self.queue.copy_(torch.cat([newest, self.queue])[: self.cfg.queue])
        self.filled.add_(newest.shape[0]).clamp_(max=self.cfg.queue)
