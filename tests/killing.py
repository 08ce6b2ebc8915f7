"""Trains in forked processes that kill themselves at chosen moments, and compares what is left.

A moment is an event of the training, counted from its start, so the same moment comes again
whatever the machine does meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from program import SMALL, end, start

TINY = [
    *SMALL, "world_model.lower={deter: 16, hidden: 16, stoch: 4, classes: 4}",
    "world_model.upper={deter: 16, hidden: 16, stoch: 4, classes: 4}", "world_model.head_units=16",
    "trainer.log_every=2", "evaluate.episodes=1",
    "callbacks={phrases: 0, gallery: 0, quality: 0, told: 0, rollout_every: 9}",
]  # fmt: skip
PRETRAIN = [*TINY, "stage=pretrain", "pretrain.validate_every=6"]
FINETUNE = [
    *TINY, "stage=finetune", "replay.capacity=150", "finetune={initial_updates: 5, prefill: 110}",
]  # fmt: skip
Job = dict[str, Any]
"""``folder``, ``words``, and perhaps ``kill``: number of the moment, ``deliver``: metrics first."""


def lives(jobs: list[Job]) -> list[dict[str, Any]]:
    """Run jobs one after the other; returns the ``code`` of each, and the ``moments`` it had."""
    found = []
    for job in jobs:
        folder = Path(job["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "said.txt").open("a") as said:
            process = start(folder, __file__, json.dumps(job), said=said)
            code = process.wait()
            end(process)  # loader workers
        file = folder / "moments.json"
        found.append(
            {"code": code, "moments": json.loads(file.read_text()) if file.exists() else {}}
        )
        file.unlink(missing_ok=True)
    return found


def differences(one: Any, other: Any, at: str = "") -> Iterator[str]:
    """Where two checkpoints differ, bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for key in one:
            yield from differences(one[key], other[key], f"{at}/{key}")
    elif (
        isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other)
    ):
        for i, (x, y) in enumerate(zip(one, other, strict=True)):
            yield from differences(x, y, f"{at}/{i}")
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.shape == other.shape and one.dtype == other.dtype
        if not same or one.numpy().tobytes() != other.numpy().tobytes():
            yield at
    elif type(one) is not type(other) or (one != other and not (one != one and other != other)):
        yield f"{at}: {one!r:.60} != {other!r:.60}"


def state_of(path: Path) -> dict[str, Any]:
    """All of a checkpoint but what names its folder and MLflow runs, and Lightning's bookkeeping.

    Lightning's loops count some things per process.
    """
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    del content["loops"]
    content["mapo"] = content["mapo"].get("env_frames")
    callbacks = {k: v for k, v in content["callbacks"].items() if "Saving" not in k}
    for name in ("asked", "hits"):  # a label is new to the first run that needs it
        callbacks.get("LabelReport", {}).pop(name, None)
    content["callbacks"] = callbacks
    for name in ("curves", "curves_rows"):  # a run that was extended has two ends
        content.pop(name, None)
    return content


def experience(replay: Path) -> dict[str, str]:
    """Digest of every episode that a replay's newest state names."""
    index = json.loads((replay / "index.json").read_text())
    found = {}
    for episode, length, *_ in [*index["episodes"], *index["open"]]:
        entries = np.load(replay / f"episode-{episode:09d}.npy", allow_pickle=False)[:length]
        found[f"{episode}"] = hashlib.sha256(entries.tobytes()).hexdigest()
    return found


def clocked(name: str) -> bool:
    """Whether a point's value differs from run to run."""
    return name.removeprefix("initial/").startswith(("time/", "vlm/"))


def curves(path: Path, run: str) -> list[tuple[str, int, float]]:
    """All points of a run, sorted; without clocks, and without counts of known and new labels."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        what = "select key, step, value, is_nan from metrics where run_uuid = ?"
        rows = db.execute(what, (run,)).fetchall()
    kept = [row for row in rows if not clocked(row[0])]
    return sorted((key, step, -1e9 if nan else value) for key, step, value, nan in kept)


def clocks(path: Path, run: str) -> list[tuple[str, int]]:
    """Names and steps of the points whose values differ from run to run."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        rows = db.execute("select key, step from metrics where run_uuid = ?", (run,)).fetchall()
    return sorted(row for row in rows if clocked(row[0]))


def runs(path: Path, folder: Path) -> list[tuple[str, str]]:
    """Name and status of the runs of a run's folder, in a store."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        whose = "select run_uuid from tags where key = 'run_dir' and value = ?"
        own = [row[0] for row in db.execute(whose, (str(folder),))]
        children = "select run_uuid from tags where key = 'mlflow.parentRunId' and value = ?"
        own += [row[0] for run in own for row in db.execute(children, (run,))]
        found = "select name, status from runs where run_uuid = ?"
        return sorted(row for run in own for row in db.execute(found, (run,)))


def check_kills(place: Path, words: list[str], phase: str, kills: int, rng: Any) -> dict[str, int]:
    """Kill as many runs at random moments, resume them, and compare them with one left alone."""
    words = [*words, f"work_dir={place}/work", "run_dir=run", "tracking.enabled=true"]
    words += [f"tracking.uri=sqlite:///{place}/mlflow.db", f"tracking.artifacts={place}/artifacts"]
    whole = {"folder": f"{place}/whole", "words": words}
    (first,) = lives([whole])
    assert first["code"] == 0, (place / "whole/said.txt").read_text()
    moments = first["moments"]
    assert moments["resumable"]
    jobs: list[dict[str, Any]] = []
    drawn: list[str] = []
    for number in range(kills):
        kill = int(rng.integers(moments["resumable"] + 1, moments["count"] + 1))
        drawn.append(moments["names"][kill])
        folder, deliver = f"{place}/{number}", bool(rng.integers(2))
        jobs.append({"folder": folder, "words": words, "kill": kill, "deliver": deliver})
        jobs.append({"folder": folder, "words": ["resume=run"]})
    codes = [found["code"] for found in lives(jobs)]
    expected = state_of(place / "whole/run" / phase / "last.ckpt")
    for number in range(kills):
        folder = place / f"{number}"
        said = f"killed at '{drawn[number]}': " + (folder / "said.txt").read_text()
        assert codes[2 * number : 2 * number + 2] == [-9, 0], said
        content = state_of(folder / "run" / phase / "last.ckpt")
        assert list(differences(expected, content)) == [], said
        check_curves(place / "whole", folder, phase, said)
        for replay in sorted((place / "whole/run/replay").glob("rank*")):
            assert experience(folder / "run/replay" / replay.name) == experience(replay), said
    return {name: drawn.count(name) for name in sorted(set(drawn))}


def check_curves(whole: Path, folder: Path, phase: str, said: str) -> None:
    """One MLflow run of the training, with the same points as the one of a run left alone."""
    found = []
    for place in (whole, folder):
        last = torch.load(place / "run" / phase / "last.ckpt", weights_only=True)
        store, run = place.parent / "mlflow.db", last["mapo"]["mlflow_run"]
        phases = {path.parent.name for path in (whole / "run").glob("*/last.ckpt")}
        assert phase in phases
        names = ["run", *(f"run/{name}" for name in sorted(phases))]
        assert runs(store, place / "run") == [(name, "FINISHED") for name in names], said
        found.append((curves(store, run), clocks(store, run)))
    assert found[0][0] == found[1][0], said
    assert found[0][1] == found[1][1], said
    assert len(found[0][0]) > 15


class Moments:
    """Counts the moments of a training, and ends the process at one of them."""

    def __init__(self, kill: int | None, deliver: bool) -> None:
        self.kill, self.deliver, self.count, self.names = kill, deliver, 0, [""]
        self.resumable = 0  # the first moment after which there is a whole checkpoint

    def due(self, name: str) -> bool:
        self.count += 1
        self.names.append(name)
        return self.count == self.kill

    def __call__(self, name: str) -> None:
        if self.due(name):
            self.die()

    def die(self) -> None:
        if self.deliver and self.trainer.logger is not None:
            self.trainer.logger.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """Make moments of updates, of validations, and of every part of writing a checkpoint."""
        import lightning as L

        from mapo_lightning import files
        from mapo_lightning.run import phase

        def callback(name: str) -> Any:
            def hook(_: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
                self.trainer = trainer
                self(name)

            return hook

        hooks = ["train_batch_start", "before_optimizer_step", "train_batch_end"]
        hooks += ["validation_start", "validation_end", "train_end"]
        watcher = type("Watcher", (L.Callback,), {f"on_{h}": callback(h) for h in hooks})
        make = phase.build_trainer
        phase.build_trainer = lambda cfg, n, at, calls, *rest: make(  # type: ignore[assignment]
            cfg, n, at, [*calls, watcher()], *rest
        )
        save, replace = torch.save, os.replace

        def half(content: Any, file: Any, **words: Any) -> None:
            if words:  # not a checkpoint: what one rank sends to another
                save(content, file, **words)
                return
            if self.due("half a checkpoint"):
                whole = io.BytesIO()
                save(content, whole)
                file.write(whole.getvalue()[: whole.tell() // 2])
                file.flush()
                self.die()
            save(content, file)

        def moved(draft: Any, path: Any) -> None:
            if not str(path).endswith((".ckpt", ".npy", "index.json")):
                replace(draft, path)  # labels are new to the first run only
                return
            self(f"before {Path(path).name}")
            replace(draft, path)
            self(f"after {Path(path).name}")
            if str(path).endswith(".ckpt") and not self.resumable:
                self.resumable = self.count

        torch.save = half
        files.os.replace = moved  # type: ignore[assignment]


def live(job: Job) -> None:
    """The program: train, and say which moments there were."""
    from mapo_lightning.run.main import main

    first = os.environ.get("LOCAL_RANK", "0") == "0"  # of several processes, one is killed
    moments = Moments(job.get("kill") if first else None, job.get("deliver", False))
    moments.watch()
    code = main(job["words"])
    if not first:
        sys.exit(code)
    told = {"count": moments.count, "resumable": moments.resumable, "names": moments.names}
    Path("moments.json").write_text(json.dumps(told))
    sys.exit(code)


if __name__ == "__main__":
    live(json.loads(sys.argv[1]))
