"""Files that are made to exhaust memory, time or a decoder are set aside, and cost little."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import psutil
import pytest
from miniatures import scene, write_images

from mapo_lightning.data import examiner as examiner_module
from mapo_lightning.data.examiner import Examiner
from mapo_lightning.data.image_header import image_size
from mapo_lightning.data.reader import FrameSource, locate
from mapo_lightning.data.scan import scan_videos
from mapo_lightning.data.settings import LimitsConfig, VideoDataConfig
from mapo_lightning.data.video import write_mp4
from mapo_lightning.types import ConfigError

SIDE = 20_000  # pixels of a frame of a bomb
IMAGE_SIDE = 30_000


def write_codec(path: Path, codec: str, pixels: str, frames: int = 30) -> bytes:
    """A film whose packets are whole pictures, 64x48."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(12))
        stream.height, stream.width, stream.pix_fmt = 48, 64, pixels
        for frame in scene(0, frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path.read_bytes()


def header_only(path: Path) -> None:
    """A film whose header promises huge frames; this codec states its size nowhere else."""
    data = write_codec(path, "qtrle", "rgb24")
    small, huge = struct.pack(">HH", 64, 48), struct.pack(">HH", SIDE, SIDE)
    at = data.index(b"rle ", data.index(b"stsd"))
    assert data[at + 28 : at + 32] == small
    path.write_bytes(data[: at + 28] + huge + data[at + 32 :])


def in_every_packet(path: Path) -> None:
    """A film of JPEG pictures that each say that they are huge, whatever the container says."""
    data = bytearray(write_codec(path, "mjpeg", "yuvj420p"))
    at = data.find(b"\xff\xc0")
    while at >= 0:
        data[at + 5 : at + 9] = struct.pack(">HH", SIDE, SIDE)
        at = data.find(b"\xff\xc0", at + 9)
    path.write_bytes(data)


def many_frames(path: Path) -> None:
    """An mp4 of 30 frames whose tables promise a million."""
    data = bytearray(write_mp4(path, scene(0, 30), 12))
    sizes, times = data.index(b"stsz"), data.index(b"stts")
    data[sizes + 8 : sizes + 16] = struct.pack(">II", 1, 1_000_000)
    data[times + 12 : times + 16] = struct.pack(">I", 1_000_000)
    path.write_bytes(data)


def padded(path: Path) -> None:
    """The same, with as many bytes as it promises frames."""
    many_frames(path)
    with path.open("ab") as file:
        file.write(struct.pack(">I4s", 1_200_000, b"free"))
        file.truncate(path.stat().st_size + 1_200_000)


def png(path: Path) -> None:
    """One image of 30,000 x 30,000 pixels; the missing rows do not matter to an allocation."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", IMAGE_SIDE, IMAGE_SIDE, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(3 * IMAGE_SIDE + 1) * 16)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def jpeg(path: Path) -> None:
    data = bytearray(cv2.imencode(".jpg", scene(0, 1)[0])[1].tobytes())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", IMAGE_SIDE, IMAGE_SIDE)
    path.write_bytes(data)


BOMBS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "header.mov": (header_only, "damaged", "more pixels than data.limits.pixels=35389440"),
    "packets.avi": (in_every_packet, "damaged", "more pixels than data.limits.pixels=35389440"),
    "frames.mp4": (many_frames, "too_large", "it has 1000000 frames"),
    "padded.mp4": (padded, "too_large", "it has 1000000 frames"),
    "png/1.png": (png, "too_large", "30000x30000"),
    "jpeg/1.jpg": (jpeg, "too_large", "30000x30000"),
}
MEASURE = """
import json, resource, sys
from pathlib import Path
from mapo_lightning.data.examiner import examine
from mapo_lightning.data.reader import locate
from mapo_lightning.data.settings import LimitsConfig

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

limits = LimitsConfig(frames=999_999)
assert examine(locate(Path(sys.argv[1])), 0.1, limits)["reason"] is None
for path in map(Path, sys.argv[2:]):
    before = peak()
    facts = examine(locate(path), 0.1, limits)
    print(json.dumps([facts["reason"], facts["detail"], peak() - before]))
"""


def test_header_bombs_are_refused_before_their_memory_is_taken(tmp_path: Path, root: Path) -> None:
    """Test 25: 20,000 x 20,000 pixels, a million frames, images of 30,000 x 30,000: under 30 MB."""
    write_mp4(tmp_path / "good.mp4", scene(0, 30), 12)
    for name, (make, _, _) in BOMBS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        make(tmp_path / name)
    paths = [tmp_path / (name.split("/")[0] if "/" in name else name) for name in BOMBS]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "good.mp4"), *map(str, paths)],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for line, (name, (_, reason, words)) in zip(
        done.stdout.splitlines(), BOMBS.items(), strict=True
    ):
        found, detail, grown = json.loads(line)
        print(name, found, detail, f"{grown:.1f} MB")
        assert found == reason, name
        assert words in detail
        assert grown < 30, f"{name}: {grown:.0f} MB"


def config(root: Path, **limits: float) -> VideoDataConfig:
    return VideoDataConfig(
        kind="folder",
        root=str(root),
        workers=2,
        limits=LimitsConfig(**limits),  # type: ignore[arg-type]
    )


def children() -> set[psutil.Process]:
    """Processes that this one has started, also for tests before."""
    return set(psutil.Process().children())


@pytest.mark.slow
def test_a_scan_sets_bombs_aside_and_keeps_the_rest(tmp_path: Path) -> None:
    before = children()
    for number in range(3):
        write_mp4(tmp_path / "v" / f"{number}.mp4", scene(number, 30), 12)
    for name, (make, _, _) in BOMBS.items():
        if "/" not in name:
            make(tmp_path / "v" / name)
    index = scan_videos(config(tmp_path / "v"), tmp_path / "cache")
    assert [video.path.name for video in index.videos] == ["0.mp4", "1.mp4", "2.mp4"]
    rows = [json.loads(line) for line in (tmp_path / "cache/quarantine.jsonl").open()]
    assert sorted(Path(row["path"]).name for row in rows) == sorted(
        name for name in BOMBS if "/" not in name
    )
    (detail,) = (row["detail"] for row in rows if row["path"].endswith("frames.mp4"))
    assert "its header promises 1000000 frames, and it has" in detail  # within the usual limit
    assert children() <= before
    # What a limit refused is examined again under another.
    low = scan_videos(config(tmp_path / "v", frames=30), tmp_path / "cache")
    assert len(low.videos) == 3


@pytest.mark.slow
def test_frames_and_hours_are_limited_by_settings(tmp_path: Path) -> None:
    write_mp4(tmp_path / "v.mp4", scene(0, 30), 12)
    found = {}
    for name, value in (("frames", 29), ("hours", 1 / 3600), ("pixels", 64 * 48 - 1)):
        with closing(Examiner(0.1, LimitsConfig(**{name: value}))) as examiner:
            found[name] = examiner.examine(FrameSource(tmp_path / "v.mp4"))
    assert {facts["reason"] for facts in found.values()} == {"too_large"}
    for name, facts in found.items():
        assert f"data.limits.{name} is" in facts["detail"]


CPU = "while True: pass"
MEMORY = "kept = [bytearray(1 << 20) for _ in range(4096)]"
CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
FOREIGN = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "reason", "words"),
    [
        (CPU, "too_large", r"more than 1 s of CPU time \(data\.limits\.cpu_seconds\)"),
        (MEMORY, "too_large", r"more than 1024 MB of memory \(data\.limits\.memory_mb\)"),
        (CRASH, "damaged", "a decoder crashes on it"),
        (FOREIGN, "inaccessible", "ended by signal 15"),
    ],
)
def test_a_decoder_out_of_bounds_costs_its_video_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str, words: str
) -> None:
    """Real limits of a real child, whose decoder is replaced by the fault for one video."""
    before = children()
    for name in ("good.mp4", "bad.mp4"):
        write_mp4(tmp_path / name, scene(0, 30), 12)
    planted = (
        "import mapo_lightning.data.examiner as e, mapo_lightning.data.reader as r\n"
        "real = r.FrameSource.examine\n"
        "def fake(self, *words):\n"
        f"    if self.path.name == 'bad.mp4':\n        {fault}\n"
        "    return real(self, *words)\n"
        "r.FrameSource.examine = fake\n"
        "e.serve(json.loads(sys.argv[2]))"
    )
    start = examiner_module._START.split("from")[0].rstrip("; ")
    monkeypatch.setattr(examiner_module, "_START", f"{start}\n{planted}")
    with closing(Examiner(0.1, LimitsConfig(cpu_seconds=1, memory_mb=1024))) as examiner:
        facts = examiner.examine(FrameSource(tmp_path / "bad.mp4"))
        assert facts["reason"] == reason
        assert re.search(words, facts["detail"]), facts["detail"]
        assert examiner.examine(FrameSource(tmp_path / "good.mp4"))["reason"] is None
    assert children() <= before


def test_a_playlist_named_like_a_video_opens_no_connection(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sink:
        sink.settimeout(0.2)
        address = f"http://127.0.0.1:{sink.getsockname()[1]}/v.ts"
        (tmp_path / "list.mp4").write_text(
            f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{address}\n#EXT-X-ENDLIST\n"
        )
        (tmp_path / "concat.mkv").write_text(f"ffconcat version 1.0\nfile '{address}'\n")
        with closing(Examiner(0.1, LimitsConfig())) as examiner:
            for name in ("list.mp4", "concat.mkv"):
                facts = examiner.examine(FrameSource(tmp_path / name))
                assert facts["reason"] == "unreadable", facts
        with pytest.raises(TimeoutError):
            sink.accept()


def test_children_end_with_a_scan_that_is_killed(tmp_path: Path, root: Path) -> None:
    """A child in the middle of a video ends with its parent."""
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from mapo_lightning.data import examiner as e\n"
        "from mapo_lightning.data.reader import FrameSource\n"
        "from mapo_lightning.data.settings import LimitsConfig\n"
        "e._START = 'import json, sys, time; sys.path[:] = json.loads(sys.argv[1]);'"
        " 'from mapo_lightning.data.examiner import _die_with_parent; _die_with_parent();'"
        " 'sys.stderr.write(\"up\"); sys.stderr.flush(); time.sleep(600)'\n"
        "e.Examiner(0.1, LimitsConfig()).examine(FrameSource(Path('v.mp4')))\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(root)},
        stderr=subprocess.PIPE,
    )
    assert parent.stderr is not None
    assert parent.stderr.read(2) == b"up"
    children = psutil.Process(parent.pid).children()
    assert len(children) == 1
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert (len(gone), alive) == (1, [])
    parent.stderr.close()


def test_an_ended_scan_ends_the_threads_that_wait(tmp_path: Path) -> None:
    examiner = Examiner(0.1, LimitsConfig())
    write_mp4(tmp_path / "v.mp4", scene(0, 30), 12)
    examiner.examine(FrameSource(tmp_path / "v.mp4"))
    found: list[str] = []
    (child,) = examiner._all
    os.kill(child.pid, signal.SIGSTOP)  # as if it decoded for ever
    thread = threading.Thread(
        target=lambda: found.append(examiner.examine(FrameSource(tmp_path / "v.mp4"))["reason"])
    )
    thread.start()
    while examiner._idle:  # until it has been given the video
        thread.join(0.01)
    examiner.close()
    thread.join(30)
    assert found == ["inaccessible"]
    with pytest.raises(RuntimeError, match="the scan was ended"):
        examiner.examine(FrameSource(tmp_path / "v.mp4"))


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_sizes_of_real_images(suffix: str) -> None:
    for height, width in ((1, 1), (48, 64), (301, 17)):
        data = cv2.imencode(suffix, np.zeros((height, width, 3), np.uint8))[1].tobytes()
        assert image_size(data) == (width, height)
        assert image_size(data[:10]) is None
    assert image_size(b"") is None
    assert image_size(b"BM" + bytes(60)) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("pixels", 0), ("frames", 0), ("hours", 0.0), ("cpu_seconds", 0.5), ("memory_mb", 512)],
)
def test_limits_have_ranges(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"limits\.{name} must be"):
        LimitsConfig(**{name: value})


def test_an_image_larger_than_the_first_is_not_decoded(tmp_path: Path) -> None:
    write_images(tmp_path / "v" / "%d.png", scene(0, 9))
    png(tmp_path / "v" / "5.png")
    with closing(Examiner(0.1, LimitsConfig())) as examiner:
        facts = examiner.examine(locate(tmp_path / "v"))
    assert facts["reason"] == "too_large"
    assert "30000x30000" in facts["detail"]
