"""Examines videos in processes of their own, whose memory and CPU time are limited.

A video from a stranger may be made to exhaust memory or time, or to crash a decoder. A child
process decodes it first, under `resource` limits; it ends, and its video is set aside. The child
speaks JSON lines over its standard input and output, and imports neither torch nor Lightning.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mapo_lightning.data.reader import FrameSource
from mapo_lightning.data.settings import LimitsConfig
from mapo_lightning.data.video_info import Limits, VideoFileError, inaccessible

Facts = dict[str, Any]
"""What is known about a video, as plain JSON; ``reason`` is None where it can be used."""

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from mapo_lightning.data.examiner import serve; serve(json.loads(sys.argv[2]))"
)
_KEPT = ("frames", "width", "height", "fps", "access", "times")
_PARENT_DEATH = 1  # PR_SET_PDEATHSIG of prctl(2)
_OF_OTHERS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # not the video's fault


def examine(source: FrameSource, max_undecodable: float, limits: LimitsConfig) -> Facts:
    """Decode a video in full, in this process.

    Args:
        source: The video.
        max_undecodable: Share of lost frames above which it is rejected.
        limits: What its header may promise; memory and CPU time are those of this process.
    """
    try:
        info = source.examine(max_undecodable, Limits(limits.pixels, limits.frames, limits.hours))
    except VideoFileError as error:
        if isinstance(error.__cause__, MemoryError):
            return _too_much_memory(limits)
        return {"reason": error.reason, "detail": error.detail}
    except MemoryError:
        return _too_much_memory(limits)
    return {key: getattr(info, key) for key in _KEPT} | {"reason": None}


def _too_much_memory(limits: LimitsConfig) -> Facts:
    detail = f"examining it takes more than {limits.memory_mb} MB of memory (data.limits.memory_mb)"
    return {"reason": "too_large", "detail": detail}


class Examiner:
    """Hands videos to child processes; its methods may be called from several threads.

    Each call uses an idle child, or starts one; `close` ends them all.

    Args:
        max_undecodable: As `examine`.
        limits: As `examine`, and the memory and the CPU time of each child.
    """

    def __init__(self, max_undecodable: float, limits: LimitsConfig) -> None:
        self.max_undecodable, self.limits = max_undecodable, limits
        self._lock = threading.Lock()
        self._idle: list[subprocess.Popen[str]] = []
        self._all: set[subprocess.Popen[str]] = set()
        self._closed = False

    def examine(self, source: FrameSource) -> Facts:
        """Decode a video in full, in a child process.

        Returns:
            Its facts. A video that a child did not survive has a reason as well.
        """
        child = self._take()
        numbers = source.numbers
        steps = None if numbers is None else [numbers.start, numbers.stop, numbers.step]
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(json.dumps({"path": str(source.path), "numbers": steps}) + "\n")
            child.stdin.flush()
            answer = child.stdout.readline()
        except OSError:  # it has ended
            answer = ""
        if answer.endswith("\n"):
            with self._lock:
                self._idle.append(child)
            facts: Facts = json.loads(answer)
            return facts
        self._end(child)
        return self._reason(source.path, child.returncode)

    def close(self) -> None:
        """End all children, also those that are examining a video."""
        with self._lock:
            self._closed = True
            children, idle = list(self._all), list(self._idle)
        for child in children:
            child.kill()
        for child in children:
            child.wait()
        # The pipes of a busy child are left to the thread that reads them: it finds their end now.
        for child in idle:
            self._end(child)

    def _take(self) -> subprocess.Popen[str]:
        with self._lock:
            if self._closed:
                raise RuntimeError("the scan was ended")
            if self._idle:
                return self._idle.pop()
            words = [json.dumps(sys.path), json.dumps([self.max_undecodable, asdict(self.limits)])]
            # -P: a file json.py in the current folder is not imported.
            child = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
            self._all.add(child)
            return child

    def _end(self, child: subprocess.Popen[str]) -> None:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None and not pipe.closed:
                with contextlib.suppress(OSError):  # what was still to be written to it
                    pipe.close()
        with self._lock:
            self._all.discard(child)

    def _reason(self, path: Path, code: int) -> Facts:
        """Why a child ended while it examined a video."""
        if code == -signal.SIGXCPU:
            seconds = self.limits.cpu_seconds
            detail = (
                f"examining it takes more than {seconds:g} s of CPU time (data.limits.cpu_seconds)"
            )
            return {"reason": "too_large", "detail": detail}
        if -code in _OF_OTHERS:
            ended = RuntimeError(f"the process that decoded it was ended by signal {-code}")
            error = inaccessible(path, ended)
            return {"reason": error.reason, "detail": error.detail}
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        detail = f"a decoder crashes on it ({how}); check it with ffprobe, or leave it out"
        return {"reason": "damaged", "detail": detail}


def serve(words: list[Any]) -> None:
    """Be a child: examine what standard input names, until it ends.

    Args:
        words: Largest share of lost frames, and the limits as a dictionary.
    """
    max_undecodable, limits = words[0], LimitsConfig(**words[1])
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a decoder prints is no answer
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _lower(resource.RLIMIT_AS, limits.memory_mb << 20)
    for line in sys.stdin:
        asked = json.loads(line)
        used = resource.getrusage(resource.RUSAGE_SELF)
        _lower(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + limits.cpu_seconds))
        numbers = None if asked["numbers"] is None else range(*asked["numbers"])
        facts = examine(FrameSource(Path(asked["path"]), numbers), max_undecodable, limits)
        answers.write(json.dumps(facts) + "\n")
        answers.flush()


def _lower(kind: int, limit: int) -> None:
    """Set a soft limit of this process; a lower hard one, set from outside, stays."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _die_with_parent() -> None:
    """Have the kernel end this process when its parent ends, however that happens (Linux)."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PARENT_DEATH, signal.SIGKILL)
    if os.getppid() != parent or parent == 1:  # it ended before
        sys.exit(1)
