from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from test_prefetch import write_videos

from mapo_lightning.data import clips
from mapo_lightning.data.reader import read
from mapo_lightning.data.settings import VideoDataConfig
from mapo_lightning.semantics.settings import VlmConfig
from mapo_lightning.training.datamodule import VideoDataModule


def test_rollouts_show_the_same_pictures_with_one_labeler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "videos").mkdir()
    write_videos(tmp_path / "videos")
    built, build = [], clips.build_labeler
    monkeypatch.setattr(clips, "build_labeler", lambda *a: built.append(a) or build(*a))
    data = VideoDataConfig(kind="folder", root=str(tmp_path / "videos"), clip_length=9, workers=0)
    module = VideoDataModule(data, VlmConfig(), 2, tmp_path / "cache", seed=0)
    first, again = module.rollout_batch(3), module.rollout_batch(3)
    assert len(built) == 1
    fresh = torch.utils.data.default_collate(module.clips("holdout").fixed_clips(3))
    assert first.keys() == {"obs", "semantic", "has_semantic", "position", "is_first"}
    for key in first:
        assert torch.equal(first[key], again[key])
        assert torch.equal(first[key], fresh[key])
    module.val_dataloader()
    assert len(built) == 2  # one for the rollouts and validation, one for the fresh clips


def test_what_told_and_untold_are_measured_with(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    write_videos(tmp_path / "videos")
    data = VideoDataConfig(
        kind="folder", root=str(tmp_path / "videos"), clip_length=9, workers=0, image_size=32
    )
    module = VideoDataModule(data, VlmConfig(), 2, tmp_path / "cache", seed=0)
    train, held_out = (module.clips(name).videos for name in ("train", "holdout"))
    frames = [read(info, [0, 5, 11, 16, 22, 27, 33, 39], (32, 32)) for info in train]  # of forty
    expected = np.mean(frames, axis=(0, 1)) / 255
    np.testing.assert_allclose(module.mean_picture().numpy(), expected, atol=1e-6)
    whole = np.sort(read(held_out[0], range(40), (32, 32)), axis=0)[19] / 255  # torch's median
    scenes = module.still_scenes(torch.tensor([0, 0]))
    np.testing.assert_allclose(scenes.numpy(), [whole, whole], atol=1e-6)
    batch = module.held_out_batch(3)
    assert batch["obs"].shape == (3, 9, 32, 32, 3)
    assert batch["video"].tolist() == [n % len(held_out) for n in range(3)]
    assert module.body_width * 5 == batch["semantic"].shape[-1] == 320


def test_a_batch_that_is_long_in_coming_is_spoken_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "videos").mkdir()
    write_videos(tmp_path / "videos")
    said: list[str] = []

    @contextmanager
    def waiting(what: str) -> Iterator[None]:
        said.append(what)
        yield
        said.append("here")

    monkeypatch.setattr("mapo_lightning.training.datamodule.waiting", waiting)
    data = VideoDataConfig(kind="folder", root=str(tmp_path / "videos"), clip_length=9, workers=0)
    module = VideoDataModule(data, VlmConfig(kind="none"), 2, tmp_path / "cache", seed=0)
    batches = iter(module.train_dataloader())
    assert next(batches)["obs"].shape[:2] == (2, 9)
    next(batches)
    assert said == ["the next batch: its clips are being decoded and labelled", "here"] * 2
