from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from scenes import numbered, write_squares
from torch.utils.data import DataLoader

from mapo_lightning.data.clips import Clip, ClipDataset, Streams
from mapo_lightning.data.settings import VideoDataConfig
from mapo_lightning.data.video import VideoInfo, probe_video, write_mp4
from mapo_lightning.semantics.settings import VlmConfig, WindowConfig
from mapo_lightning.semantics.store import LabelStore
from mapo_lightning.types import VideoError


def frame_numbers(clip: Clip) -> list[int]:
    """Read the frame numbers back from the brightness of `numbered` frames."""
    return [round((float(frame.mean()) - 4) / 4) for frame in clip["obs"]]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[VideoInfo]:
    """Three films in which a square moves: right, then down, then left."""
    return write_squares(tmp_path_factory.mktemp("videos"), background="flat")


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> VideoInfo:
    path = tmp_path_factory.mktemp("counter") / "n.mp4"
    write_mp4(path, numbered(60), 20)
    return probe_video(path)


def dataset(videos: list[VideoInfo], root: Path, **changes: object) -> ClipDataset:
    data = VideoDataConfig(clip_length=9, workers=0)
    return ClipDataset(videos, data, VlmConfig(), root, **changes)


def test_clip_content(videos: list[VideoInfo], tmp_path: Path) -> None:
    source = dataset(videos, tmp_path)
    clip = source.clip_at(0, 12)
    shapes = {name: (array.shape, array.dtype.name) for name, array in clip.items()}
    scalar = ((), "int64")
    assert shapes == {
        "obs": ((9, 64, 64, 3), "uint8"),
        "semantic": ((9, source.semantic_dim), "float32"),
        "has_semantic": ((9,), "bool"),
        "position": ((9,), "int64"),
        "is_first": ((9,), "bool"),
        "video": scalar,
        "vlm_windows": scalar,
        "vlm_asked": scalar,
        "vlm_hits": scalar,
        "vlm_null": scalar,
        "vlm_rejected": scalar,
        "vlm_corrected": scalar,
        "vlm_unanswered": scalar,
    }
    assert clip["position"].tolist() == list(range(9))
    assert clip["is_first"].tolist() == [True] + [False] * 8
    assert clip["has_semantic"].tolist() == [False] + [True] * 8
    assert not clip["semantic"][0].any()
    assert clip["vlm_windows"] == clip["vlm_asked"] == 3  # windows 8..11, 12..15 and 16..19


@pytest.mark.slow
def test_labels_name_what_moves(videos: list[VideoInfo], tmp_path: Path) -> None:
    source = dataset(videos, tmp_path)
    for video, way in enumerate(("right", "down", "left")):
        source.clip_at(video, 10)
        phrases = [x.phrase for x in source.label_examples(30) if x.video == f"{video}.mp4"]
        assert len(phrases) == 10 or len(phrases) == 9
        assert {phrase.direction for phrase in phrases if phrase} == {way}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("offset", [0, 1])
def test_window_grid(counter: VideoInfo, tmp_path: Path, stride: int, offset: int) -> None:
    """The newest complete window that ends in time, and nothing before the first."""
    data = VideoDataConfig(clip_length=9, frame_stride=stride)
    source = ClipDataset([counter], data, VlmConfig(window=WindowConfig(offset=offset)), tmp_path)
    for start in (0, 1, 5):
        clip = source.clip_at(0, start)
        assert frame_numbers(clip) == [start + t * stride for t in range(9)]
        ends = {source.grid.end_for(start + t * stride) for t in range(1, 9)} - {None}
        assert clip["vlm_windows"] == len(ends)
        for t in range(1, 9):
            frame, end = start + t * stride, source.grid.end_for(start + t * stride)
            possible = [
                e for e in range(3 * stride, 60, 4 * stride) if e + offset * stride <= frame
            ]
            assert end == (possible[-1] if possible else None)


def test_frames_before_the_first_window_are_unknown(
    videos: list[VideoInfo], tmp_path: Path
) -> None:
    clip = dataset(videos, tmp_path).clip_at(0, 0)
    assert clip["has_semantic"].tolist() == [False] * 3 + [True] * 6
    np.testing.assert_array_equal(clip["semantic"][3], clip["semantic"][6])  # held forward


def test_overlapping_clips_share_windows(videos: list[VideoInfo], tmp_path: Path) -> None:
    source = dataset(videos, tmp_path)
    source.clip_at(0, 12)
    clip = source.clip_at(0, 13)
    assert (clip["vlm_asked"], clip["vlm_hits"], clip["vlm_windows"]) == (0, 3, 3)


@pytest.mark.slow
def test_drawing_is_seeded_and_differs_by_rank(videos: list[VideoInfo], tmp_path: Path) -> None:
    def first(**changes: int) -> list[bytes]:
        clips = iter(dataset(videos, tmp_path, **changes))
        return [next(clips)["obs"].tobytes() for _ in range(5)]

    assert first() == first()
    assert first() != first(seed=1)
    assert first(rank=0, world=2) != first(rank=1, world=2)


@pytest.mark.slow
def test_all_videos_and_starts_are_drawn(counter: VideoInfo, tmp_path: Path) -> None:
    data = VideoDataConfig(clip_length=25)
    clips = iter(ClipDataset([counter], data, VlmConfig(kind="none"), tmp_path))
    starts = {frame_numbers(next(clips))[0] for _ in range(200)}
    assert {0, 35} <= starts
    assert max(starts) <= 35
    assert len(starts) > 30


def test_fixed_clips_are_fixed_and_spread(videos: list[VideoInfo], tmp_path: Path) -> None:
    source = dataset(videos, tmp_path)
    first, second = source.fixed_clips(7), source.fixed_clips(7)
    assert [a["obs"].tobytes() for a in first] == [b["obs"].tobytes() for b in second]
    assert len({a["obs"].tobytes() for a in first}) == 7


def test_examples_carry_what_was_seen(videos: list[VideoInfo], tmp_path: Path) -> None:
    (example,) = dataset(videos, tmp_path).label_examples(1)
    assert example.frames.shape == (4, 128, 170, 3)
    assert example.start % 4 == 0
    assert example.text.startswith("[")


def test_kind_none_gives_no_semantics(videos: list[VideoInfo], tmp_path: Path) -> None:
    data = VideoDataConfig(clip_length=9)
    clip = ClipDataset(videos, data, VlmConfig(kind="none"), tmp_path).clip_at(0, 5)
    assert not clip["has_semantic"].any()
    assert (clip["vlm_asked"], clip["vlm_null"]) == (0, clip["vlm_windows"])
    assert not (tmp_path / "labels").exists()


def read(source: ClipDataset, batches: int, context: str) -> dict[str, torch.Tensor]:
    loader = DataLoader(source, batch_size=4, num_workers=2, multiprocessing_context=context)
    total: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(loader):
        for name in ("vlm_asked", "vlm_hits", "vlm_windows"):
            total[name] = total.get(name, torch.zeros(())) + batch[name].sum()
        if number + 1 == batches:
            assert batch["obs"].shape == (4, 9, 64, 64, 3)
            assert batch["has_semantic"].dtype == torch.bool
            break
    return total


@pytest.mark.slow
def test_two_workers_ask_each_window_once_and_a_second_pass_nothing(
    videos: list[VideoInfo], tmp_path: Path
) -> None:
    first = read(dataset(videos, tmp_path), 25, "fork")
    stored = len(LabelStore(tmp_path / "labels", "reader").items())
    # Prefetched clips past the last batch may have been asked about, never one twice.
    assert first["vlm_asked"] <= stored <= 30
    assert first["vlm_asked"] + first["vlm_hits"] == first["vlm_windows"]
    source = dataset(videos, tmp_path)
    for video in range(3):
        for start in range(32):
            source.clip_at(video, start)  # fill in what chance left out
    assert len(source.labeler.store.items()) == 30 == stored + source.labeler.stats.asked
    second = read(dataset(videos, tmp_path), 25, "fork")
    assert second["vlm_asked"] == 0
    assert second["vlm_hits"] == first["vlm_windows"]


@pytest.mark.slow
def test_spawned_workers(videos: list[VideoInfo], tmp_path: Path) -> None:
    assert read(dataset(videos, tmp_path), 2, "spawn")["vlm_asked"] > 0


def test_dataset_pickles_without_open_files(videos: list[VideoInfo], tmp_path: Path) -> None:
    source = dataset(videos, tmp_path)
    source.clip_at(0, 12)
    assert pickle.loads(pickle.dumps(source)).clip_at(0, 12)["vlm_asked"] == 0


def test_failing_video_is_dropped_counted_and_written_down(
    videos: list[VideoInfo], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone = videos[0]._replace(path=tmp_path / "gone.mp4")
    source = dataset([gone, *videos[1:]], tmp_path, quarantine=tmp_path / "quarantine.jsonl")
    clips = iter(source)
    dropped = [int(next(clips)["videos_dropped"]) for _ in range(20)]
    assert dropped[-1] == 1
    assert "dropped from train: cannot use video" in caplog.text
    (row,) = map(json.loads, (tmp_path / "quarantine.jsonl").read_text().splitlines())
    assert row["reason"] == "missing"


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_a_stream_goes_on_behind_any_of_its_clips(
    broken: bool, videos: list[VideoInfo], tmp_path: Path
) -> None:
    if broken:
        videos = [videos[0]._replace(path=tmp_path / "gone.mp4"), *videos[1:]]
    clips = iter(dataset(videos, tmp_path, quarantine=tmp_path / "quarantine.jsonl"))
    whole = [next(clips) for _ in range(12)]
    assert whole[-1]["place"].dropped == ((0,) if broken else ())
    reported = (tmp_path / "quarantine.jsonl").read_text() if broken else ""
    again = dataset(videos, tmp_path, quarantine=tmp_path / "quarantine.jsonl")
    again.streams = Streams(places=(whole[6]["place"],))
    rest = iter(again)
    for expected in whole[7:]:
        clip = next(rest)
        assert clip["place"] == expected["place"]
        assert clip["videos_dropped"] == expected["videos_dropped"]
        np.testing.assert_array_equal(clip["obs"], expected["obs"])
    if broken:  # and is not written down a second time
        assert (tmp_path / "quarantine.jsonl").read_text() == reported


def test_all_videos_failing_is_an_error(videos: list[VideoInfo], tmp_path: Path) -> None:
    gone = [video._replace(path=tmp_path / video.path.name) for video in videos]
    with pytest.raises(VideoError, match="all 3 train videos failed"):
        next(iter(dataset(gone, tmp_path)))


def test_no_videos_and_wrong_rank(videos: list[VideoInfo], tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="no videos to draw train clips from"):
        dataset([], tmp_path)
    with pytest.raises(ValueError, match=r"rank must lie in \[0, 2\), got 2"):
        dataset(videos, tmp_path, rank=2, world=2)
