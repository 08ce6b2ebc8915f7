"""Human3.6M as videos and as prepared frames, in miniature."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from miniatures import write_images
from scenes import numbered

from mapo_lightning.data.clips import ClipDataset
from mapo_lightning.data.reader import read
from mapo_lightning.data.scan import VideoIndex, scan_videos
from mapo_lightning.data.settings import VideoDataConfig
from mapo_lightning.data.video import write_mp4
from mapo_lightning.semantics.settings import VlmConfig
from mapo_lightning.types import VideoError


def scan(root: Path, **changes: object) -> VideoIndex:
    changes = {"clip_length": 5, "rate": 10.0, "square": True} | changes
    data = VideoDataConfig(kind="human36m", root=str(root), **changes)
    return scan_videos(data, root.parent / "cache")


def brightness(frames: np.ndarray) -> list[int]:
    return [round((float(frame.mean()) - 4) / 4) for frame in frames]


@pytest.fixture
def human(tmp_path: Path) -> Path:
    """Every layout once: two kinds of videos, two kinds of frames, and what is none of it."""
    root = tmp_path / "human"
    film = np.zeros((40, 48, 80, 3), np.uint8)
    film[:, :, 16:64] = numbered(40, 48)
    write_mp4(root / "S1" / "Videos" / "TakingPhoto 1.54138969.mp4", film, 50)
    write_mp4(root / "S9_WalkTogether.60457274.mp4", film, 50)
    write_images(root / "S5_Eating_2.55011271_%06d.jpg", numbered(9), 1, 5)
    write_images(root / "S11" / "WalkDog_1.58860488" / "%06d.png", numbered(30), 1, 1)
    write_mp4(root / "S1" / "Videos" / "_ALL 1.54138969.mp4", film, 50)
    (root / "S1" / "notes.txt").write_text("not asked")
    return root


@pytest.mark.slow
def test_every_layout_is_read_at_ten_frames_a_second(human: Path) -> None:
    index = scan(human)
    found = {v.path.name: (v.label, v.frames, v.fps) for v in index.videos}
    assert found == {
        "TakingPhoto 1.54138969.mp4": ("Photo", 8, 10.0),
        "S9_WalkTogether.60457274.mp4": ("WalkTogether", 8, 10.0),
        "S5_Eating_2.55011271_%06d.jpg": ("Eating", 9, 10.0),
        "%06d.png": ("WalkDog", 6, 10.0),
    }
    films = {v.path.suffix: v for v in index.videos}
    assert brightness(read(films[".mp4"], [0, 1, 7], (16, 16))) == [0, 5, 35]
    assert brightness(read(films[".jpg"], [0, 1, 8], (16, 16))) == [0, 1, 8]
    assert brightness(read(films[".png"], [0, 1, 5], (16, 16))) == [0, 5, 25]


def test_subjects_are_split_as_published(human: Path) -> None:
    index = scan(human)
    assert {v.label for v in index.train} == {"Photo", "Eating"}
    assert {v.label for v in index.holdout} == {"WalkTogether", "WalkDog"}
    report = json.loads((human.parent / "cache" / "report.json").read_text())
    assert report["first_unlisted"] == ["S1/Videos/_ALL 1.54138969.mp4"]
    assert report["classes"] == {"Eating": 1, "Photo": 1, "WalkDog": 1, "WalkTogether": 1}


def test_a_subject_folder_is_a_data_set_too(human: Path) -> None:
    assert [v.label for v in scan(human / "S1").videos] == ["Photo"]
    assert [v.label for v in scan(human, classes=["eating"]).videos] == ["Eating"]


@pytest.mark.slow
def test_only_the_middle_square_counts(human: Path) -> None:
    video = next(v for v in scan(human).videos if v.label == "WalkTogether")
    frame = read(video, [7], 48)[0].astype(int)
    assert frame.shape == (48, 48, 3)
    assert np.abs(frame - (4 * 35 + 4)).mean() < 6  # the black sides of the picture are gone
    whole = next(v for v in scan(human, square=False).videos if v.label == "WalkTogether")
    assert read(whole, [7], (48, 48))[0, :, :8].mean() < 20
    assert whole.fingerprint != video.fingerprint


@pytest.mark.slow
def test_a_run_with_a_hole_is_set_aside(human: Path) -> None:
    (human / "S5_Eating_2.55011271_000021.jpg").unlink()
    index = scan(human)
    assert [why for _, why in index.quarantined] == [
        "damaged: image 26 follows 16, the others are 5 apart: some are missing"
    ]


def test_what_is_no_human36m_gets_one_clear_sentence(tmp_path: Path) -> None:
    root = tmp_path / "h"
    write_mp4(root / "S1_Flying.54138969.mp4", numbered(30), 50)
    write_images(root / "S1" / "Videos" / "%06d.jpg", numbered(3))
    with pytest.raises(VideoError, match=r"is not Human3\.6M: no file in it or its folders"):
        scan(root)


@pytest.mark.slow
def test_labels_name_the_frames_that_the_file_has(human: Path, tmp_path: Path) -> None:
    """A page of labels reads the file by these numbers, and knows nothing of thinning out."""
    data = VideoDataConfig(kind="human36m", clip_length=5)
    source = ClipDataset(scan(human).train, data, VlmConfig(), tmp_path)
    names = [
        source.window_requests(number, [3])[0].source.removeprefix(f"{video.path.name} ")
        for number, video in enumerate(source.videos)
    ]
    assert sorted(names) == ["frames 0..15 step 5", "frames 1..16 step 5"]
