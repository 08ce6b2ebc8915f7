"""Something-Something V2 in the layout that its owners hand out, in miniature."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from miniatures import CLASSES, scene, write_images, write_list, write_ssv2
from scenes import damage

from mapo_lightning.data.clips import ClipDataset
from mapo_lightning.data.scan import VideoIndex, scan_videos
from mapo_lightning.data.settings import VideoDataConfig
from mapo_lightning.data.video import resize
from mapo_lightning.semantics.phrase import Phrase
from mapo_lightning.semantics.settings import VlmConfig
from mapo_lightning.types import ConfigError, VideoError

WEBM = "20bn-something-something-v2"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos in the training list, two in the validation list."""
    return write_ssv2(tmp_path_factory.mktemp("pristine") / "ssv2")


@pytest.fixture
def ssv2(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "ssv2")


def scan(root: Path, **changes: object) -> VideoIndex:
    return scan_videos(VideoDataConfig(kind="ssv2", root=str(root), **changes), root.parent / "c")


def report(root: Path) -> dict[str, object]:
    return json.loads((root.parent / "c" / "report.json").read_text())


def ids(videos: list) -> list[str]:
    return [video.path.stem for video in videos]


@pytest.mark.slow
def test_the_official_lists_are_the_split_and_classes_are_kept(
    ssv2: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        index = scan(ssv2)
    assert ids(index.train) == ["101", "102", "103", "104"]
    assert ids(index.holdout) == ["105", "106"]
    assert [v.label for v in index.videos] == [*CLASSES, *CLASSES]
    assert all((v.frames, v.width, v.height, v.fps) == (30, 64, 48, 12.0) for v in index.videos)
    found = report(ssv2)
    assert found["classes"] == dict.fromkeys(sorted(CLASSES), 2)
    assert (found["listed"], found["missing"], found["unlisted"], found["frames"]) == (6, 0, 0, 180)
    assert "data=ssv2: 6 videos listed, 0 of them missing" in caplog.text


@pytest.mark.slow
def test_clips_are_squashed_and_carry_their_class_beside_them(ssv2: Path, tmp_path: Path) -> None:
    index, data = scan(ssv2), VideoDataConfig(kind="ssv2", root=str(ssv2))
    source = ClipDataset(index.train, data, VlmConfig(kind="none"), tmp_path)
    clip = source.clip_at(1, 3)
    wanted = resize(scene(1, 30)[3:28], (64, 64)).astype(int)
    assert np.abs(clip["obs"] - wanted).mean() < 5.0
    assert not any(array.dtype.kind in "US" for array in clip.values())
    assert source.videos[int(clip["video"])].label == CLASSES[1]
    assert {x.label for x in source.label_examples(4)} == set(CLASSES)


@pytest.mark.slow
def test_its_own_sentences_are_labels_without_a_model(ssv2: Path, tmp_path: Path) -> None:
    train = ssv2 / "labels" / "train.json"
    rows = json.loads(train.read_text())
    del rows[0]["placeholders"]
    rows[2]["placeholders"] = ["one", "too many"]
    rows[3]["placeholders"] = ["a [torn] cup"]
    train.write_text(json.dumps(rows))
    data = VideoDataConfig(kind="ssv2", root=str(ssv2))
    found = scan_videos(data, tmp_path / "c", "").train
    assert [video.captions[0].text for video in found] == [
        "Holding [something]",
        "Pushing [cup 1] from left to right",
        "Closing [something]",
        "Holding [a  torn  cup]",
    ]
    clips = ClipDataset(found, data, VlmConfig(kind="templates"), tmp_path)
    clip = clips.clip_at(1, 0)
    assert clip["has_semantic"].tolist() == [False] * 3 + [True] * 22
    (label,) = clips.labeler.label(clips.window_requests(1, [7]))
    assert label.phrase == Phrase("hand", "pushing", "cup 1", "right", "")
    assert label.text == "Pushing cup 1 from left to right [hand][pushing][cup 1][right][]"
    assert scan_videos(data, tmp_path / "c").train[1].captions[0].text == found[1].captions[0].text


@pytest.mark.slow
def test_both_lists_may_be_learned_from(ssv2: Path) -> None:
    index = scan(ssv2, official_split=False, holdout=0.0)
    assert (len(index.train), len(index.holdout)) == (6, 0)
    assert len(scan(ssv2, official_split=False, holdout=0.5).holdout) == 3


@pytest.mark.slow
def test_missing_unlisted_and_damaged_videos_are_reported(ssv2: Path) -> None:
    good = (ssv2 / WEBM / "101.webm").read_bytes()
    (ssv2 / WEBM / "102.webm").unlink()
    (ssv2 / WEBM / "103.webm").write_bytes(good[: len(good) // 3])
    damage(ssv2 / WEBM / "104.webm", good, 0.3, 0.6)
    (ssv2 / WEBM / "777.webm").write_bytes(good)
    (ssv2 / WEBM / "888.webm").write_bytes(good)
    write_list(ssv2 / "labels" / "test.json", [{"id": "888"}])
    index = scan(ssv2)
    assert ids(index.train) == ["101"]
    assert {path.stem for path, _ in index.quarantined} == {"103", "104"}
    found = report(ssv2)
    assert (found["present"], found["missing"], found["first_missing"]) == (5, 1, ["102"])
    assert found["first_unlisted"] == ["777"]
    assert sum(found["quarantined"].values()) == 2
    lines = (ssv2.parent / "c" / "quarantine.jsonl").read_text().splitlines()
    assert {Path(json.loads(line)["path"]).stem for line in lines} == {"103", "104"}


@pytest.mark.slow
def test_folders_of_frames_and_long_list_names_are_read_too(ssv2: Path) -> None:
    for split in ("train", "validation", "labels"):
        (ssv2 / "labels" / f"{split}.json").rename(ssv2 / f"something-something-v2-{split}.json")
    for number in (101, 105):
        (ssv2 / WEBM / f"{number}.webm").unlink()
        write_images(ssv2 / "frames" / str(number) / "%06d.jpg", scene(number - 101, 26))
    (ssv2 / "frames" / "105" / "000009.jpg").unlink()
    index = scan(ssv2)
    assert [v.frames for v in index.train] == [26, 30, 30, 30]
    assert [why for _, why in index.quarantined] == [
        "damaged: image 10 follows 8, the others are 1 apart: some are missing"
    ]


@pytest.mark.slow
def test_classes_and_a_limit_restrict(ssv2: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = scan(ssv2, classes=["holding something"])
    assert {v.label for v in index.videos} == {"Holding something"}
    assert report(ssv2)["left_out"] == 4
    assert ids(index.holdout) == []  # 101 and 104, both in the training list
    assert "nothing is held out" in caplog.text
    with pytest.raises(ConfigError, match=r"'Holding nothing', which is none of the 3.*'Holding"):
        scan(ssv2, classes=["Holding nothing"])
    small = scan(ssv2, limit=3)
    assert (len(small.train), len(small.holdout)) == (2, 1)
    assert scan(ssv2, limit=3) == small
    assert len({tuple(ids(scan(ssv2, limit=3, seed=seed).videos)) for seed in range(4)}) > 1


@pytest.mark.slow
def test_what_is_no_ssv2_gets_one_clear_sentence(ssv2: Path) -> None:
    labels, train = ssv2 / "labels" / "labels.json", ssv2 / "labels" / "train.json"
    rows = json.loads(train.read_text())

    def refused(pattern: str) -> None:
        with pytest.raises(VideoError, match=pattern):
            scan(ssv2)

    for content, pattern in (
        ("{not json", r"train\.json' cannot be read as JSON \(.*line 1"),
        ("{}", r"train\.json' must hold a JSON list, it holds dict"),
        ('[{"id": 1}]', r"must list objects with id and template, it holds .\"id\": 1"),
        (json.dumps([rows[0] | {"template": "Flying [something]"}]), "'Flying something', which l"),
        (json.dumps([rows[0] | {"id": "5"}]), r"all 2 usable videos belong to the validation list"),
    ):
        train.write_text(content)
        refused(pattern)
    train.write_bytes(b"\xff\xfe[]")
    refused("cannot be read as JSON")
    train.write_text(json.dumps(rows))
    shutil.move(ssv2 / WEBM, ssv2.parent / "elsewhere")
    refused(r"none of the 6 videos that the lists .* expected files like \d+\.webm")
    labels.unlink()
    refused(r"is not Something-Something V2: there is no labels\.json")
