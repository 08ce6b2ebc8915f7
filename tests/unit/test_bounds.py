"""What grows is bounded, and what a program has started ends with it: real processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from loader_memory import environment, growth
from miniatures import scene
from replay_entries import make, play

from mapo_lightning.data.video import write_mp4
from mapo_lightning.semantics.phrase import Phrase
from mapo_lightning.semantics.store import LabelStore, StoredLabel


@pytest.mark.slow
def test_a_loaders_worker_hardly_grows(root: Path, tmp_path: Path) -> None:
    """Test 10, short form; tests/hard/ reads 20,000 clips."""
    grown = growth(root, tmp_path, 600, 100)
    assert grown <= 50, f"{grown:.1f} MB"


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_capacity_bounds_the_folder_of_replay_also_over_resumes(tmp_path: Path) -> None:
    """Eight starts of 10 episodes each; 5 fit, and each of the last two states keeps its own 5."""
    replay = make(tmp_path, capacity=100)
    for start in range(8):
        if start:
            state, replay = replay.state(), make(tmp_path, capacity=100)
            replay.restore(state)
        for episode in range(10):
            play(replay, 0, 20, start=30 * episode)
            files = list(tmp_path.rglob("*.npy"))
            assert len(files) <= 15
    largest = max(path.stat().st_size for path in files)
    assert folder_bytes(tmp_path) <= 16 * largest
    assert replay.steps == 100


@pytest.mark.slow
def test_a_label_takes_few_bytes_and_one_that_is_known_none(tmp_path: Path) -> None:
    """Test 9: the store grows by its labels, not by its readers and starts."""
    keys = [f"{number:032x}" for number in range(2000)]
    phrase = Phrase("Hand", "moves", "a cup", "right", "4 cm")
    label = StoredLabel("raw " * 20, "slots", phrase, None, "test-v1", "a.mp4 frames 0..3 step 1")
    sizes = []
    for _ in range(3):  # starts
        store = LabelStore(tmp_path, "writer")
        missing = [key for key in keys if key not in store.get(keys)]
        for first in range(0, len(missing), 100):
            store.put(dict.fromkeys(missing[first : first + 100], label))
        sizes.append(folder_bytes(tmp_path))
    assert sizes[0] / len(keys) < 1000, sizes
    assert sizes[2] <= 1.1 * sizes[0], sizes


# A test run in the background may have handed on that Ctrl-C is ignored.
HEAD = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
ENVIRONMENTS = """
import sys
from mapo_lightning.envs.factory import make_vector_env
from mapo_lightning.envs.settings import EnvConfig

if __name__ == "__main__":
    envs = make_vector_env(EnvConfig(kind="dmc", name="cartpole_swingup"), 0, 2)
    envs.reset()
    print("up", flush=True)
    sys.stdin.read()
"""
LOADER = """
import sys
from pathlib import Path
from mapo_lightning.data.scan import scan_videos
from mapo_lightning.data.settings import VideoDataConfig
from mapo_lightning.semantics.settings import VlmConfig
from mapo_lightning.training.datamodule import VideoDataModule

root = Path(sys.argv[1])
cfg = VideoDataConfig(kind="folder", root=str(root / "v"), workers=2, clip_length=9)
data = VideoDataModule(cfg, VlmConfig(kind="none"), 4, root / "cache", 0)
batches = iter(data.train_dataloader())
next(batches)
print("up", flush=True)
sys.stdin.readline()
for _ in batches:
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "how"),
    [
        (ENVIRONMENTS, "SIGKILL"),
        (ENVIRONMENTS, "SIGINT"),
        (LOADER, "SIGKILL"),
        (LOADER, "SIGINT"),
        (LOADER, "crash of a worker"),
    ],
    ids=lambda value: value if len(value) < 20 else "environments" if "envs" in value else "loader",
)
def test_processes_and_shared_memory_end_with_the_program(
    program: str, how: str, root: Path, tmp_path: Path
) -> None:
    """Environments and loaders' workers, after kill -9, Ctrl-C, and the death of one of them."""
    for number in range(3):
        write_mp4(tmp_path / "v" / f"{number}.mp4", scene(number, 40), 12)
    (tmp_path / "program.py").write_text(HEAD + program)
    before = set(os.listdir("/dev/shm"))
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path)],
        env=environment(root), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    children: list[psutil.Process] = []
    try:
        assert parent.stdout is not None
        assert parent.stdin is not None
        assert parent.stdout.readline() == b"up\n"
        children = psutil.Process(parent.pid).children(recursive=True)
        assert len(children) >= 2
        if how.startswith("SIG"):
            parent.send_signal(signal.Signals[how])
        else:
            forked = [child for child in children if "program.py" in " ".join(child.cmdline())]
            forked[-1].kill()
            parent.stdin.write(b"\n")
            parent.stdin.flush()
        assert parent.wait(120) != 0
        _, alive = psutil.wait_procs(children, timeout=60)
        assert alive == []
    finally:
        parent.kill()
        parent.communicate()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    # Names that other programs of this machine have made in the meantime are not ours.
    ours = {name for name in set(os.listdir("/dev/shm")) - before if owned(name, children)}
    assert ours == set()


def owned(name: str, processes: list[psutil.Process]) -> bool:
    """Whether a name in shared memory holds the number of one of these processes."""
    return any(str(process.pid) in name for process in processes)
