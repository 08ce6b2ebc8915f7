"""How fast labels come, what they cost training, and what survives kills and outages.

python benchmarks/labels.py [cold] [warm] [kills] [outage]     all of them without a name

The server takes 200 ms per question and answers 8 at a time, so 40 a second is its limit.
"""

from __future__ import annotations

import importlib
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/unit"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from label_job import Job, at, corpus
from label_servers import running
from scenes import moving_square

from mapo_lightning.config.compose import compose
from mapo_lightning.data.video import write_mp4
from mapo_lightning.label_tools import parquet as labels
from mapo_lightning.run.build import build_pretrain
from mapo_lightning.run.config import RunConfig
from mapo_lightning.training.datamodule import VideoDataModule

ROOT = Path(__file__).resolve().parents[1]
SECONDS, AT_ONCE = 0.2, 8


def make_videos(folder: Path, count: int, frames: int) -> Path:
    for number in range(count):
        rng = np.random.default_rng(number)
        film = moving_square(rng, number % 8, 40.0, frames)
        write_mp4(folder / f"{number}.mp4", film, 10.0)
    return folder


def cold(folder: Path) -> None:
    videos = make_videos(folder / "videos", 8, 203)
    limit = AT_ONCE / SECONDS
    print("\n## Cold labelling\n")
    importlib.import_module("openai.resources.chat")  # a second that a long run does not see
    print("| frames shown | in flight | windows | windows/s | of the limit |")
    print("|---|---|---|---|---|")
    for size, flying in ((64, AT_ONCE), (224, AT_ONCE), (224, 2 * AT_ONCE)):
        with running(seconds=SECONDS, at_once=AT_ONCE, schema="ignored") as server:
            work = folder / f"cold{size}-{flying}"
            done = corpus(videos, work, size=size, **at(server, flying)).run(lambda _: None)
            assert server.stats()["calls"] == done.windows
        share = done.rate / limit
        print(
            f"| {size} px | {flying} | {done.windows} | {done.rate:.1f} | {share:.1%} |", flush=True
        )


def warm(folder: Path, rounds: int = 8, updates: int = 8) -> None:
    """The same training with labels from a full store and without any, in turns."""
    videos = make_videos(folder / "videos", 8, 203)
    torch.set_num_threads(1)
    with running(schema="ignored") as server:
        known = ["vlm=openai_server", f"vlm.server.base_url={server.url}", "vlm.window.size=64"]
        known += ["vlm.server.structured=brackets"]
        corpus(videos, folder, **at(server, 16)).run(lambda _: None)
        kinds = {"none": ["vlm=none"], "warm store": [*known, "vlm.cached_only=true"]}
        steps = {name: training(videos, folder, words) for name, words in kinds.items()}
        calls = server.stats()["calls"]
        for step in steps.values():
            timed(step, 5)
        took: dict[str, list[float]] = {name: [] for name in kinds}
        for turn in range(rounds):
            for name in sorted(kinds, reverse=bool(turn % 2)):
                took[name].append(timed(steps[name], updates))
        assert server.stats()["calls"] == calls
    rate = {name: updates / float(np.median(times)) for name, times in took.items()}
    print(f"\n## Warm store\n\nMedian of {rounds} turns of {updates} updates each, in turns.\n")
    print("| labels | updates/s | spread of a turn |\n|---|---|---|")
    for name, times in took.items():
        print(f"| {name} | {rate[name]:.3f} | {np.std(times) / np.mean(times):.1%} |")
    print(
        f"\nWith labels: {rate['warm store'] / rate['none']:.1%} of the rate without.", flush=True
    )


def training(videos: Path, work: Path, words: list[str]) -> Callable[[], None]:
    words = [*words, "size=tiny", "data=folder", f"data.root={videos}", "data.workers=1"]
    cfg = compose(words, RunConfig, ROOT / "conf").config
    module = build_pretrain(cfg)
    data = VideoDataModule(cfg.data, cfg.vlm, cfg.pretrain.batch_size, work, cfg.seed)
    batches, optimizer = iter(data.train_dataloader()), module.configure_optimizers()

    def step() -> None:
        loss = module.world_model.loss(next(batches)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def timed(step: Callable[[], None], count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        step()
    return time.perf_counter() - started


def kills(folder: Path, count: int = 20) -> None:
    videos = make_videos(folder / "videos", 8, 303)
    rng, killed = random.Random(0), 0
    with running(seconds=SECONDS, at_once=AT_ONCE, schema="ignored") as server:
        words = at(server, AT_ONCE)
        Job(videos, folder / "calm", **words).finish()
        windows = server.stats()["calls"]
        for _ in range(count):
            job = Job(videos, folder / "wild", **words)
            time.sleep(rng.uniform(0.1, 1.4))
            killed += job.kill()
        said = Job(videos, folder / "wild", **words).finish()
        time.sleep(1.0)
        calls = server.stats()["calls"] - windows
        Job(videos, folder / "wild", **words).finish()
        again = server.stats()["calls"] - windows - calls
    for name in ("calm", "wild"):
        labels.export_labels(folder / name / "labels", folder / f"{name}.parquet")
    same = (folder / "calm.parquet").read_bytes() == (folder / "wild.parquet").read_bytes()
    print(f"\n## Killed with -9, {killed} times\n\nLast run: {said}.\n")
    print("| unique windows | questions | allowed | questions of a second run | tables |")
    print("|---|---|---|---|---|")
    allowed = windows + killed * AT_ONCE
    print(f"| {windows} | {calls} | {allowed} | {again} | {'identical' if same else 'DIFFER'} |")
    assert same
    assert calls <= allowed
    assert again == 0


def outage(folder: Path, seconds: float = 60.0) -> None:
    """The server dies in the middle of pre-training and comes back."""
    videos = make_videos(folder / "videos", 8, 203)
    print(f"\n## The server dies for {seconds:.0f} s while pre-training\n")
    print("| vlm.server.on_outage | seconds until training ended | updates | labels | log |")
    print("|---|---|---|---|---|")
    for policy in ("wait", "skip"):
        with running(seconds=SECONDS, at_once=AT_ONCE, schema="ignored") as server:
            words = ["env=toy", "trainer=debug", "stage=pretrain", "data=folder", "data.workers=1"]
            words += ["world_model.image.channels=[4,8,16]", f"data.root={videos}"]
            words += ["vlm=openai_server", f"vlm.server.base_url={server.url}"]
            words += [f"vlm.server.on_outage={policy}"]
            words += ["pretrain.updates=60", "pretrain.validate_every=60", f"run_dir={policy}"]
            words += [f"work_dir={policy}-work", "callbacks.rollout_every=100"]
            job = subprocess.Popen(
                [sys.executable, str(ROOT / "train.py"), *words],
                cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )  # fmt: skip
            while server.stats()["calls"] < 20 and job.poll() is None:
                time.sleep(0.05)
            server.kill()
            threading.Timer(seconds, lambda s=server: s.start(s.port)).start()
            started = time.monotonic()
            said, _ = job.communicate()
            took = time.monotonic() - started
            time.sleep(max(0.0, seconds + 3.0 - took))
            stored = corpus(videos, folder / f"{policy}-none").windows
        assert job.returncode == 0, said
        updates = re.findall(r"(\d+)/60 ", said)[-1]
        kept = len(labels.LabelStore(folder / f"{policy}-work/labels", "r").items())
        lines = [x for x in said.splitlines() if "no answer for" in x or "come again" in x]
        shown = "; ".join(re.sub(r" \(http.*?\);", ",", line) for line in lines)
        print(f"| {policy} | {took:.0f} | {updates} | {kept} of {stored} | {shown} |", flush=True)


if __name__ == "__main__":
    parts = {"cold": cold, "warm": warm, "kills": kills, "outage": outage}
    for name in sys.argv[1:] or parts:
        with tempfile.TemporaryDirectory() as place:
            (Path(place) / "videos").mkdir()
            parts[name](Path(place))
