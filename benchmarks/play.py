"""Measures how fast `mapo-play` answers: dreamt frames a second, and from a key to its frame.

    python benchmarks/play.py runs/NAME/finetune/last.ckpt [more checkpoints]

Starts the real server for each checkpoint, on one core with one thread, and talks to it through a
real socket from another process. The rate is that of steps asked for one after the other; every one
of them steps the simulator, every dream, and sends the pictures. Latency is from sending an action,
at a random moment of a play that runs at ``play.fps`` of its default, to the arrival of the first
moment that it led to.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

ROOT = Path(__file__).resolve().parents[1]
STEPS, KEYS = 200, 100


def moment(socket: ClientConnection) -> dict[str, Any]:
    """The next moment, without its pictures; errors of the play end the measurement."""
    while True:
        data = socket.recv(timeout=60)
        if isinstance(data, bytes):
            size = int.from_bytes(data[:4], "little")
            found: dict[str, Any] = json.loads(data[4 : 4 + size])
            return found
        said = json.loads(data)
        if said["is"] == "error":
            raise SystemExit(said["text"])


def say(socket: ClientConnection, **command: Any) -> None:
    socket.send(json.dumps(command))


def rate(socket: ClientConnection) -> float:
    """Steps a second, one asked for after the other; a new episode where one ends."""
    begun, spent = time.perf_counter(), 0.0
    for number in range(STEPS):
        say(socket, do="step")
        if moment(socket)["ended"]:
            pause = time.perf_counter()
            say(socket, do="begin", start=number)
            moment(socket)
            spent += time.perf_counter() - pause
    return STEPS / (time.perf_counter() - begun - spent)


def latencies(socket: ClientConnection, width: int, draw: random.Random) -> list[float]:
    """Seconds from an action to the first moment that it led to."""
    found, start = [], 0
    for serial in range(1, KEYS + 1):
        if serial % 5 == 1:  # before an episode ends, which stops the play
            start += 1
            say(socket, do="begin", start=start)
            moment(socket)
            say(socket, do="run", on=True)
            moment(socket)
        wait = time.perf_counter() + draw.uniform(0.02, 0.12)
        while time.perf_counter() < wait:
            try:
                socket.recv(timeout=max(0.0, wait - time.perf_counter()))
            except TimeoutError:
                break
        sent = time.perf_counter()
        say(socket, do="act", action=[draw.uniform(-1, 1) for _ in range(width)], serial=serial)
        now = moment(socket)
        while now["serial"] < serial:
            now = moment(socket)
        found.append(time.perf_counter() - sent)
    return found


def measure(checkpoint: str, words: list[str], core: int) -> list[Any]:
    """Model, rate, and median and 95 % quantile of the latency in ms."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mapo_lightning.play", f"checkpoint={checkpoint}", *words]
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
        )
        try:
            os.sched_setaffinity(server.pid, {core})
            assert server.stdout is not None
            found = re.search(r"http://(\S+)/\?key=(\S+)", server.stdout.readline())
            if found is None:
                raise SystemExit("the server did not start")
            address = f"ws://{found[1]}/play?key={found[2]}"
            with connect(address, origin=f"http://{found[1]}", proxy=None) as socket:  # type: ignore[arg-type]
                hello = json.loads(socket.recv(timeout=60))
                moment(socket)
                steps = rate(socket)
                seconds = (
                    latencies(socket, hello["width"], random.Random(0)) if hello["width"] else []
                )
        finally:
            server.terminate()
            server.wait()
    ms = sorted(1000 * x for x in seconds)
    late = [f"{statistics.median(ms):.0f}", f"{ms[int(0.95 * len(ms))]:.0f}"] if ms else ["", ""]
    return [hello["names"][0], hello["task"], f"{hello['side']}", f"{steps:.0f}", *late]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="+")
    parser.add_argument("--word", action="append", default=[], help="as of mapo-play")
    parser.add_argument("--core", type=int, default=0)
    options = parser.parse_args()
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"One core, {STEPS} steps, {KEYS} keys; load before (1, 5, 15 minutes): {load}\n")
    print("| model | scene | pixels | dreamt frames/s | key to frame, median ms | 95 % ms |")
    print("|---|---|---|---|---|---|")
    for checkpoint in options.checkpoint:
        path = str(Path(checkpoint).absolute())
        print(
            "| " + " | ".join(map(str, measure(path, options.word, options.core))) + " |",
            flush=True,
        )


if __name__ == "__main__":
    main()
