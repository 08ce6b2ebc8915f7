"""Speed of reading clips: ours, which knows how to reach the right frames, and decord alone.

    python benchmarks/reading.py FILE...

Both read the same random clips in turns, in one process and one thread. Prints medians. Then the
same for clips of the data set, whose frames are decoded anew, kept on disk, or kept in memory.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import decord
import numpy as np

from mapo_lightning.data.clips import ClipDataset
from mapo_lightning.data.reader import FrameSource, read
from mapo_lightning.data.settings import VideoDataConfig
from mapo_lightning.data.video import resize
from mapo_lightning.data.video_info import VideoInfo
from mapo_lightning.data.window_labels import collate_clips
from mapo_lightning.semantics.settings import VlmConfig
from mapo_lightning.types import Frames

CLIP, SIDE, ROUNDS = 25, 64, 60
BATCH, APPETITE = 16, 0.010
"""Clips of an update at size=paper, and the seconds that it is hoped to take on a GPU."""


def alone(path: Path, indices: range, size: tuple[int, int]) -> Frames:
    """What version 0.1.0 did: decord at four times the size, then averaging."""
    reader = decord.VideoReader(str(path), num_threads=1, height=size[0], width=size[1])
    return resize(reader.get_batch(list(indices)).asnumpy(), (SIDE, SIDE))


def seconds(job: Callable[[], Any]) -> float:
    began = time.process_time()
    job()
    return time.process_time() - began


def measure(path: Path) -> str:
    info = FrameSource(path).examine(0.1)
    assert info.access is not None
    rows, columns = (min(4 * SIDE, side) for side in info.access.geometry.turned())
    rng, ours, decords = np.random.default_rng(0), [], []
    for number in range(ROUNDS + 2):
        start = int(rng.integers(info.frames - CLIP))
        indices = range(start, start + CLIP)
        jobs = {
            0: lambda i=indices: read(info, i, (SIDE, SIDE)),
            1: lambda i=indices: alone(path, i, (rows, columns)),
        }
        took = {which: seconds(jobs[which]) for which in ((0, 1) if number % 2 else (1, 0))}
        if number > 1:  # the first two warm up
            ours.append(took[0])
            decords.append(took[1])
    ours_ms, decord_ms = (1000 * statistics.median(times) for times in (ours, decords))
    ratio = statistics.median(b / a for a, b in zip(ours, decords, strict=True))
    return (
        f"{path.name}: read by {info.access.decoder}; {ours_ms:.1f} ms per clip, decord alone "
        f"{decord_ms:.1f} ms; speed {ratio:.3f} of decord's"
    )


def rates(infos: Sequence[VideoInfo]) -> str:
    """Clips per second of one worker's processor time, from every place that frames come from."""
    with tempfile.TemporaryDirectory() as place:
        sets = {
            name: ClipDataset(
                infos,
                VideoDataConfig(clip_length=CLIP, image_size=SIDE, cache=cache, cache_mb=megabytes),
                VlmConfig(kind="none"),
                Path(place),
            )
            for name, cache, megabytes in (
                ("decoded anew", "memory", 0),
                ("cache=decoded", "decoded", 0),
                ("cache=memory", "memory", 10_000),
            )
        }
        for clips in sets.values():  # what is kept is there, or in the system's cache of files
            for number in range(len(infos)):
                clips.clip_at(number, 0)
        rng, took = np.random.default_rng(0), {name: [] for name in sets}
        for turn in range(ROUNDS):
            number = turn % len(infos)
            start = int(rng.integers(infos[number].frames - CLIP))
            for name in sorted(sets, reverse=turn % 2 == 1):
                took[name].append(seconds(partial(sets[name].clip_at, number, start)))
        clips = [sets["cache=memory"].clip_at(0, start) for start in range(BATCH)]
        stacking = statistics.median(seconds(lambda: collate_clips(clips)) for _ in range(ROUNDS))
    found = {name: 1 / statistics.mean(times) for name, times in took.items()}
    batch = {name: BATCH / rate + stacking for name, rate in found.items()}
    return "\n".join(
        f"{name}: {rate:,.0f} clips per second and worker; a batch of {BATCH} every "
        f"{1000 * APPETITE:.0f} ms, stacked, takes {batch[name] / APPETITE:.1f} workers"
        for name, rate in found.items()
    )


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(measure(Path(name)), flush=True)
    print(rates([FrameSource(Path(name)).examine(0.1) for name in sys.argv[1:]]))
