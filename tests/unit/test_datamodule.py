from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from replay_entries import make, play
from test_prefetch import write_videos

from mapo_lightning.data import clips
from mapo_lightning.data.reader import read
from mapo_lightning.data.settings import VideoDataConfig
from mapo_lightning.semantics.settings import VlmConfig
from mapo_lightning.training.datamodule import ReplayDataModule, VideoDataModule, pinned


@pytest.mark.slow
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


def test_batches_for_a_gpu_are_pinned_by_this_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by: list[threading.Thread] = []

    def pin(x: torch.Tensor) -> torch.Tensor:
        by.append(threading.current_thread())
        return x.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batch = {"obs": torch.ones(2, dtype=torch.uint8), "reward": torch.ones(2)}
    assert pinned(batch, torch.device("cpu")) is batch
    found = pinned(batch, torch.device("cuda"))
    assert found["obs"] is not batch["obs"]
    assert torch.equal(found["obs"], batch["obs"])
    assert found["obs"].dtype == torch.uint8  # an eighth of what float32 would take on the way
    assert by == [threading.main_thread()] * 2
    (tmp_path / "videos").mkdir()
    write_videos(tmp_path / "videos")
    data = VideoDataConfig(kind="folder", root=str(tmp_path / "videos"), clip_length=9, workers=2)
    module = VideoDataModule(data, VlmConfig(kind="none"), 2, tmp_path / "cache", seed=0)
    loader = module.train_dataloader()
    assert not loader.pin_memory  # that would be a thread, which calls CUDA while it captures
    module.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda")))  # type: ignore[assignment]
    by.clear()
    module.on_before_batch_transfer(dict(batch), 0)
    assert len(by) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "later"), [(0, 0), (3, 3), (2, 3)])
def test_clips_go_on_where_updates_have_seen_them(
    workers: int, later: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (tmp_path / "videos").mkdir()
    write_videos(tmp_path / "videos")

    def module(workers: int) -> VideoDataModule:
        folder = str(tmp_path / "videos")
        data = VideoDataConfig(kind="folder", root=folder, clip_length=9, workers=workers)
        return VideoDataModule(data, VlmConfig(kind="none"), 2, tmp_path / "cache", seed=0)

    def places(module: VideoDataModule, count: int) -> list[tuple[int, int]]:
        """Stream and last draw of as many batches, each of which an update sees."""
        found, batches = [], iter(module.train_dataloader())
        for _ in range(count):
            batch = next(batches)
            found.append(batch["place"][:2])
            module.on_before_batch_transfer(batch, 0)
        return found

    whole = places(module(workers), 9)
    first = module(workers)
    assert places(first, 5) == whole[:5]
    second = module(later)
    second.load_state_dict(first.state_dict())
    rest = places(second, 4)
    if workers == later:
        assert rest == whole[5:]
        assert not caplog.text
    else:
        assert rest == [(0, 7), (1, 7), (2, 7), (0, 9)]  # no stream had come further than draw 5
        assert "with 2 loader workers each, and this run has 1 with 3" in caplog.text


def test_the_chunks_drawn_ahead_are_those_of_the_run_before(tmp_path: Path) -> None:
    replay = make(tmp_path, capacity=30)
    play(replay, 0, 20)
    before = ReplayDataModule(replay, 2, 5, seed=0)
    batches = iter(before.train_dataloader())
    next(batches)
    ahead = next(batches)  # as Lightning fetches it, while the first is learned from
    state = before.state_dict()
    play(replay, 0, 20, start=100)  # the episode that it was drawn from is evicted
    after = ReplayDataModule(replay, 2, 5, seed=0)
    after.load_state_dict(state)
    again = iter(after.train_dataloader())
    for expected in (ahead, next(batches), next(batches)):
        found = next(again)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
