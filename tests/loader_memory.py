"""How much a loader's worker grows while it reads clips: a program of its own, and its answer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from miniatures import scene

from mapo_lightning.data.video import write_mp4

READS = """
import sys
from pathlib import Path
import psutil, torch
from torch.utils.data import DataLoader, get_worker_info
from mapo_lightning.data.clips import ClipDataset
from mapo_lightning.data.scan import scan_videos
from mapo_lightning.data.settings import VideoDataConfig
from mapo_lightning.data.window_labels import collate_clips
from mapo_lightning.semantics.settings import VlmConfig

torch.set_num_threads(1)
root, reads, warm = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
cfg = VideoDataConfig(kind="folder", root=str(root / "v"), cache_mb=0, workers=1, clip_length=9)
index = scan_videos(cfg, root / "cache")
clips = ClipDataset(index.train, cfg, VlmConfig(kind="none"), root / "cache")
loader = DataLoader(clips, batch_size=20, num_workers=1, collate_fn=collate_clips)
worker, before = None, 0
for number, batch in enumerate(loader, 1):
    if worker is None:
        (worker,) = psutil.Process().children()
    if 20 * number == warm:
        before = worker.memory_info().rss
    if 20 * number >= reads:  # the worker ends with the loop
        print((worker.memory_info().rss - before) / 2**20)
        break
"""


def environment(root: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}


def growth(root: Path, folder: Path, reads: int, warm: int) -> float:
    """Megabytes by which a loader's worker grows from its read ``warm`` to its read ``reads``."""
    for number in range(6):
        write_mp4(folder / "v" / f"{number}.mp4", scene(number, 40), 12)
    done = subprocess.run(
        [sys.executable, "-c", READS, str(folder), str(reads), str(warm)],
        env=environment(root), capture_output=True, text=True, timeout=3000,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return float(done.stdout)
