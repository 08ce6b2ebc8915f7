"""DrQ-v2's networks and its step: a deterministic actor and two critics that read pictures.

Shapes: M transitions, S stacked frames, C = 3 S channels, H W image, A action, D features.

Source: DrQ-v2, arXiv:2107.09645; iVideoGPT, arXiv:2405.15223; facts 7.6.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Transitions(NamedTuple):
    """Steps of experience, real or dreamt."""

    frames: Tensor  # (M, S, H, W, 3) uint8
    action: Tensor  # (M, A), taken in the last of the frames
    reward: Tensor  # (M,) discounted sum of the next n
    discount: Tensor  # (M,) factor of what comes after them; 0 where the task ended
    after: Tensor  # (M, S, H, W, 3) uint8, n steps later


class Pixels(nn.Module):
    """Four convolutions."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(channels, 32, 3, stride=2), nn.ReLU(),
            nn.Conv2d(32, 32, 3), nn.ReLU(),
            nn.Conv2d(32, 32, 3), nn.ReLU(),
            nn.Conv2d(32, 32, 3), nn.ReLU(),
        )  # fmt: skip
        self.features = 32 * ((size - 3) // 2 + 1 - 6) ** 2

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures (M, C, H, W) in [0, 1] -> features (M, D)."""
        found: Tensor = self.convs(pictures - 0.5)
        return found.flatten(1)


def _trunk(features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, 50), nn.LayerNorm(50), nn.Tanh())


def _mlp(width: int, out: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
        nn.Linear(hidden, out),
    )  # fmt: skip


class Actor(nn.Module):
    """Says the mean action."""

    def __init__(self, features: int, action_dim: int, hidden: int) -> None:
        super().__init__()
        self.trunk, self.policy = _trunk(features), _mlp(50, action_dim, hidden)

    def forward(self, features: Tensor) -> Tensor:
        """Features (M, D) -> actions (M, A) in [-1, 1]."""
        mean: Tensor = self.policy(self.trunk(features))
        return mean.tanh()


class Critics(nn.Module):
    """Two opinions of what an action is worth."""

    def __init__(self, features: int, action_dim: int, hidden: int) -> None:
        super().__init__()
        self.trunk = _trunk(features)
        self.heads = nn.ModuleList(_mlp(50 + action_dim, 1, hidden) for _ in range(2))

    def forward(self, features: Tensor, action: Tensor) -> Tensor:
        """Features (M, D), actions (M, A) -> values (2, M)."""
        both = torch.cat([self.trunk(features), action], dim=-1)
        return torch.stack([head(both).squeeze(-1) for head in self.heads])


def orthogonal(module: nn.Module) -> None:
    """Start weights as DrQ-v2 does: orthogonal, convolutions scaled for ReLU, biases zero."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        gain = nn.init.calculate_gain("relu") if isinstance(module, nn.Conv2d) else 1.0
        nn.init.orthogonal_(module.weight, gain)
        assert module.bias is not None
        nn.init.zeros_(module.bias)


def noisy(mean: Tensor, std: float, limit: float | None = None) -> Tensor:
    """Add normal noise, cut off at ``limit``, and stay in [-1, 1]; gradients pass straight."""
    noise = std * torch.randn_like(mean)
    if limit is not None:
        noise = noise.clamp(-limit, limit)
    action = mean + noise
    return action + (action.clamp(-1.0, 1.0) - action).detach()


def shifted(pictures: Tensor, pad: int) -> Tensor:
    """Move each picture (M, C, H, W) by up to ``pad`` pixels; the edge is repeated."""
    count, _, height, width = pictures.shape
    padded = F.pad(pictures, (pad, pad, pad, pad), mode="replicate")
    move = torch.randint(2 * pad + 1, (2, count), device=pictures.device)
    rows = torch.arange(height, device=pictures.device) + move[0, :, None]
    columns = torch.arange(width, device=pictures.device) + move[1, :, None]
    each = torch.arange(count, device=pictures.device)[:, None, None]
    return padded.movedim(1, -1)[each, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


class Steps(NamedTuple):
    """Where n-step transitions begin and end, axes (B, T)."""

    valid: Tensor  # bool, a transition begins here
    place: Tensor  # int64, index where it ends
    reward: Tensor
    discount: Tensor


def n_steps(reward: Tensor, last: Tensor, terminal: Tensor, count: int, discount: float) -> Steps:
    """Sum rewards over ``count`` steps, or up to the end of the episode where that is nearer.

    Args:
        reward: (B, T), received on reaching each entry.
        last: (B, T) bool, nothing follows the entry in its episode.
        terminal: (B, T) bool, nor ever would.
        count: Number n of steps. Those that the end of the sequence cuts short are not valid.
        discount: Per step.
    """
    batch, time = reward.shape
    here = torch.arange(time, device=reward.device).expand(batch, -1)
    place, valid = here.clone(), torch.zeros_like(last)
    gain, rest = torch.zeros_like(reward), torch.ones_like(reward)
    going = ~last
    for k in range(1, count + 1):
        inside = going & (here + k < time)
        at = (here + k).clamp(max=time - 1)
        gain = gain + discount ** (k - 1) * reward.gather(1, at) * inside
        left = discount**k * (~terminal.gather(1, at)).to(reward.dtype)
        rest = torch.where(inside, left, rest)
        place = torch.where(inside, at, place)
        ended = inside & last.gather(1, at)
        valid = valid | ended | (inside if k == count else False)
        going = inside & ~ended
    return Steps(valid, place, gain, rest)
