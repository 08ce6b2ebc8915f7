"""The contract of image encoders: frames in, one vector each."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mapo_lightning.models.rssm_world.encoder import build_encoder, normalised
from mapo_lightning.models.rssm_world.settings import ImageConfig

ENCODERS = {
    "resnet": ImageConfig(kind="resnet", channels=[4, 8, 16], layers=1),
    "resnet, cheap": ImageConfig(kind="resnet", channels=[4, 8, 16], layers=1, recompute="cheap"),
    "resnet, recomputed": ImageConfig(
        kind="resnet", channels=[4, 8, 16], layers=1, recompute="all"
    ),
    "cnn": ImageConfig(kind="cnn", channels=[4]),
    "resnet, 32": ImageConfig(kind="resnet", size=32, channels=[8, 16], layers=1),
    "cnn, 32": ImageConfig(kind="cnn", size=32, channels=[4]),
    "resnet, 128": ImageConfig(kind="resnet", size=128, channels=[4, 4, 8, 16], layers=1),
    "cnn, 128": ImageConfig(kind="cnn", size=128, channels=[4]),
}


@pytest.fixture(params=sorted(ENCODERS))
def cfg(request: pytest.FixtureRequest) -> ImageConfig:
    return ENCODERS[request.param]


@pytest.fixture
def encoder(cfg: ImageConfig) -> nn.Module:
    torch.manual_seed(0)
    return build_encoder(cfg)


@pytest.fixture
def frames(cfg: ImageConfig) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 256, (6, cfg.size, cfg.size, 3), dtype=torch.uint8)


def test_a_vector_of_the_stated_width_per_frame(encoder: nn.Module, frames: torch.Tensor) -> None:
    assert encoder(normalised(frames)).shape == (6, encoder.embed_dim)


def test_in_evaluation_a_frame_is_seen_alike_in_any_company(
    encoder: nn.Module, frames: torch.Tensor
) -> None:
    encoder.eval()
    together = encoder(normalised(frames))
    alone = torch.cat([encoder(normalised(frame[None])) for frame in frames])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    assert float((together[0] - together[1]).detach().abs().max()) > 1e-3  # it does look


def test_the_order_of_frames_in_memory_does_not_matter(
    encoder: nn.Module, frames: torch.Tensor
) -> None:
    encoder.eval()
    x = normalised(frames)
    torch.testing.assert_close(encoder(x.contiguous()), encoder(x), rtol=1e-4, atol=1e-5)


def test_every_pixel_and_parameter_gets_a_gradient(
    encoder: nn.Module, frames: torch.Tensor
) -> None:
    x = normalised(frames).requires_grad_()
    encoder(x).square().sum().backward()
    assert x.grad is not None
    # Four-by-four kernels of stride 2 without padding leave out the last two rows and columns.
    assert float((x.grad[..., :-2, :-2] != 0).float().mean()) > 0.99
    assert all(p.grad is not None for p in encoder.parameters())


def test_bytes_become_numbers_around_zero() -> None:
    x = normalised(torch.tensor([0, 255, 51], dtype=torch.uint8).expand(2, 5, 4, 4, 3))
    assert x.shape == (10, 3, 4, 4)
    torch.testing.assert_close(x[0, :, 0, 0], torch.tensor([-0.5, 0.5, -0.3]))
