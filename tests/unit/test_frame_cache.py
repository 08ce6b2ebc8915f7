"""Frames that are kept in memory are those that the reader gives, of all videos or of none."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scenes import damage, write_squares

from mapo_lightning.data import frame_cache
from mapo_lightning.data.clips import ClipDataset
from mapo_lightning.data.frame_cache import MemoryCache
from mapo_lightning.data.reader import read, thin_out
from mapo_lightning.data.settings import VideoDataConfig
from mapo_lightning.data.video import probe_video
from mapo_lightning.data.video_info import VideoFileError, VideoInfo
from mapo_lightning.semantics.settings import VlmConfig
from mapo_lightning.types import ConfigError, Frames

SIZE = (32, 32)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[VideoInfo]:
    """A film as it is, one at half the rate, and the middle square of a third."""
    found = write_squares(tmp_path_factory.mktemp("videos"), size=(64, 96))
    return [found[0], thin_out(found[1], 10.0, False), thin_out(found[2], None, True)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[int]]]:
    """What the reader is asked for: fingerprint and frames."""
    found: list[tuple[str, list[int]]] = []

    def watched(
        info: VideoInfo, indices: Sequence[int], size: tuple[int, int], beside: int | None
    ) -> Frames:
        found.append((info.fingerprint, list(indices)))
        return read(info, indices, size, beside)

    monkeypatch.setattr(frame_cache, "read", watched)
    return found


def test_a_video_is_decoded_in_pieces_which_make_no_difference(
    videos: list[VideoInfo], asked: list[tuple[str, list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_cache, "_AT_ONCE", 7)
    for info in videos:
        asked.clear()
        whole = frame_cache.read_all(info, SIZE, 48)
        np.testing.assert_array_equal(whole, read(info, range(info.frames), SIZE, 48))
        assert [frame for _, piece in asked for frame in piece] == [*range(info.frames)]
        assert max(len(piece) for _, piece in asked) == 7


@pytest.mark.parametrize("megabytes", [0, 1])
def test_frames_are_those_of_the_reader(videos: list[VideoInfo], megabytes: int) -> None:
    cache = MemoryCache(videos, SIZE, megabytes)
    assert cache.keeps is bool(megabytes)
    for _ in range(2):
        for info in videos:
            for indices in ([0], list(range(3, 12)), [7, 2, 2, info.frames - 1]):
                found = cache.read(info, indices)
                np.testing.assert_array_equal(found, read(info, indices, SIZE))
                assert (found.dtype, found.shape) == (np.uint8, (len(indices), *SIZE, 3))
                found[:] = 0  # what was given belongs to whoever asked


def test_every_video_is_decoded_once_where_all_fit(
    videos: list[VideoInfo], asked: list[tuple[str, list[int]]]
) -> None:
    cache = MemoryCache(videos, SIZE, 1)
    for start in (5, 0):
        for info in videos:
            cache.read(info, range(start, start + 9))
    assert asked == [(info.fingerprint, list(range(info.frames))) for info in videos]


def test_a_set_that_does_not_fit_is_not_kept_in_part(
    videos: list[VideoInfo], asked: list[tuple[str, list[int]]]
) -> None:
    cache = MemoryCache(videos, (80, 80), 1)  # 1.9 MB in all; the first film alone takes 0.8
    for _ in range(2):
        cache.read(videos[0], [4, 5])
    assert asked == [(videos[0].fingerprint, [4, 5])] * 2


def test_the_room_is_counted_to_the_byte(videos: list[VideoInfo]) -> None:
    fits, exceeds = (videos[0]._replace(frames=n) for n in (1_000_000 // 3, 1_000_000 // 3 + 1))
    assert MemoryCache([fits], (1, 1), 1).keeps
    assert not MemoryCache([exceeds], (1, 1), 1).keeps
    assert not MemoryCache([fits, videos[0]], (1, 1), 1).keeps


def dataset(videos: list[VideoInfo], root: Path, cache_mb: int = 256) -> ClipDataset:
    data = VideoDataConfig(clip_length=9, workers=0, image_size=32, cache_mb=cache_mb)
    return ClipDataset(videos, data, VlmConfig(kind="none"), root)


def test_clips_are_the_same_with_and_without_it(videos: list[VideoInfo], tmp_path: Path) -> None:
    kept, fresh = (dataset(videos, tmp_path, megabytes) for megabytes in (256, 0))
    for _ in range(2):
        for video, start in ((0, 0), (1, 11), (2, 31)):
            one, other = kept.clip_at(video, start), fresh.clip_at(video, start)
            np.testing.assert_array_equal(one["obs"], other["obs"])
    assert (kept.cache.keeps, fresh.cache.keeps) == (True, False)
    assert isinstance(kept.cache, MemoryCache)
    assert kept.cache.size == SIZE


def test_a_worker_begins_with_an_empty_one(
    videos: list[VideoInfo], tmp_path: Path, asked: list[tuple[str, list[int]]]
) -> None:
    source = dataset(videos, tmp_path)
    bare = len(pickle.dumps(source))
    clip = source.clip_at(0, 3)
    assert len(pickle.dumps(source)) == bare
    copy = pickle.loads(pickle.dumps(source))
    assert copy.cache is not source.cache
    np.testing.assert_array_equal(copy.clip_at(0, 3)["obs"], clip["obs"])
    assert len(asked) == 2  # the copy had to decode anew
    source.clip_at(0, 8)
    assert len(asked) == 2  # the source still has its own


@pytest.mark.parametrize("cache_mb", [0, 256])
def test_a_video_that_can_no_longer_be_read_is_an_error_until_it_is_back(
    cache_mb: int, videos: list[VideoInfo], tmp_path: Path
) -> None:
    whole, path = videos[0].path.read_bytes(), tmp_path / "film.mp4"
    path.write_bytes(whole)
    source = dataset([probe_video(path)], tmp_path, cache_mb)
    path.unlink()
    with pytest.raises(VideoFileError, match="there is no such file") as missing:
        source.clip_at(0, 3)
    assert missing.value.reason == "missing"
    damage(path, whole, 0.0, 1.0)
    with pytest.raises(VideoFileError):
        source.clip_at(0, 3)
    path.write_bytes(whole)
    np.testing.assert_array_equal(source.clip_at(0, 3)["obs"], read(videos[0], range(3, 12), SIZE))


def test_the_setting_must_not_be_negative() -> None:
    with pytest.raises(ConfigError, match="cache_mb must not be negative, got -1"):
        VideoDataConfig(cache_mb=-1)
