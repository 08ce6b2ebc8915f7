"""Has a CUDA GPU prove itself: ``mapo-gpu-check [--quick] [--out FILE]``, in under eight minutes.

Without simulators, videos and network. Every method's step on the GPU is compared with the CPU's,
captured updates with updates that run as they are; then they are timed. The report is a file to
paste. The exit code is 0 if everything agrees, 1 if something does not, 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from mapo_lightning.run.config import conf_folder
from mapo_lightning.run.gpu_parts import Part, Row, rows, threads
from mapo_lightning.run.gpu_report import report
from mapo_lightning.run.step_check import VARIANTS

MINUTES = 8.0
"""What all parts may take; those that are left then count as failed."""
_PART = "MAPO_GPU_CHECK_PART"


def parts(quick: bool) -> list[Part]:
    """What is done, the most important first."""
    if quick:
        few = ("mapo", "contextwm", "mapo, transformers")
        return [
            Part("steps", few, "tiny", 2, 12),
            *(Part("capture", (name,), "tiny", 4, 12) for name in few),
            Part("trainer", ("mapo",), "tiny", 4, 12),
            Part("time", ("mapo",), "tiny", 0, 0),
        ]
    files = sorted(path.stem for path in (conf_folder() / "method").glob("*.yaml"))
    names = [name for name in (*files, *VARIANTS) if not name.startswith("ivideogpt")]
    return [
        Part("steps", (), "tiny", 2, 12),
        Part("time", ("contextwm",), "paper", 0, 0),
        *(Part("capture", (name,), "tiny", 4, 12) for name in names),
        Part("trainer", ("mapo",), "tiny", 4, 12),
        Part("capture", ("contextwm",), "paper", 0, 0),
        Part("steps", (*names[:-2], "ivideogpt_semantic"), "paper", 2, 12),
        Part("time", ("mapo",), "tiny", 0, 0),
        Part("compile", ("contextwm",), "paper", 0, 0),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Check this machine's GPU and write the report; return the exit code."""
    parser = argparse.ArgumentParser(prog="mapo-gpu-check", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three methods, two minutes")
    parser.add_argument("--out", type=Path, default=Path("gpu-check.md"), help="the report's file")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.stderr.write(
            f"mapo-gpu-check compares a CUDA GPU with the CPU, and torch {torch.__version__} sees "
            "none on this machine: run it where there is one, with a torch that is built for it\n"
        )
        return 2
    if _PART in os.environ:
        return _child(Part(**json.loads(os.environ[_PART])))
    began, found = time.monotonic(), []
    for part in parts(args.quick):
        for row in in_process(part, began + 60 * MINUTES - time.monotonic()):
            found.append(row)
            sys.stdout.write(f"{VERDICTS[row.ok]:<5}{row.part}: {row.name}: {row.found}\n")
            sys.stdout.flush()
    args.out.write_text(report(found, time.monotonic() - began), encoding="utf-8")
    failed = sum(row.ok is False for row in found)
    sys.stdout.write(f"{failed} of {len(found)} failed; the report to paste: {args.out}\n")
    return int(failed > 0)


VERDICTS = {True: "ok", False: "FAIL", None: "-"}


def _child(part: Part) -> int:
    torch.set_num_threads(threads())
    for row in rows(part._replace(methods=tuple(part.methods)), torch.device("cuda")):
        sys.stdout.write(json.dumps(row._asdict()) + "\n")
        sys.stdout.flush()
    return 0


def _end(process: subprocess.Popen[str]) -> None:
    """Kill a process and those that it has started, such as compilers, which hold its output."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def in_process(part: Part, seconds: float, program: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a part that a process of its own finds, and one more if that ends badly.

    Each is given on as it comes.

    Args:
        part: What it does.
        seconds: How long it may take.
        program: What to start instead of this program.
    """
    late = None if part.kind == "compile" else False  # compiling is no part of the verdict
    if seconds < 1.0:
        yield Row(part.kind, part.name, late, f"not run: the {MINUTES:g} minutes were over")
        return
    # For equal sums: cuBLAS reads this when it is loaded.
    environment = os.environ | {
        _PART: json.dumps(part._asdict()),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    command = [*program] or [sys.executable, "-m", "mapo_lightning.gpu_check"]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True,
            start_new_session=True,
        )  # fmt: skip
        stopping = threading.Timer(seconds, _end, [process])
        stopping.start()
        assert process.stdout is not None
        try:
            with process.stdout as said:
                for line in said:
                    if line.startswith("{"):
                        try:
                            yield Row(**json.loads(line))
                        except ValueError:  # its last line, cut off
                            continue
            code, stopped = process.wait(), not stopping.is_alive()
        finally:  # whoever reads may have stopped, too
            stopping.cancel()
            _end(process)
        errors.seek(0)
        last = (errors.read().strip().splitlines() or ["nothing"])[-1]
    if stopped:
        yield Row(part.kind, part.name, late, f"stopped: the {MINUTES:g} minutes were over")
    elif code:
        yield Row(part.kind, part.name, False, f"the process ended with {code}: {last}")


if __name__ == "__main__":
    sys.exit(main())
