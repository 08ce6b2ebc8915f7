"""Test 8 in full: a corpus of 1,000 videos, of which 70 are damaged in the ways that files are."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from program import SMALL, train
from scenes import damage, write_sound

from mapo_lightning.data.clips import ClipDataset
from mapo_lightning.data.scan import scan_videos
from mapo_lightning.data.settings import VideoDataConfig
from mapo_lightning.data.video import write_mp4
from mapo_lightning.semantics.settings import VlmConfig
from mapo_lightning.training.checkpoint import read_checkpoint

pytestmark = pytest.mark.hard

COUNT = 1000
SHARES = {"cut": 20, "noise": 20, "empty": 10, "sound": 10, "single": 10, "uneven": 10}
"""Files per thousand. Those of an uneven frame rate are good ones: time stamps are read."""


def film(path: Path, seed: int, frames: int = 30) -> bytes:
    """A film that compresses badly, so that damage hits pictures."""
    rng = np.random.default_rng(seed)
    return write_mp4(path, rng.integers(0, 255, (frames, 32, 32, 3)).astype(np.uint8), 20)


def uneven(path: Path, seed: int) -> None:
    """A film whose frames last one to four ticks."""
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width = stream.height = 32
        ticks = itertools.accumulate(int(n) for n in rng.integers(1, 5, 40))
        for tick in ticks:
            picture = rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_corpus(root: Path) -> set[str]:
    """Write the files; returns the names of the damaged ones."""
    root.mkdir()
    kinds = [kind for kind, count in SHARES.items() for _ in range(count)]
    kinds += ["good"] * (COUNT - len(kinds))
    np.random.default_rng(0).shuffle(kinds)
    bad = set()
    for number, kind in enumerate(kinds):
        path = root / f"{number:04d}_{kind}.mp4"
        if kind == "empty":
            path.write_bytes(b"")
        elif kind == "sound":
            write_sound(path, number)
        elif kind == "uneven":
            uneven(path, number)
        else:
            whole = film(path, number, 1 if kind == "single" else 30)
            if kind == "cut":
                path.write_bytes(whole[: len(whole) // 2])
            elif kind == "noise":
                damage(path, whole, 0.4, 0.8)
        if kind not in ("good", "uneven"):
            bad.add(path.name)
    return bad


def read_all(config: VideoDataConfig, cache: Path) -> Iterator[str]:
    """Read a clip of every video that the scan left; yields its name."""
    index = scan_videos(config, cache)
    for videos in (index.train, index.holdout):
        clips = ClipDataset(videos, config, VlmConfig(kind="none"), cache)
        for number, video in enumerate(videos):
            assert clips.clip_at(number, 0)["obs"].shape[0] == config.clip_length
            yield video.path.name


def test_a_thousand_videos_with_damaged_ones_among_them(tmp_path: Path) -> None:
    bad = write_corpus(tmp_path / "videos")
    good = {path.name for path in (tmp_path / "videos").iterdir()} - bad
    words = [*SMALL, "stage=pretrain", "vlm=none", "data=folder", f"data.root={tmp_path}/videos"]
    words += ["data.clip_length=9", "data.workers=2", "pretrain.updates=60", "run_dir=run"]
    words += ["trainer.devices=2", "trainer.strategy=ddp", "pretrain.batch_size=8"]
    words += ["callbacks={told: 0, gallery: 0, quality: 0, rollout_every: 1000}"]
    said = train(tmp_path, *words)
    (table,) = tmp_path.rglob("quarantine.jsonl")
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert sorted(Path(row["path"]).name for row in rows) == sorted(bad)  # each of them once
    assert all(row["reason"] and row["detail"] for row in rows)
    assert "worker" not in said.lower()
    assert read_checkpoint(tmp_path / "run/pretrain/last.ckpt")["global_step"] == 60
    config = VideoDataConfig(kind="folder", root=f"{tmp_path}/videos", clip_length=9)
    assert set(read_all(config, tmp_path / "cache")) == good
