"""The view of a codebook: who shares codes, what they show, what they are worth."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mapo_lightning.judging.codes import (
    SceneCodes,
    codes_report,
    heat_maps,
    nearest,
    patches,
    random_codes,
    save_codes,
    scene_codes,
    separation,
)
from mapo_lightning.models.rssm_world.context import FrameContext
from mapo_lightning.models.rssm_world.settings import ContextConfig, ImageConfig, QuantizerConfig


def known(groups: int = 3, videos: int = 2, frames: int = 4, spread: float = 0.05) -> SceneCodes:
    """Features around one corner for each group, on four places, and a code in every corner."""
    rng = np.random.default_rng(0)
    corner = np.eye(groups, 5) * 3.0
    group = np.repeat(np.arange(groups), videos * frames)
    video = np.repeat(np.arange(groups * videos), frames)
    features = corner[group][:, None] + spread * rng.normal(size=(len(group), 4, 5))
    codes = np.concatenate([corner, np.full((2, 5), 9.0)])
    names = tuple(f"class {g}" for g in range(groups))
    return SceneCodes(features, nearest(features, codes), codes, group, video, names)


def test_nearest_codes_use_and_perplexity() -> None:
    found = known()
    assert (found.chosen == found.group[:, None]).all()
    assert found.use.tolist() == [1 / 3, 1 / 3, 1 / 3, 0.0, 0.0]
    assert found.perplexity == pytest.approx(3.0)
    assert found.vectors == pytest.approx(found.codes[found.group])


def test_separation_equals_its_definition() -> None:
    vectors = np.array([[0.0], [1.0], [10.0], [12.0]])
    video = np.array([0, 0, 1, 1])
    found = separation(vectors, video, video)  # every video is a group of its own
    between = np.mean([100.0, 144.0, 81.0, 121.0])
    assert found == pytest.approx([np.log10(between / 1.0), np.log10(between / 4.0)])
    # With classes, a frame is compared with other videos of its class only.
    vectors = np.array([[0.0], [0.1], [2.0], [2.1], [9.0], [9.1]])
    group, video = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 2, 2])
    found = separation(vectors, group, video)
    assert len(found) == 2  # the third video has no other one of its class
    within = np.mean([(a - b) ** 2 for a in (0.0, 0.1) for b in (2.0, 2.1)])
    between = np.mean([(a - b) ** 2 for a in (0.0, 0.1) for b in (9.0, 9.1)])
    assert found[0] == pytest.approx(np.log10(between / within))


def test_separation_of_equal_and_of_shuffled_codes() -> None:
    found = known()
    assert separation(found.vectors, found.group, found.video) == pytest.approx(6.0)  # its bound
    same = np.zeros_like(found.vectors)
    assert (separation(same, found.group, found.video) == 0.0).all()
    shuffled = np.random.default_rng(1).permutation(found.features.mean(axis=1))
    assert abs(separation(shuffled, found.group, found.video).mean()) < 0.3


def test_the_report_compares_with_random_codes_and_features() -> None:
    found = known(spread=1.0)
    report = codes_report(found)
    assert report.separation.mean > report.of_random.mean
    assert report.gain.low > 0
    assert "3 of 5 codes are used" in report.sentence()
    assert "That is more than random codebooks give" in report.sentence()
    assert "frames of different classes" in report.sentence()
    # A codebook that is itself random is not more than a random one.
    again = codes_report(random_codes(found, seed=7))
    assert "not shown to be more" in again.sentence()
    with pytest.raises(ValueError, match="two videos or classes"):
        codes_report(found._replace(names=("one",)))


def test_heat_maps_are_correlation_and_cosine() -> None:
    found = known(groups=4)
    rng = np.random.default_rng(2)
    found = found._replace(codes=rng.normal(size=found.codes.shape))
    mean = np.stack([found.vectors[found.group == g].mean(axis=0) for g in range(4)])
    correlation, cosine = heat_maps(found)
    assert correlation == pytest.approx(np.corrcoef(mean))
    unit = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    assert cosine == pytest.approx(unit @ unit.T)


def test_patches_show_the_nearest_place_of_each_video() -> None:
    found = known(groups=1, videos=3, frames=1)
    frames = np.zeros((3, 8, 8, 3), np.uint8)
    for n in range(3):
        for place in range(4):  # 2x2 places, each of its own grey
            top, left = 4 * (place // 2), 4 * (place % 2)
            frames[n, top : top + 4, left : left + 4] = 60 * place + n
    sheet = patches(found, frames)
    apart = ((found.features - found.codes[0]) ** 2).sum(-1)
    order = np.argsort(apart.min(axis=1))
    zoom = 48 // 8
    for row, n in enumerate(order):
        place = int(apart[n].argmin())
        middle = sheet[row * (8 * zoom + 3) + 4 * zoom, 4 * zoom]
        assert middle.tolist() == [60 * place + n] * 3


@pytest.mark.parametrize("shape", ["spatial", "frame"])
def test_frames_are_looked_up_as_the_model_does(shape: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = ContextConfig(kind="quantized", quantizer=QuantizerConfig(codes=8, shape=shape))  # type: ignore[arg-type]
    context = FrameContext(settings, ImageConfig(kind="cnn", size=32, channels=[4])).eval()
    frames = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8)
    video = [0, 0, 1, 1, 2, 2]
    found = scene_codes(context, frames, video, [""] * 6)
    expected = context(frames[:, None]).codes[8]
    assert (found.chosen == expected.numpy()).all()
    assert found.names == ("video 0", "video 1", "video 2")
    named = scene_codes(context, frames, video, ["a", "a", "b", "b", "a", "a"])
    assert named.names == ("a", "b")
    assert named.group.tolist() == [0, 0, 1, 1, 0, 0]
    report = codes_report(found)
    save_codes(report, frames.numpy(), tmp_path / "new")
    figures = json.loads((tmp_path / "new/codebook.json").read_text())
    assert figures["separation"]["mean"] == pytest.approx(report.separation.mean)
    assert len(figures["alike"]["cosine"]) == 3
    assert (tmp_path / "new/codebook.md").read_text().strip() == report.sentence()
    picture = Image.open(io.BytesIO((tmp_path / "new/codebook.png").read_bytes()))
    assert picture.width > 1000


def test_a_model_without_a_codebook_has_no_view() -> None:
    context = FrameContext(
        ContextConfig(kind="features"), ImageConfig(kind="cnn", size=32, channels=[4])
    )
    with pytest.raises(ValueError, match="there is no codebook"):
        scene_codes(context, torch.zeros(2, 32, 32, 3, dtype=torch.uint8), [0, 1], ["", ""])
