from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from label_servers import running
from scenes import moving_square

from mapo_lightning.data.clips import ClipDataset
from mapo_lightning.data.prefetch import prefetch
from mapo_lightning.data.settings import VideoDataConfig
from mapo_lightning.data.video import VideoInfo, probe_video, write_mp4
from mapo_lightning.semantics.settings import ServerConfig, VlmConfig, WindowConfig
from mapo_lightning.types import DescriberError


def write_videos(folder: Path) -> list[VideoInfo]:
    found = []
    for number in range(3):
        path = folder / f"{number}.mp4"
        frames = moving_square(np.random.default_rng(number), number, 40.0, 40, size=(64, 64))
        write_mp4(path, frames, 10.0)
        found.append(probe_video(path))
    return found


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[VideoInfo]:
    return write_videos(tmp_path_factory.mktemp("videos"))


def dataset(videos: list[VideoInfo], root: Path, size: int = 32, **vlm: object) -> ClipDataset:
    cfg = VlmConfig(window=WindowConfig(size=size), **vlm)  # type: ignore[arg-type]
    return ClipDataset(videos, VideoDataConfig(clip_length=9, workers=0), cfg, root)


@pytest.mark.parametrize("in_flight", [1, 3, 10])
def test_jobs_come_back_in_order_with_their_errors(in_flight: int) -> None:
    def job(number: int) -> int:
        time.sleep(0.01 * (number % 3))
        if number == 4:
            raise ValueError("four")
        return number * number

    found = []
    for name, result in prefetch(((n, partial(job, n)) for n in range(8)), in_flight):
        try:
            found.append((name, result()))
        except ValueError as error:
            found.append((name, str(error)))
    assert found == [(n, "four" if n == 4 else n * n) for n in range(8)]


def test_so_many_are_in_flight_and_no_more() -> None:
    now, most, lock = [0], [0], threading.Lock()

    def job() -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1

    endless = prefetch(((n, job) for n in itertools.count()), 4)
    for _, result in itertools.islice(endless, 12):
        result()
    endless.close()
    assert most[0] == 4


@pytest.mark.slow
def test_clips_in_flight_do_not_change_what_is_drawn(
    videos: list[VideoInfo], tmp_path: Path
) -> None:
    with running(seconds=0.05, schema="ignored") as server:
        settings = ServerConfig(server.url, concurrency=8, structured="brackets")
        busy = dataset(videos, tmp_path, kind="openai", server=settings)
        assert busy._clips_in_flight() > 4
        found = list(itertools.islice(busy, 8))
        assert sum(int(clip["vlm_asked"]) for clip in found) > 0
        calm = dataset(videos, tmp_path, kind="openai", server=settings, cached_only=True)
        for clip, same in zip(found, calm, strict=False):
            np.testing.assert_array_equal(clip["obs"], same["obs"])
            np.testing.assert_array_equal(clip["semantic"], same["semantic"])
        assert 3 < server.stats()["most"] <= 8  # a clip alone has three windows


ABANDONED = """
import logging, sys, threading
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from mapo_lightning.data.video import probe_video
from test_prefetch import dataset
from mapo_lightning.semantics.settings import ServerConfig
words = {"kind": "openai", "server": ServerConfig("http://127.0.0.1:9/v1")}
source = dataset([probe_video(Path(sys.argv[1]))], Path(sys.argv[2]), **words)
waits = threading.Event()
notice = logging.Handler()
notice.emit = lambda record: "no label server answers" in record.getMessage() and waits.set()
logging.getLogger().addHandler(notice)
threading.Thread(target=lambda: next(iter(source)), daemon=True).start()
waits.wait()
"""


@pytest.mark.slow
def test_a_program_ends_although_no_server_answers(videos: list[VideoInfo], tmp_path: Path) -> None:
    here, tests = (str(folder) for folder in Path(__file__).parents[:2])
    command = [sys.executable, "-c", ABANDONED, str(videos[0].path), str(tmp_path), here, tests]
    subprocess.run(command, timeout=280, check=True)  # only ends a program that hangs


@pytest.mark.slow
def test_windows_without_an_answer_are_null_now_and_asked_later(
    videos: list[VideoInfo], tmp_path: Path
) -> None:
    with running(schema="ignored") as server:
        settings = ServerConfig(server.url, on_outage="skip")
        source = dataset(videos, tmp_path, kind="openai", server=settings)
        server.kill()
        clip = source.clip_at(0, 4)
        assert not clip["has_semantic"].any()
        assert (clip["vlm_asked"], clip["vlm_hits"]) == (3, 0)
        assert source.labeler.stats.unanswered == 3
        assert source.labeler.store.items() == {}
        server.start(server.port)
        time.sleep(1.1)
        later = dataset(videos, tmp_path, kind="openai", server=settings)
        assert later.clip_at(0, 4)["vlm_asked"] == 3
    settings = replace(settings, on_outage="error", timeout_seconds=0.2)
    with pytest.raises(DescriberError, match="no label server answers"):
        dataset(videos, tmp_path, 48, kind="openai", server=settings).clip_at(0, 4)
