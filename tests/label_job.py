"""Labels a folder of videos, as stage=label does, in a process that tests may kill."""

from __future__ import annotations

import importlib
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from label_servers import Running

from mapo_lightning.data.clips import ClipDataset
from mapo_lightning.data.label_corpus import CorpusLabelling
from mapo_lightning.data.scan import scan_videos
from mapo_lightning.data.settings import VideoDataConfig
from mapo_lightning.semantics.settings import ServerConfig, VlmConfig, WindowConfig

BEGUN = "begun"


def at(server: Running, concurrency: int) -> dict[str, Any]:
    """Settings that ask a test server, so many questions at a time."""
    return {
        "kind": "openai",
        "server": ServerConfig(server.url, concurrency, structured="brackets"),
    }


def corpus(
    videos: Path,
    work: Path,
    shard: tuple[int, int] = (0, 1),
    size: int = 64,
    server: ServerConfig | None = None,
    **vlm: Any,
) -> CorpusLabelling:
    data = VideoDataConfig(kind="folder", root=str(videos), workers=1, clip_length=9)
    server = server or ServerConfig()
    cfg = VlmConfig(window=WindowConfig(size=size), server=server, **vlm)
    return CorpusLabelling(ClipDataset(scan_videos(data, work).videos, data, cfg, work), shard)


class Job:
    """A process that labels."""

    def __init__(self, *args: Any, **words: Any) -> None:
        importlib.import_module("openai.resources.chat")  # slow: not once per process
        context = multiprocessing.get_context("fork")  # the imports are done already
        self.said, said = context.Pipe(duplex=False)
        self.process = context.Process(target=_label, args=(said, args, words), daemon=True)
        self.process.start()
        said.close()
        assert self.said.recv() == BEGUN

    def kill(self) -> bool:
        """Kill it; False if it had ended by itself."""
        alive = self.process.is_alive()
        self.process.kill()
        self.process.join()
        return alive

    def finish(self) -> str:
        """Wait for its end; returns how far it came."""
        last: str = self.said.recv()
        self.process.join()
        assert self.process.exitcode == 0
        return last


def _label(said: Connection, args: Any, words: dict[str, Any]) -> None:
    job = corpus(*args, **words)
    said.send(BEGUN)
    said.send(str(job.run(lambda progress: None)))
