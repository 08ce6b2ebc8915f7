"""What the token world believes: the last frames, as an agent that reads pictures wants them.

Shapes: B batch, T time, S stacked frames, H W image, F = S * 3 * H * W.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class StackedFrames(NamedTuple):
    """The newest frames, the last one at the end."""

    frames: Tensor  # (..., S, H, W, 3) uint8
    scale: float = 1.0 / 255.0
    """Factor from bytes to what an agent reads."""

    @property
    def feat(self) -> Tensor:
        """Frames one after the other, channels before rows: (..., F), in [0, 1]."""
        return self.frames.movedim(-1, -3).flatten(-4).float() * self.scale

    def at(self, t: int) -> StackedFrames:
        """Belief at one time: axes (B, T) -> (B,)."""
        return self._replace(frames=self.frames[:, t])

    def flatten(self) -> StackedFrames:
        """Merge batch and time: axes (B, T) -> (B*T,)."""
        return self._replace(frames=self.frames.flatten(0, 1))

    def repeat(self, times: int) -> StackedFrames:
        """Every row ``times`` times, one after the other: axes (B,) -> (B*times,)."""
        return self._replace(frames=self.frames.repeat_interleave(times, dim=0))

    def detach(self) -> StackedFrames:
        """Itself: bytes have no graph."""
        return self

    def followed_by(self, frame: Tensor) -> StackedFrames:
        """Belief one step later: axes (B,), frame (B, H, W, 3) uint8."""
        return self._replace(frames=torch.cat([self.frames[:, 1:], frame[:, None]], dim=1))


def stacked(
    obs: Tensor, is_first: Tensor, count: int, before: StackedFrames | None = None
) -> StackedFrames:
    """Stack every frame with those before it in its episode.

    Where an episode, or the batch, is younger than the stack, its first frame stands in for those
    that are missing.

    Args:
        obs: Frames (B, T, H, W, 3) uint8.
        is_first: (B, T) bool, the episodes' first frames.
        count: Number S of frames in a stack.
        before: Belief before the first frame, axes (B,); None: there is none.
    """
    batch, time = is_first.shape
    past = obs[:, :1].expand(-1, count, *obs.shape[2:]) if before is None else before.frames
    line = torch.cat([past, obs], dim=1)  # frame t of ``obs`` stands at count + t
    place = torch.arange(count, count + time, device=obs.device).expand(batch, -1)
    first = torch.where(is_first, place, 0).cummax(dim=1).values
    lag = torch.arange(count - 1, -1, -1, device=obs.device)
    index = torch.maximum(place[..., None] - lag, first[..., None])  # (B, T, S)
    rows = torch.arange(batch, device=obs.device)[:, None, None]
    return StackedFrames(line[rows, index])
