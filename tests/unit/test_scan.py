from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from miniatures import write_images
from scenes import damage, numbered, write_sound

from mapo_lightning.data import scan as windows
from mapo_lightning.data.examiner import Examiner, Facts, examine
from mapo_lightning.data.reader import FrameSource, locate, name_window, read
from mapo_lightning.data.scan import scan_videos
from mapo_lightning.data.scan_cache import ScanCache
from mapo_lightning.data.settings import LimitsConfig, VideoDataConfig
from mapo_lightning.data.video import write_mp4
from mapo_lightning.data.video_info import fingerprint
from mapo_lightning.types import ConfigError, VideoError


def film(path: Path, seed: int, frames: int = 30) -> bytes:
    rng = np.random.default_rng(seed)
    return write_mp4(path, rng.integers(0, 255, (frames, 32, 32, 3)).astype(np.uint8), 20)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Six good videos in subfolders, and one of every kind of bad one."""
    root = tmp_path / "videos"
    for number in range(6):
        good = film(root / f"c{number % 2}" / f"good{number}.mp4", number)
    damage(root / "damaged.mp4", good, 0.4, 0.8)
    (root / "cut.mp4").write_bytes(good[: len(good) // 2])
    (root / "empty.mkv").write_bytes(b"")
    (root / "text.webm").write_text("no video")
    write_sound(root / "sound.mp4")
    film(root / "short.AVI", 9, frames=10)
    outside = tmp_path / "outside.mp4"
    outside.write_bytes(good)
    (root / "link.mp4").symlink_to(outside)
    (root / "notes.txt").write_text("not asked")
    (root / ".hidden.mp4").write_text("not asked")
    return root


def config(root: Path, **changes: object) -> VideoDataConfig:
    return VideoDataConfig(kind="folder", root=str(root), **changes)


@pytest.mark.slow
def test_good_ones_are_found_and_bad_ones_named(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        index = scan_videos(config(corpus), tmp_path / "cache")
    assert [v.path.name for v in index.videos] == [
        *(f"good{n}.mp4" for n in (0, 2, 4)),
        *(f"good{n}.mp4" for n in (1, 3, 5)),
    ]
    found = {path.name: why.split(":")[0] for path, why in index.quarantined}
    assert found.pop("cut.mp4") in {"unreadable", "codec", "damaged"}
    assert found == {
        "damaged.mp4": "damaged",
        "empty.mkv": "empty",
        "text.webm": "unreadable",
        "sound.mp4": "no_video",
        "short.AVI": "too_short",
        "link.mp4": "outside",
    }
    assert "7 of 13 videos are quarantined" in caplog.text
    lines = (tmp_path / "cache" / "quarantine.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [Path(row["path"]).name for row in rows] == [p.name for p, _ in index.quarantined]
    assert all(row["reason"] and row["detail"] for row in rows)


@pytest.mark.slow
def test_second_scan_decodes_nothing_and_agrees(corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = scan_videos(config(corpus), cache)
    remembered = json.loads((cache / "videos.json").read_text())
    name = first.videos[0].fingerprint
    remembered["videos"][name]["frames"] = 12345  # only a scan that trusts the cache sees this
    (cache / "videos.json").write_text(json.dumps(remembered))
    second = scan_videos(config(corpus), cache)
    assert second.videos[0].frames == 12345
    assert second.videos[1:] == first.videos[1:]
    assert second.quarantined == first.quarantined


def test_moved_file_keeps_its_result_and_changed_file_does_not(tmp_path: Path) -> None:
    root, cache = tmp_path / "v", tmp_path / "cache"
    film(root / "a.mp4", 0)
    scan_videos(config(root), cache)
    (root / "a.mp4").rename(root / "b.mp4")
    assert scan_videos(config(root), cache).videos[0].path.name == "b.mp4"
    film(root / "b.mp4", 1, frames=26)
    assert scan_videos(config(root), cache).videos[0].frames == 26


def test_a_file_whose_size_and_date_are_known_is_not_read_again(tmp_path: Path) -> None:
    root, cache = tmp_path / "v", tmp_path / "cache"
    content = film(root / "a.mp4", 0)
    first = scan_videos(config(root), cache)
    date = (root / "a.mp4").stat().st_mtime_ns
    (root / "a.mp4").write_bytes(bytes(len(content)))
    os.utime(root / "a.mp4", ns=(date, date))
    assert scan_videos(config(root), cache) == first  # only a scan that trusts the date passes
    os.utime(root / "a.mp4", ns=(date, date + 1))
    with pytest.raises(VideoError, match="1 unreadable"):
        scan_videos(config(root), cache)


@pytest.mark.slow
def test_an_interrupted_scan_keeps_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        film(tmp_path / "v" / f"{number}.mp4", number)
    unharmed, seen = Examiner.examine, []

    def stop_at_the_third(self: Examiner, source: FrameSource) -> Facts:
        seen.append(source.path.name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return unharmed(self, source)

    monkeypatch.setattr(windows, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(Examiner, "examine", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        scan_videos(config(tmp_path / "v", workers=1), tmp_path / "cache")
    monkeypatch.setattr(Examiner, "examine", unharmed)
    remembered = json.loads((tmp_path / "cache" / "videos.json").read_text())["videos"]
    assert len(remembered) == 2
    assert len(scan_videos(config(tmp_path / "v"), tmp_path / "cache").videos) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["", "[]", '{"version": [1, 0.1], "videos": {"a": {"reason": 3}}}']
)
def test_broken_cache_is_scanned_anew(tmp_path: Path, text: str) -> None:
    film(tmp_path / "v" / "a.mp4", 0)
    (tmp_path / "videos.json").write_text(text)
    assert len(scan_videos(config(tmp_path / "v"), tmp_path).videos) == 1


@pytest.mark.slow
def test_holdout_is_stable_disjoint_and_keeps_copies_together(corpus: Path, tmp_path: Path) -> None:
    shutil.copy(corpus / "c0" / "good0.mp4", corpus / "copy.mp4")
    index = scan_videos(config(corpus, holdout=0.4), tmp_path)
    train, held = ({v.fingerprint for v in part} for part in (index.train, index.holdout))
    assert not train & held
    assert (len(train), len(held)) == (4, 2)
    assert len(index.train) + len(index.holdout) == 7
    assert scan_videos(config(corpus, holdout=0.4), tmp_path) == index
    moved = scan_videos(config(corpus, holdout=0.4, seed=1), tmp_path)
    other = scan_videos(config(corpus, holdout=0.4, seed=2), tmp_path)
    assert len({tuple(v.fingerprint for v in i.holdout) for i in (index, moved, other)}) > 1


@pytest.mark.slow
@pytest.mark.parametrize(("count", "holdout", "held"), [(1, 0.1, 0), (2, 0.1, 1), (3, 0.0, 0)])
def test_at_least_one_on_each_side(tmp_path: Path, count: int, holdout: float, held: int) -> None:
    for number in range(count):
        film(tmp_path / "v" / f"{number}.mp4", number, frames=25)
    index = scan_videos(config(tmp_path / "v", holdout=holdout), tmp_path)
    assert (len(index.train), len(index.holdout)) == (count - held, held)


def test_nothing_left_names_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "b.mp4").write_bytes(b"")
    write_mp4(tmp_path / "c.mp4", numbered(3), 10)
    with pytest.raises(VideoError, match=r"none of the 3 videos.*2 empty, 1 too_short.*a\.mp4"):
        scan_videos(config(tmp_path), tmp_path / "cache")


def test_empty_missing_and_unnamed_folders(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"no video found in .*looked for \.avi"):
        scan_videos(config(tmp_path), tmp_path / "cache")
    with pytest.raises(VideoError, match="must be a folder with videos"):
        scan_videos(config(tmp_path / "gone"), tmp_path / "cache")
    with pytest.raises(ConfigError, match="must be a folder with videos, got ''"):
        scan_videos(VideoDataConfig(kind="folder"), tmp_path / "cache")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clip_length", 1),
        ("clip_length", 26),
        ("frame_stride", 0),
        ("image_size", 4),
        ("holdout", 0.6),
        ("max_undecodable", -0.1),
        ("workers", -1),
        ("rate", 0.0),
    ],
)
def test_config_ranges(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"{field} must lie in .*, got {value}"):
        VideoDataConfig(**{field: value})


def test_a_limit_of_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="limit must be at least 1 video, got 0"):
        VideoDataConfig(limit=0)


def test_a_rate_thins_any_folder_out(tmp_path: Path) -> None:
    film(tmp_path / "v" / "a.mp4", 0, frames=30)  # 20 frames per second
    (video,) = scan_videos(config(tmp_path / "v", clip_length=5, rate=5.0), tmp_path).videos
    assert (video.frames, video.fps, video.numbers) == (8, 5.0, range(0, 30, 4))
    with pytest.raises(VideoError, match="it has 8 frames, a clip needs 25"):
        scan_videos(config(tmp_path / "v", rate=5.0), tmp_path)


@pytest.mark.slow
def test_real_damaged_video_is_quarantined(root: Path, tmp_path: Path) -> None:
    folder = Path(os.environ.get("MAPO_TEST_VIDEOS", root.parent / "shared" / "videos"))
    if not (folder / "corrupted.mp4").is_file():
        pytest.skip(f"no real footage: {folder}/corrupted.mp4 is missing (set MAPO_TEST_VIDEOS)")
    index = scan_videos(config(folder), tmp_path)
    assert [path.name for path, _ in index.quarantined] == ["corrupted.mp4"]
    assert index.quarantined[0][1].startswith("damaged: decoding fails within frames")
    assert len(index.videos) == 5


def test_equal_heads_and_tails_are_not_equal_content(tmp_path: Path) -> None:
    """Raw recordings of one scene differ in the middle only."""
    head, size = np.random.default_rng(0).bytes(1 << 17), 1 << 20
    for name, middle in (("a.avi", b"\0"), ("b.avi", b"\1")):
        (tmp_path / name).write_bytes(head + middle * (size - 2 * len(head)) + head)
    assert fingerprint(tmp_path / "a.avi") != fingerprint(tmp_path / "b.avi")
    images = numbered(9)
    write_images(tmp_path / "u" / "%d.png", images)
    images[2, 5, 5] += 1
    write_images(tmp_path / "v" / "%d.png", images)
    assert locate(tmp_path / "u").fingerprint() != locate(tmp_path / "v").fingerprint()


def in_this_process(source: FrameSource) -> Facts:
    return examine(source, 0.1, LimitsConfig())


def test_content_is_hashed_once_for_each_state_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film(tmp_path / "v" / "a.mp4", 0)
    write_images(tmp_path / "v" / "images" / "%d.png", numbered(30))
    first = [source.fingerprint() for source in map(locate, sorted((tmp_path / "v").iterdir()))]
    cache = ScanCache(tmp_path / "videos.json", [0.1], in_this_process)
    for path in sorted((tmp_path / "v").iterdir()):
        cache.examine(locate(path))
    cache.save()
    asked: list[Path] = []
    monkeypatch.setattr(FrameSource, "fingerprint", lambda self: asked.append(self.path) or "new")
    known = ScanCache(tmp_path / "videos.json", [0.1], in_this_process)
    assert [known.examine(locate(p)).fingerprint for p in sorted((tmp_path / "v").iterdir())] == (
        first
    )
    assert asked == []
    os.utime(tmp_path / "v" / "images" / "4.png", ns=(1, 1))
    with contextlib.suppress(VideoError):
        known.examine(locate(tmp_path / "v" / "images"))
    assert [path.name for path in asked] == ["%d.png"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", [OSError(5, "Input/output error"), MemoryError("no memory")])
def test_faults_that_are_not_the_contents_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    for number in range(2):
        film(tmp_path / "v" / f"{number}.mp4", number)
    unharmed = Examiner.examine

    def fail(self: Examiner, source: FrameSource) -> Facts:
        if source.path.name == "0.mp4":
            raise fault
        return unharmed(self, source)

    monkeypatch.setattr(Examiner, "examine", fail)
    index = scan_videos(config(tmp_path / "v"), tmp_path / "cache")
    ((path, why),) = index.quarantined
    assert (path.name, why.split(":")[0]) == ("0.mp4", "inaccessible")
    monkeypatch.setattr(Examiner, "examine", unharmed)
    assert len(scan_videos(config(tmp_path / "v"), tmp_path / "cache").videos) == 2


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["a:b", "http:", "%d"])
def test_folders_with_odd_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    film(tmp_path / folder / "a.mp4", 0)
    monkeypatch.chdir(tmp_path)  # a relative path would be taken for a protocol
    (video,) = scan_videos(config(Path(folder)), tmp_path / "cache").videos
    assert read(video, [3, 29], (32, 32)).shape == (2, 32, 32, 3)


@pytest.mark.slow
def test_a_name_that_is_not_utf8_is_read_like_any_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    film(tmp_path / "v" / "a.mp4", 0)
    odd = Path(os.fsdecode(os.fsencode(tmp_path / "v") + b"/caf\xe9.mp4"))
    odd.write_bytes((tmp_path / "v" / "a.mp4").read_bytes())
    Path(os.fsdecode(os.fsencode(tmp_path / "v") + b"/bad\xe9.mp4")).write_bytes(b"")
    for _ in range(2):  # and from the cache
        index = scan_videos(config(tmp_path / "v", limit=3), tmp_path / "cache")
        assert len(index.videos) == 2
    assert "bad\\xe9" in (tmp_path / "cache" / "quarantine.jsonl").read_text().replace("\\\\", "\\")
    frames = [read(video, [0, 7], (32, 32)).astype(int) for video in index.videos]
    assert np.abs(frames[0] - frames[1]).mean() < 1.0
    identity, source = name_window(next(v for v in index.videos if v.path == odd), range(4), 32)
    assert (identity + source).encode()


def test_folders_that_cannot_be_listed_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    film(tmp_path / "v" / "a.mp4", 0)
    (tmp_path / "v" / "locked").mkdir()
    scandir = os.scandir

    def guarded(path: str) -> object:  # the tests may run as root, who may read everything
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    scan_videos(config(tmp_path / "v"), tmp_path / "cache")
    report = json.loads((tmp_path / "cache" / "report.json").read_text())
    assert report["unreadable_folders"] == [f"{tmp_path}/v/locked: Permission denied"]
    assert "1 folders cannot be listed" in caplog.text
