"""Frames of 32, 64 and 128 pixels: the networks of both kinds, and the settings that follow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mapo_lightning.config.compose import compose
from mapo_lightning.models.blocks import transposed
from mapo_lightning.models.rssm_world.action_source import InverseAction
from mapo_lightning.models.rssm_world.context import FrameContext
from mapo_lightning.models.rssm_world.decoder import CNNDecoder, build_decoder
from mapo_lightning.models.rssm_world.encoder import CNNEncoder, build_encoder, normalised
from mapo_lightning.models.rssm_world.settings import ContextConfig, ImageConfig, SourceConfig
from mapo_lightning.run.build import build_pretrain
from mapo_lightning.run.config import RunConfig
from mapo_lightning.types import ConfigError
from tests.unit.test_methods import synthetic

CONF = Path(__file__).parents[2] / "conf"
RESIDUAL = {32: [8, 16], 64: [4, 8, 16], 128: [4, 4, 8, 16]}
CASES = [(kind, size) for kind in ("resnet", "cnn") for size in RESIDUAL]


def image(kind: str, size: int) -> ImageConfig:
    channels = RESIDUAL[size] if kind == "resnet" else [4]
    return ImageConfig(kind=kind, size=size, channels=channels, layers=1)  # type: ignore[arg-type]


def configured(*words: str) -> RunConfig:
    return compose(words, RunConfig, CONF).config


@pytest.mark.parametrize(("kind", "size"), CASES)
def test_frames_of_every_size_are_encoded_and_drawn(kind: str, size: int) -> None:
    torch.manual_seed(0)
    cfg = image(kind, size)
    obs = torch.randint(0, 256, (2, 3, size, size, 3), dtype=torch.uint8)
    encoder = build_encoder(cfg)
    # Residual networks end on a 4x4 map, the plain CNN on a 2x2 map of its widest layer.
    assert encoder.embed_dim == (16 * 16 if kind == "resnet" else 4 * 4 * size // 8)
    assert encoder(normalised(obs)).shape == (6, encoder.embed_dim)
    pairs = InverseAction(cfg, SourceConfig(kind="inverse", width=5), 8)
    first = torch.zeros(2, 3, dtype=torch.bool)
    assert pairs({"obs": obs, "is_first": first}).action.shape == (2, 3, 5)
    for seen in ("none", "features"):
        context = ContextConfig(kind=seen, heads=1)  # type: ignore[arg-type]
        scene = FrameContext(context, cfg)(obs).maps if seen == "features" else {}
        drawn = build_decoder(cfg, 24, context)(torch.randn(6, 24), scene)
        assert drawn.shape == (6, 3, size, size)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size"), CASES)
def test_a_model_of_every_size_learns_and_dreams(kind: str, size: int) -> None:
    torch.manual_seed(0)
    chosen = image(kind, size)
    word = f"{{kind: {kind}, size: {size}, channels: {chosen.channels}, layers: 1}}"
    cfg = configured("method=mapo", f"world_model.image={word}")
    assert (cfg.data.image_size, cfg.env.size) == (size, size)
    world = build_pretrain(cfg).world_model
    batch = synthetic(cfg, 2, steps=3)
    fit = world.loss(batch)
    fit.total.backward()
    assert torch.isfinite(fit.total)
    silent = [n for n, p in world.named_parameters() if p.grad is None or not p.grad.any()]
    # The last layer of cross-attention starts at zero, and so do the gradients of what it reads.
    assert [name for name in silent if ".attention." not in name and "context" not in name] == []
    assert world.open_loop(batch, seen=2).shape == (2, 3, size, size, 3)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"size": 48}, "size must be 32, 64 or 128 pixels, got 48"),
        (
            {"size": 32},
            "channels must be 2 numbers at size=32, for maps of 16x16, 8x8, got [48, 96, 192]",
        ),
        (
            {"size": 64, "channels": [8, 16]},
            "channels must be 3 numbers at size=64, for maps of 32x32, 16x16, 8x8, got [8, 16]",
        ),
        (
            {"size": 128, "channels": [8]},
            "channels must be 4 numbers at size=128, for maps of 64x64, 32x32, 16x16, 8x8, got [8]",
        ),
        ({"kind": "cnn", "channels": []}, "channels must be multiples of 4, got []"),
        ({"kind": "cnn", "channels": [6]}, "channels must be multiples of 4, got [6]"),
    ],
)
def test_sizes_without_networks_are_refused(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        ImageConfig(**settings)  # type: ignore[arg-type]
    assert str(error.value) == sentence


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data.image_size", "env.size"])
def test_pictures_have_the_side_of_the_networks(name: str) -> None:
    assert configured("world_model.image.size=64").env.size == 64
    with pytest.raises(ConfigError, match=rf"{name} must be world_model\.image\.size.*96 and 32"):
        configured(f"{name}=96")


def shapes(layers: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in layers.parameters() if p.ndim == 4]


def test_the_plain_cnn_at_64_pixels_is_the_published_one() -> None:
    """DreamerV2's kernels: four of 4, then 5, 5, 6 and 6 (facts 3.4)."""
    cfg = ImageConfig(kind="cnn")
    with torch.device("meta"):
        encoder, decoder = CNNEncoder(cfg), CNNDecoder(cfg, 2048)
        frames = decoder(torch.empty(2, 2048), {})
        embed = encoder(frames)
    assert shapes(encoder) == [(48, 3, 4, 4), (96, 48, 4, 4), (192, 96, 4, 4), (384, 192, 4, 4)]
    assert tuple(decoder.dense.weight.shape) == (1536, 2048)
    # Of transposed convolutions: channels in, channels out, kernel.
    assert shapes(decoder) == [(1536, 192, 5, 5), (192, 96, 5, 5), (96, 48, 6, 6), (48, 3, 6, 6)]
    assert (tuple(frames.shape), tuple(embed.shape)) == ((2, 3, 64, 64), (2, 1536))


@pytest.mark.parametrize(("size", "kernels"), [(32, [5, 6, 6]), (128, [5, 5, 5, 6, 6])])
def test_other_sizes_have_a_layer_of_the_cnn_fewer_or_more(size: int, kernels: list[int]) -> None:
    cfg = image("cnn", size)
    encoder, decoder = CNNEncoder(cfg), CNNDecoder(cfg, 24)
    widths = [4 * 2**i for i in range(len(kernels))]
    assert [shape[0] for shape in shapes(encoder)] == widths
    assert [shape[0] for shape in shapes(decoder)] == [128, *widths[-2::-1]]
    assert [shape[-1] for shape in shapes(decoder)] == kernels


@pytest.mark.parametrize(
    ("kernel", "side", "padding"),
    [(5, 1, 0), (6, 1, 0), (5, 5, 0), (5, 13, 0), (6, 5, 0), (6, 14, 0), (4, 8, 1), (4, 1, 1)],
)
def test_a_shuffled_convolution_is_the_transposed_one(kernel: int, side: int, padding: int) -> None:
    layer = nn.ConvTranspose2d(7, 3, kernel, stride=2, padding=padding).double()
    x = torch.randn(4, 7, side, side, dtype=torch.float64, requires_grad=True)
    expected, found = layer(x), transposed(layer, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    leaves = [x, *layer.parameters()]
    for one, other in zip(
        torch.autograd.grad(expected.square().sum(), leaves),
        torch.autograd.grad(found.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)
