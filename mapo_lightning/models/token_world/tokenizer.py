"""The conditional tokenizer: many codes for the context frames, few for what changes after them.

Shapes: B clips, K context frames, T future frames, N frames of several clips, H W image, r side of
the latent map, Z code width, P codes of a context frame, Q codes of a future frame, L tokens.

Source: iVideoGPT, arXiv:2405.15223; facts 7.5, 7.6.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from mapo_lightning.models.blocks import mean_over_ranks
from mapo_lightning.models.token_world.conv_blocks import Cross, Down, Ending, Level, Mid, Up
from mapo_lightning.models.token_world.layout import Layout
from mapo_lightning.models.token_world.settings import TokenizerConfig

Maps = list[Tensor]
"""What an encoder or decoder shows to its conditional twin, by level."""


class ContextEncoder(nn.Module):
    """Encodes context frames, and keeps what it saw on the way."""

    def __init__(self, cfg: TokenizerConfig) -> None:
        super().__init__()
        widths, last = cfg.channels, len(cfg.channels) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        before = [widths[0], *widths]
        self.levels = nn.ModuleList(
            Level(
                [before[i], *[width] * cfg.blocks],
                cfg.groups,
                Down(width) if i < last else None,
            )
            for i, width in enumerate(widths)
        )
        self.mid = Mid(widths[-1], cfg.groups, attention=False)
        self.ending = Ending(widths[-1], cfg.latent, cfg.groups)

    def forward(self, frames: Tensor) -> tuple[Tensor, Maps]:
        """Frames (N, 3, H, W) -> latent maps (N, Z, r, r), and the map after every level."""
        x, seen = self.conv_in(frames), []
        for level in self.levels:
            x = level(x)
            seen.append(x)
        return self.ending(self.mid(x)), seen


class FutureEncoder(nn.Module):
    """Encodes frames that follow, while it looks at what the context's encoder saw."""

    def __init__(self, cfg: TokenizerConfig) -> None:
        super().__init__()
        widths, last = cfg.channels, len(cfg.channels) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        before = [widths[0], *widths]
        self.levels, self.cross = nn.ModuleList(), nn.ModuleDict()
        for i, width in enumerate(widths):
            down = Down(width) if i < last else None
            self.levels.append(Level([before[i], *[width] * cfg.blocks], cfg.groups, down))
            side = cfg.size // 2 ** min(i + 1, last)
            if side <= cfg.side:  # attention on larger maps costs too much
                self.cross[str(i)] = Cross(width, side, cfg.context_frames, cfg.dropout)
        self.mid = Mid(widths[-1], cfg.groups, attention=True)
        self.ending = Ending(widths[-1], cfg.latent, cfg.groups)

    def forward(self, frames: Tensor, context: Maps) -> Tensor:
        """Frames (N, 3, H, W), context maps (N, K, ...) by level -> latent maps (N, Z, r, r)."""
        x = self.conv_in(frames)
        for i, level in enumerate(self.levels):
            x = level(x)
            if str(i) in self.cross:
                x = self.cross[str(i)](x, context[i])
        latent: Tensor = self.ending(self.mid(x))
        return latent


class Decoder(nn.Module):
    """Draws frames; the conditional one looks once at what the context's decoder drew.

    Args:
        cfg: Sizes.
        conditional: Whether it looks, and attends to itself.
    """

    def __init__(self, cfg: TokenizerConfig, conditional: bool) -> None:
        super().__init__()
        widths = cfg.channels[::-1]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(cfg.latent, widths[0], 3, padding=1)
        self.mid = Mid(widths[0], cfg.groups, attention=conditional)
        self.cross = (
            Cross(widths[0], cfg.side, cfg.context_frames, cfg.dropout) if conditional else None
        )
        before = [widths[0], *widths]
        self.levels = nn.ModuleList(
            Level(
                [before[i], *[width] * (cfg.blocks + 1)],
                cfg.groups,
                Up(width) if i < last else None,
            )
            for i, width in enumerate(widths)
        )
        self.ending = Ending(widths[-1], 3, cfg.groups)

    def forward(self, latent: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent maps (N, Z, r, r) -> frames (N, 3, H, W), and the map after the middle."""
        x = self.mid(self.conv_in(latent))
        shown = x
        if self.cross is not None:
            assert context is not None, "the conditional decoder needs the context's map"
            x = self.cross(x, context)
        for level in self.levels:
            x = level(x)
        return self.ending(x), shown


class LearntCodes(nn.Module):
    """A codebook that gradients move, as in VQ-VAE's first form (arXiv:1711.00937, eq. 3).

    Args:
        codes: Number M of codes.
        width: Width Z of a code.
        counted: Whether it is counted how often each code is chosen, for `due`.

    Attributes:
        due: Whether codes that no row has chosen since the last time are moved to rows of the next
            batch, before it is quantised.
    """

    used: Tensor  # (M,) how often each code was chosen

    def __init__(self, codes: int, width: int, counted: bool = False) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.empty(codes, width).uniform_(-1.0 / codes, 1.0 / codes))
        self.counted, self.due = counted, False
        if counted:
            self.register_buffer("used", torch.zeros(codes))

    def nearest(self, rows: Tensor) -> Tensor:
        """Number of the nearest code of each row, (..., Z) -> (...)."""
        flat = rows.reshape(-1, rows.shape[-1])
        # |r - c|^2 without the row's own norm, which no comparison needs.
        distance = self.codes.square().sum(1) - 2.0 * flat @ self.codes.T
        return distance.argmin(1).view(rows.shape[:-1])

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise rows (..., Z).

        Returns:
            Codes (..., Z), whose gradient passes straight to the rows; their numbers (...); and the
            loss that draws codes and rows together.
        """
        if self.due:
            self._revive(rows.detach().flatten(0, -2))
        number = self.nearest(rows)
        if self.counted and self.training and self.codes.requires_grad:
            self.used.index_add_(0, number.flatten(), self.used.new_ones(number.numel()))
        code = self.codes[number]
        loss = F.mse_loss(rows, code.detach()) + F.mse_loss(code, rows.detach())
        return rows + (code - rows).detach(), number, loss

    @torch.no_grad()
    def _revive(self, rows: Tensor) -> None:
        """Move codes that nobody chose to random rows (N, Z) of this batch, on all ranks alike."""
        unused = (mean_over_ranks(self.used) == 0).nonzero().flatten()[: len(rows)]
        there = rows[torch.randperm(len(rows))[: len(unused)].to(rows.device)].float()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast(there, src=0)
        self.codes[unused] = there
        self.used.zero_()
        self.due = False


class ContextView(NamedTuple):
    """Everything that future frames need to know of their context; computed once per clip."""

    encoded: Maps  # by level, (B, K, C, r, r)
    drawn: Tensor  # (B, K, C, r, r)
    frames: Tensor  # (B, K, 3, H, W) as decoded
    ids: Tensor  # (B, K, P) codes
    loss: Tensor  # scalar


class Reconstruction(NamedTuple):
    """A clip through the tokenizer and back."""

    context: Tensor  # (B, K, 3, H, W)
    future: Tensor  # (B, T, 3, H, W)
    context_loss: Tensor  # scalar, of the codebook
    future_loss: Tensor  # scalar, of the codebook
    tokens: Tensor  # (B, L)


class Tokenizer(nn.Module):
    """Clips into tokens and back.

    Args:
        cfg: Sizes.
    """

    def __init__(self, cfg: TokenizerConfig) -> None:
        super().__init__()
        self.cfg, self.layout = cfg, Layout.of(cfg)
        self.context_encoder, self.future_encoder = ContextEncoder(cfg), FutureEncoder(cfg)
        self.context_decoder = Decoder(cfg, conditional=False)
        self.future_decoder = Decoder(cfg, conditional=True)
        self.before_codes = nn.Conv2d(cfg.latent, cfg.latent, 1)
        self.after_codes = nn.Conv2d(cfg.latent, cfg.latent, 1)
        patch = cfg.patch**2 * cfg.latent
        self.patch_in, self.patch_out = nn.Linear(patch, cfg.latent), nn.Linear(cfg.latent, patch)
        self.context_codes = LearntCodes(cfg.context_codes, cfg.latent, cfg.revive > 0)
        self.future_codes = LearntCodes(cfg.future_codes, cfg.latent, cfg.revive > 0)

    def view(self, frames: Tensor) -> ContextView:
        """Encode, quantise and decode the context frames, (B, K, 3, H, W) in [0, 1].

        Raises:
            ValueError: Another number of frames than the networks are made for.
        """
        clips, shown = frames.shape[:2]
        if shown != self.cfg.context_frames:
            raise ValueError(f"expected {self.cfg.context_frames} context frames, got {shown}")
        latent, seen = self.context_encoder(frames.flatten(0, 1))
        rows = self.before_codes(latent).flatten(2).transpose(1, 2)
        code, ids, loss = self.context_codes(rows)
        picture, drawn = self._draw_context(code)
        return ContextView(
            [_per_clip(x, clips) for x in seen],
            _per_clip(drawn, clips),
            _per_clip(picture, clips),
            _per_clip(ids, clips),
            loss,
        )

    def encode(self, frames: Tensor, view: ContextView) -> Tensor:
        """Latent maps of future frames (B, T, 3, H, W) -> (B*T, Z, r, r), before their codes."""
        count = frames.shape[1]
        context = [_for_each(x, count) for x in view.encoded]
        latent: Tensor = self.future_encoder(frames.flatten(0, 1), context)
        return latent

    def forward(self, frames: Tensor) -> Reconstruction:
        """Clips (B, K + T, 3, H, W) in [0, 1] -> the same from their codes, and their tokens."""
        shown = self.cfg.context_frames
        view, future = self.view(frames[:, :shown]), frames[:, shown:]
        rows = self.patch_in(self._cut(self.encode(future, view)))
        code, ids, loss = self.future_codes(rows)
        drawn = self._draw_future(code, view)
        tokens = self.layout.join(view.ids, _per_clip(ids, len(frames)))
        return Reconstruction(view.frames, drawn, view.loss, loss, tokens)

    @torch.no_grad()
    def tokenize(self, frames: Tensor) -> tuple[Tensor, ContextView]:
        """Clips (B, K + T, 3, H, W) in [0, 1] -> tokens (B, L), and their context."""
        shown = self.cfg.context_frames
        view, future = self.view(frames[:, :shown]), frames[:, shown:]
        ids = self.future_codes.nearest(self.patch_in(self._cut(self.encode(future, view))))
        return self.layout.join(view.ids, _per_clip(ids, len(frames))), view

    @torch.no_grad()
    def detokenize(self, ids: Tensor, view: ContextView) -> Tensor:
        """Codes of future frames (B, T, Q), without marks, -> frames (B, T, 3, H, W)."""
        return self._draw_future(self.future_codes.codes[ids].flatten(0, 1), view)

    def context_view(self, ids: Tensor) -> ContextView:
        """What decoding needs of context frames that only their codes (B, K, P) are known of.

        Nothing is encoded, so ``encoded`` is empty.
        """
        picture, drawn = self._draw_context(self.context_codes.codes[ids].flatten(0, 1))
        clips = len(ids)
        zero = ids.new_zeros((), dtype=picture.dtype)
        return ContextView([], _per_clip(drawn, clips), _per_clip(picture, clips), ids, zero)

    def _draw_context(self, code: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (N, P, Z) -> frames (N, 3, H, W), and what the other decoder looks at."""
        side = self.cfg.side
        maps = torch.unflatten(code.transpose(1, 2), 2, (side, side))
        picture, drawn = self.context_decoder(self.after_codes(maps))
        return picture, drawn

    def _draw_future(self, code: Tensor, view: ContextView) -> Tensor:
        """Codes (B*T, Q, Z) -> frames (B, T, 3, H, W)."""
        clips = len(view.drawn)
        context = _for_each(view.drawn, len(code) // clips)
        picture, _ = self.future_decoder(self._join(self.patch_out(code)), context)
        return _per_clip(picture, clips)

    def _cut(self, maps: Tensor) -> Tensor:
        """Maps (N, Z, r, r) -> patches (N, Q, patch * patch * Z), by row, column, channel."""
        patch, across = self.cfg.patch, self.cfg.side // self.cfg.patch
        parts = torch.unflatten(torch.unflatten(maps, 3, (across, patch)), 2, (across, patch))
        return parts.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def _join(self, patches: Tensor) -> Tensor:
        """Undo `_cut`."""
        patch, across = self.cfg.patch, self.cfg.side // self.cfg.patch
        parts = torch.unflatten(
            torch.unflatten(patches, 2, (patch, patch, -1)), 1, (across, across)
        )
        return parts.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def _per_clip(x: Tensor, clips: int) -> Tensor:
    """(B*K, ...) -> (B, K, ...)."""
    return torch.unflatten(x, 0, (clips, -1))


def _for_each(context: Tensor, count: int) -> Tensor:
    """The context (B, K, ...) of each of ``count`` frames per clip, (B*count, K, ...)."""
    return context.repeat_interleave(count, dim=0)
