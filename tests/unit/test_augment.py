"""Crops and colours of iVideoGPT's pre-training (facts 7.5)."""

from __future__ import annotations

import colorsys

import pytest
import torch

from mapo_lightning.models.token_world.augment import (
    augmented,
    brighter,
    contrasted,
    cropped,
    saturated,
    turned,
)


def clips(batch: int = 2, time: int = 3, side: int = 8) -> torch.Tensor:
    return torch.rand(batch, time, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_a_crop_is_what_is_in_the_rectangle() -> None:
    x = clips()
    whole = torch.ones(2, 2), torch.zeros(2, 2)
    torch.testing.assert_close(cropped(x, *whole), x)
    # The left half of the first clip, twice as wide; the lower half of the second.
    size, centre = torch.tensor([[0.5, 1.0], [1.0, 0.5]]), torch.tensor([[-0.5, 0.0], [0.0, 0.5]])
    found = cropped(x, size, centre)
    # A pixel of the source is two of the crop: their mean is 3/4 of it and 1/8 of each neighbour.
    pairs = found[0].unflatten(-1, (4, 2)).mean(-1)
    left, own, right = x[0, ..., 0:2], x[0, ..., 1:3], x[0, ..., 2:4]
    torch.testing.assert_close(pairs[..., 1:3], 0.125 * left + 0.75 * own + 0.125 * right)
    rows = found[1].unflatten(-2, (4, 2)).mean(-2)
    above, own, below = x[1, ..., 4:6, :], x[1, ..., 5:7, :], x[1, ..., 6:8, :]
    torch.testing.assert_close(rows[..., 1:3, :], 0.125 * above + 0.75 * own + 0.125 * below)


def test_colours_change_as_they_are_defined() -> None:
    x, by = clips(), torch.tensor([0.1, -0.05])
    torch.testing.assert_close(brighter(x, by)[1], 0.95 * x[1])
    grey = 0.299 * x[:, :, 0] + 0.587 * x[:, :, 1] + 0.114 * x[:, :, 2]
    mean = grey.mean(dim=(1, 2, 3))
    torch.testing.assert_close(contrasted(x, by)[0], mean[0] + 1.1 * (x[0] - mean[0]))
    own = grey[0][:, None]
    torch.testing.assert_close(saturated(x, by)[0], own + 1.1 * (x[0] - own))


def test_hues_turn_as_in_hsv() -> None:
    x, by = clips(side=4), torch.tensor([0.05, -0.3])
    x[0, 0, :, 0, 0] = 0.4  # grey has no hue
    found = turned(x, by)
    for clip in range(2):
        for place in torch.cartesian_prod(torch.arange(3), torch.arange(4), torch.arange(4)):
            t, row, column = place.tolist()
            hue, saturation, value = colorsys.rgb_to_hsv(*x[clip, t, :, row, column].tolist())
            wanted = colorsys.hsv_to_rgb((hue + float(by[clip])) % 1.0, saturation, value)
            assert found[clip, t, :, row, column].tolist() == pytest.approx(wanted, abs=1e-5)


def test_a_clip_is_changed_as_a_whole_and_each_in_its_own_way() -> None:
    torch.manual_seed(1)
    one = clips(1, 1)[:, :1].expand(16, 3, -1, -1, -1)
    found = augmented(one)
    assert found.shape == one.shape
    assert 0.0 <= float(found.min()) <= float(found.max()) <= 1.0
    assert torch.equal(found[:, 0], found[:, 2])
    away = (found[:, None, 0] - found[None, :, 0]).abs().amax(dim=(2, 3, 4))
    assert bool((away + torch.eye(16) > 1e-3).all())
    assert float((found - one).abs().mean()) < 0.25  # crops take at least 0.8 of the picture
