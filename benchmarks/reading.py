"""Speed of reading clips: ours, which knows how to reach the right frames, and decord alone.

    python benchmarks/reading.py FILE...

Both read the same random clips in turns, in one process and one thread. Prints medians.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import decord
import numpy as np

from mapo_lightning.data.reader import FrameSource, read
from mapo_lightning.data.video import resize
from mapo_lightning.types import Frames

CLIP, SIDE, ROUNDS = 25, 64, 60


def alone(path: Path, indices: range, size: tuple[int, int]) -> Frames:
    """What version 0.1.0 did: decord at four times the size, then averaging."""
    reader = decord.VideoReader(str(path), num_threads=1, height=size[0], width=size[1])
    return resize(reader.get_batch(list(indices)).asnumpy(), (SIDE, SIDE))


def seconds(job: Callable[[], Frames]) -> float:
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


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(measure(Path(name)), flush=True)
