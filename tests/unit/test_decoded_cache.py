"""Each frame is decoded once: within a cold clip, and with cache=decoded for all runs."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from scenes import write_squares

from mapo_lightning.data import decoded_cache, video
from mapo_lightning.data.clips import ClipDataset
from mapo_lightning.data.decoded_cache import FOLDER, DecodedCache
from mapo_lightning.data.random_access import open_decord
from mapo_lightning.data.reader import read
from mapo_lightning.data.settings import VideoDataConfig
from mapo_lightning.data.video_info import VideoInfo
from mapo_lightning.semantics.settings import VlmConfig, WindowConfig
from mapo_lightning.types import ConfigError

SIZE = (32, 32)
CLIP = 25


class Decoded(NamedTuple):
    """What decord was made to do."""

    opened: list[Path]
    frames: list[int]


class Counting:
    """A real decoder that counts the frames that it hands out."""

    def __init__(self, reader: Any, frames: list[int]) -> None:
        self.reader, self.frames = reader, frames

    def __len__(self) -> int:
        return len(self.reader)

    def get_batch(self, indices: Sequence[int]) -> Any:
        self.frames += indices
        return self.reader.get_batch(indices)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[VideoInfo]:
    """Films so large that clips and windows would be decoded at sizes of their own."""
    written = write_squares(tmp_path_factory.mktemp("videos"), size=(192, 320))
    found = [video.check_video(info, 0.1) for info in written]
    assert all(info.access is not None and info.access.decoder == "decord" for info in found)
    return found


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Decoded:
    found = Decoded([], [])

    def opening(path: Path, size: tuple[int, int] | None) -> Counting:
        found.opened.append(path)
        return Counting(open_decord(path, size), found.frames)

    monkeypatch.setattr(video, "open_decord", opening)
    return found


def dataset(
    videos: list[VideoInfo], root: Path, kind: str = "flow", cache: str = "memory"
) -> ClipDataset:
    data = VideoDataConfig(clip_length=CLIP, workers=0, image_size=32, cache_mb=0, cache=cache)  # type: ignore[arg-type]
    vlm = VlmConfig(kind=kind, window=WindowConfig(size=96))  # type: ignore[arg-type]
    return ClipDataset(videos, data, vlm, root)


@pytest.mark.parametrize("defer", [False, True])
def test_a_cold_clip_decodes_each_frame_once_and_opens_its_file_once(
    defer: bool, videos: list[VideoInfo], tmp_path: Path, decoded: Decoded
) -> None:
    source, start = dataset(videos, tmp_path), 7
    cold = source.clip_at(0, start, defer)
    assert decoded.opened == [videos[0].path]
    # The windows that end at 7, 11 ... 31, and the clip: 28 + 25 frames, of which 25 are shared.
    assert decoded.frames == list(range(4, start + CLIP))
    if defer:
        assert len(cold["pending"]) == 7
        return
    decoded.frames.clear()
    warm = source.clip_at(0, start)
    assert decoded.frames == list(range(start, start + CLIP))
    assert warm["vlm_hits"] == 7
    np.testing.assert_array_equal(cold["obs"], warm["obs"])
    # Nor does a clip without labels show anything else: methods differ in phrases only.
    silent = dataset(videos, tmp_path, "none").clip_at(0, start)
    np.testing.assert_array_equal(cold["obs"], silent["obs"])


def test_windows_that_are_decoded_with_a_clip_are_the_same(
    videos: list[VideoInfo], tmp_path: Path
) -> None:
    source = dataset(videos, tmp_path)
    along = source._windows(1, [11, 15], range(9, 34))
    alone = source._windows(1, [11, 15])
    for one, other in zip(along.requests(), alone.requests(), strict=True):
        np.testing.assert_array_equal(one.frames(), other.frames())
    assert along.along is not None
    assert alone.along is None
    np.testing.assert_array_equal(along.along, read(videos[1], range(9, 34), SIZE, beside=96))


def test_decoded_frames_are_made_once_and_are_those_of_the_reader(
    videos: list[VideoInfo], tmp_path: Path, decoded: Decoded
) -> None:
    source = dataset(videos, tmp_path, "none", "decoded")
    plain = dataset(videos, tmp_path, "none")
    for start in (3, 11):
        one, other = source.clip_at(0, start), plain.clip_at(0, start)
        np.testing.assert_array_equal(one["obs"], other["obs"])
    assert len(decoded.opened) == 3  # one for the cache, two for the clips without
    assert isinstance(source.cache, DecodedCache)
    assert source.cache.path(videos[0]).parent.parent == tmp_path / FOLDER
    decoded.opened.clear()
    other = dataset(videos, tmp_path, "none", "decoded")  # another worker, rank or run
    clip = other.clip_at(0, 5)["obs"]
    assert decoded.opened == []
    clip[:] = 0  # what was given belongs to whoever asked
    assert other.clip_at(0, 5)["obs"].any()


def test_a_file_is_digested_once_by_a_process_and_again_when_it_changed(
    videos: list[VideoInfo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoded_cache, "_OPEN", 1)  # every other video closes the one before
    DecodedCache(tmp_path, SIZE).read(videos[0], [0])
    digested: list[int] = []
    digest = decoded_cache._digest

    def counting(frames: Any) -> bytes:
        digested.append(len(frames))
        return digest(frames)

    monkeypatch.setattr(decoded_cache, "_digest", counting)
    cache = DecodedCache(tmp_path, SIZE)
    cache.read(videos[1], [0])  # made: digested as it is written and as it is read back
    assert len(digested) == 2
    for number in (0, 1, 0, 1):
        cache.read(videos[number], [0])
    assert len(digested) == 3
    path = cache.path(videos[0])
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # damaged after this process has seen it whole
    path.write_bytes(content)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    whole = cache.read(videos[0], range(videos[0].frames))
    np.testing.assert_array_equal(whole, read(videos[0], range(videos[0].frames), SIZE))
    assert len(digested) == 6  # found to be wrong, made again, read back


def test_the_name_holds_what_frames_depend_on(
    videos: list[VideoInfo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = DecodedCache(tmp_path, SIZE, 96).path(videos[0])
    others = {
        DecodedCache(tmp_path, SIZE, 96).path(videos[1]),
        DecodedCache(tmp_path, (32, 33), 96).path(videos[0]),
        DecodedCache(tmp_path, SIZE, 128).path(videos[0]),
        DecodedCache(tmp_path, SIZE, 96).path(videos[0]._replace(fingerprint="x")),
    }
    monkeypatch.setattr(decoded_cache, "DECODERS", "decord 9")
    others.add(DecodedCache(tmp_path, SIZE, 96).path(videos[0]))
    assert len(others) == 5
    assert usual not in others


@pytest.mark.parametrize("damage", ["cut", "bit", "head", "empty"])
def test_a_damaged_file_is_found_and_made_again(
    damage: str, videos: list[VideoInfo], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = DecodedCache(tmp_path, SIZE, 96)
    truth = cache.read(videos[0], range(9))
    path = cache.path(videos[0])
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[-5] ^= 1
    if damage == "head":
        content[40] ^= 1
    kept = {"cut": len(content) - 1, "empty": 0}.get(damage, len(content))
    path.write_bytes(content[:kept])
    again = DecodedCache(tmp_path, SIZE, 96)
    np.testing.assert_array_equal(again.read(videos[0], range(9)), truth)
    assert "is damaged" in caplog.text
    assert "is made again" in caplog.text
    caplog.clear()
    DecodedCache(tmp_path, SIZE, 96).read(videos[0], range(9))
    assert not caplog.text
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # and no draft is left


def test_it_says_its_size_before_and_does_not_fill_a_disk(
    videos: list[VideoInfo],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    cache = DecodedCache(tmp_path, SIZE, 96)
    whole = sum(64 + info.frames * 32 * 32 * 3 for info in videos)
    assert cache.bytes_missing(videos) == (whole, whole)
    cache.check_room(videos)
    assert f"decoded frames take {whole / 1e9:.2f} GB at '{tmp_path}'" in caplog.text
    cache.read(videos[0], [0])
    missing = whole - 64 - videos[0].frames * 32 * 32 * 3
    assert cache.bytes_missing(videos) == (whole, missing)
    assert cache.path(videos[0]).stat().st_size == whole - missing

    def disk(free: int) -> None:
        usage = shutil._ntuple_diskusage(100 * whole, 0, free)  # type: ignore[attr-defined]
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)

    disk(missing + 5 * whole)
    cache.check_room(videos)
    disk(missing + 5 * whole - 1)
    with pytest.raises(ConfigError, match=r"data.cache=decoded needs .* GB more for 3 videos"):
        cache.check_room(videos)


def test_a_folder_that_cannot_be_written_ends_the_run(
    videos: list[VideoInfo], tmp_path: Path
) -> None:
    (tmp_path / FOLDER).write_text("no folder")
    with pytest.raises(ConfigError, match=r"cannot write .* take data.cache=memory"):
        DecodedCache(tmp_path / FOLDER, SIZE).read(videos[0], [0])


def _reading(folder: Path, videos: list[VideoInfo], turn: int) -> bytes:
    cache = DecodedCache(folder, SIZE, 96)
    order = videos[turn % len(videos) :] + videos[: turn % len(videos)]
    found = {info.fingerprint: cache.read(info, range(info.frames)) for info in order}
    return b"".join(found[info.fingerprint].tobytes() for info in videos)


@pytest.mark.slow
def test_processes_that_make_the_same_files_at_once_all_read_the_same(
    videos: list[VideoInfo], tmp_path: Path
) -> None:
    with get_context("fork").Pool(4) as pool:
        jobs = [pool.apply_async(_reading, (tmp_path, videos, turn)) for turn in (0, 0, 0, 1)]
        found = {job.get(timeout=300) for job in jobs}
    truth = b"".join(read(info, range(info.frames), SIZE, 96).tobytes() for info in videos)
    assert found == {truth}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == len(videos)
