"""Vector quantiser with a codebook kept by moving averages: the heart of the context code.

Shapes: R rows to quantise, M codes, Z code width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mapo_lightning.models.rssm_world.settings import QuantizerConfig


class Quantized(NamedTuple):
    """Result of a look-up."""

    code: Tensor  # (R, Z) nearest codes; gradients pass straight to what was quantised
    chosen: Tensor  # (R,) which codes
    commitment: Tensor  # scalar: mean squared distance to the codes, moves only what was quantised


class CodebookUse(NamedTuple):
    """What one update found."""

    perplexity: Tensor  # scalar in [1, M]: exp of the entropy of use in this update
    used: Tensor  # scalar in [0, 1]: share of codes whose moving-average count is alive
    revived: Tensor  # scalar: number of dead codes that were given a new place


class Quantizer(nn.Module):
    """Nearest-code look-up; the codes follow what is assigned to them.

    ``forward`` only collects counts and sums. ``update`` moves the codes and is called once per
    optimiser step (``callbacks.codebook``), so that evaluation, gradient accumulation and a second
    forward pass of the same batch cannot.

    Source: VQ-VAE, arXiv:1711.00937, appendix A.1; Algorithm 1, lines 7 and 13 of the MAPO paper.
    """

    codes: Tensor
    ema_count: Tensor
    ema_sum: Tensor
    started: Tensor
    batch_count: Tensor
    batch_sum: Tensor
    candidates: Tensor

    def __init__(self, cfg: QuantizerConfig, width: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.register_buffer("codes", torch.randn(cfg.codes, width))
        self.register_buffer("ema_count", torch.ones(cfg.codes))
        self.register_buffer("ema_sum", self.codes.clone())
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self.register_buffer("batch_count", torch.zeros(cfg.codes), persistent=False)
        self.register_buffer("batch_sum", torch.zeros(cfg.codes, width), persistent=False)
        self.register_buffer("candidates", torch.zeros(cfg.codes, width), persistent=False)
        self._must_start = True  # a Python flag, so that asking it needs no host sync

    @property
    def frozen(self) -> bool:
        """Whether the codes stay as they are."""
        return self.cfg.frozen

    def forward(self, rows_RZ: Tensor) -> Quantized:
        """Look up the nearest code of each row, (R, Z)."""
        rows_RZ = rows_RZ.float()
        flat_RZ = rows_RZ.detach()
        collect = self.training and not self.cfg.frozen
        if collect and self._must_start:
            self._start(flat_RZ)
        # |r - c|^2 without the row's own norm, which no comparison needs.
        distance_RM = self.codes.pow(2).sum(1) - 2.0 * flat_RZ @ self.codes.T
        index_R = distance_RM.argmin(dim=1)
        code_RZ = self.codes[index_R]
        error_RZ = (rows_RZ - code_RZ).pow(2)
        if collect:
            self._collect(flat_RZ, index_R, error_RZ.detach().sum(dim=1))
        return Quantized(rows_RZ + (code_RZ - rows_RZ).detach(), index_R, error_RZ.mean())

    @torch.no_grad()
    def _collect(self, rows_RZ: Tensor, index_R: Tensor, error_R: Tensor) -> None:
        """Count what was assigned where, and keep rows that the codes serve badly as new places."""
        self.batch_count.index_add_(0, index_R, torch.ones_like(error_R))
        self.batch_sum.index_add_(0, index_R, rows_RZ)
        # Drawn in proportion to their error, as k-means++ does: a revived code should go where
        # nothing is near. The small constant keeps a perfect fit from dividing by zero.
        self.candidates.copy_(rows_RZ[torch.multinomial(error_R + 1e-12, self.cfg.codes, True)])

    @torch.no_grad()
    def _start(self, rows_RZ: Tensor) -> None:
        """Take the first codes from the rows of the first batch; the same on every rank."""
        self._must_start = False
        if bool(self.started):  # asked once per process: a resumed codebook stays as it is
            return
        places_MZ = rows_RZ[torch.randint(rows_RZ.shape[0], (self.cfg.codes,))]
        # A little noise separates codes that were picked from equal rows.
        places_MZ = places_MZ + 1e-3 * places_MZ.std() * torch.randn_like(places_MZ)
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(places_MZ, src=0)
        self.codes.copy_(places_MZ)
        self.ema_sum.copy_(self.codes)
        self.started.fill_(True)

    @torch.no_grad()
    def update(self, count: Tensor, total: Tensor, candidates: Tensor) -> CodebookUse:
        """Move the codes towards what was assigned to them, and revive those nobody uses.

        Args:
            count: Rows assigned to each code since the last update, summed over all ranks, (M,).
            total: Sum of those rows, (M, Z).
            candidates: Places for dead codes, (M, Z); the same on every rank.
        """
        keep = self.cfg.decay
        use_M = count / count.sum().clamp(min=1.0)
        perplexity = torch.special.entr(use_M).sum().exp()
        self.ema_count.lerp_(count, 1.0 - keep)
        self.ema_sum.lerp_(total, 1.0 - keep)
        dead_M = self.ema_count < self.cfg.dead_below
        self.ema_count.copy_(torch.where(dead_M, 1.0, self.ema_count))
        self.ema_sum.copy_(torch.where(dead_M[:, None], candidates, self.ema_sum))
        mass = self.ema_count.sum()
        # Laplace smoothing keeps rarely used codes from dividing by almost nothing.
        smooth_M = (self.ema_count + 1e-5) / (mass + self.cfg.codes * 1e-5) * mass
        self.codes.copy_(self.ema_sum / smooth_M[:, None])
        self.batch_count.zero_()
        self.batch_sum.zero_()
        revived = dead_M.sum().float()
        return CodebookUse(perplexity, 1.0 - revived / self.cfg.codes, revived)
