"""A small network that reads numbers off pictures: what was done, where things are.

Shapes: N pictures, C channels, H W image, D numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_UPDATES, _BATCH, _RATE = 600, 64, 2e-3
_SIDE = 32  # pixels: pictures are shrunk to this


class Reader(nn.Module):
    """Convolutions and one hidden layer; trained by `fit`.

    Args:
        channels: Of a picture.
        out: Numbers D that are read.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 24, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 48, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(48 * (_SIDE // 4) ** 2, 128),
            nn.ReLU(),
            nn.Linear(128, out),
        )
        self.register_buffer("mean", torch.zeros(out))
        self.register_buffer("spread", torch.ones(out))

    def forward(self, pictures: Tensor) -> Tensor:
        """Read numbers (N, D) off pictures (N, C, H, W) in [0, 1]."""
        numbers: Tensor = self.layers(_shrunk(pictures) - 0.5)
        return self.mean + self.spread * numbers


def fit(pictures: Tensor, numbers: Tensor, seed: int = 0, updates: int = _UPDATES) -> Reader:
    """Train a reader by least squares; the same every time for the same seed.

    Args:
        pictures: (N, C, H, W) in [0, 1].
        numbers: What is to be read off them, (N, D).
        seed: Of its first weights and batches.
        updates: Batches of 64 that it sees.
    """
    device = pictures.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        reader = Reader(pictures.shape[1], numbers.shape[1]).to(device)
        reader.mean.copy_(numbers.mean(dim=0))
        reader.spread.copy_(numbers.std(dim=0).clamp(min=1e-6))
        target = (numbers - reader.mean) / reader.spread
        small = _shrunk(pictures)
        optimiser = torch.optim.Adam(reader.parameters(), _RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
        with torch.enable_grad():
            for _ in range(updates):
                rows = torch.randint(len(small), (_BATCH,), device=device)
                loss = F.mse_loss(reader.layers(small[rows] - 0.5), target[rows])
                optimiser.zero_grad()
                torch.autograd.backward(loss)
                optimiser.step()
                schedule.step()
    return reader.eval().requires_grad_(False)


def _shrunk(pictures: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(pictures.float(), _SIDE)
