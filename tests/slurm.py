"""A SLURM of one machine: `sbatch`, `srun`, `scontrol` and `scancel` that really start processes.

They know what scripts of this project, and of submitit, use: arrays, tasks, jobs that wait for the
end of others, requeueing, output files, signals; `sacct` tells what became of jobs. Jobs start at
once, and options that are about machines (memory, GPUs, time) change nothing. Each job has a folder
below `$FAKE_SLURM`, which is all that the commands share.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

COMMANDS = ("sbatch", "srun", "scontrol", "scancel", "sacct")
PATIENCE = 600  # seconds after which a job counts as hanging


class Slurm:
    """What a test sees of it.

    Args:
        folder: Of the commands and of all jobs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        for name in COMMANDS:
            self.add(name, f'exec {shlex.quote(sys.executable)} {__file__} {name} "$@"')
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MAPO_RUN"))}
        self.environment = outside | {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "FAKE_SLURM": str(folder),
        }

    def add(self, name: str, script: str) -> None:
        """Put a command on the PATH of all jobs."""
        (self.bin / name).write_text(f"#!/bin/bash\n{script}\n")
        (self.bin / name).chmod(0o755)

    def submit(self, folder: Path, *words: str) -> list[int]:
        """Call sbatch in a folder; returns the number of each job, one per task of an array."""
        said = subprocess.run(
            ["sbatch", *words], cwd=folder, env=self.environment, check=True,
            capture_output=True, text=True,
        ).stdout  # fmt: skip
        number = int(said.split()[-1])
        return [job for job in self.jobs() if self.about(job)["array_job"] == number]

    def about(self, job: int) -> dict[str, Any]:
        """What the fake knows of a job; `code` is there once it has ended."""
        found: dict[str, Any] = json.loads((self.folder / str(job) / "job.json").read_text())
        return found

    def jobs(self) -> list[int]:
        """Numbers of all jobs so far."""
        return sorted(int(path.parent.name) for path in self.folder.glob("*/job.json"))

    def signal(self, job: int, number: signal.Signals, *, batch: bool = False) -> None:
        """Send what `--signal=USR1@300` (or, with ``batch``, `B:USR1@300`) sends near the end."""
        deliver(self.folder / str(job), number, batch)

    def wait(self, job: int) -> int:
        """Wait for the end of a job, restarts included; returns its exit code."""
        deadline = time.monotonic() + PATIENCE
        while "code" not in self.about(job):
            assert time.monotonic() < deadline, f"job {job} does not end"
            time.sleep(0.05)
        return int(self.about(job)["code"])

    def end(self) -> None:
        """Kill what is still running."""
        for job in self.jobs():
            if "code" not in self.about(job):
                with contextlib.suppress(psutil.NoSuchProcess):
                    runner = psutil.Process(self.about(job)["runner"])
                    for process in [*runner.children(recursive=True), runner]:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            process.kill()


@contextlib.contextmanager
def fake_slurm(folder: Path) -> Iterator[Slurm]:
    """A cluster for one test; its jobs end with it."""
    slurm = Slurm(folder)
    try:
        yield slurm
    finally:
        slurm.end()


def deliver(job: Path, number: signal.Signals, batch: bool = False) -> None:
    """Send a signal to every process of a job's steps, or to its batch shell."""
    name = "batch.pid" if batch else "step-*.pid"
    for path in job.glob(name):
        with contextlib.suppress(psutil.NoSuchProcess):
            first = psutil.Process(int(path.read_text()))
            for process in [first] if batch else [*first.children(recursive=True), first]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)


def note(job: Path, **facts: object) -> None:
    path = job / "job.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    draft = job / "job.json.part"
    draft.write_text(json.dumps(known | facts))
    draft.replace(path)


def options_of(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Leading options by long name, and the words after them."""
    short = {"n": "ntasks", "N": "nodes", "J": "job-name", "o": "output", "a": "array"}
    found: dict[str, str] = {}
    rest = list(words)
    while rest and rest[0].startswith("-"):
        name, equals, value = rest.pop(0).lstrip("-").partition("=")
        flags = ["requeue", "no-requeue", "exclusive", "overlap", "parsable", "kill-on-bad-exit"]
        flags += ["unbuffered"]
        if not equals and name not in flags and rest:
            value = rest.pop(0)
        found[short.get(name, name)] = value
    return found, rest


def tasks_of(array: str) -> list[int]:
    found: list[int] = []
    for part in array.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def sbatch(words: list[str]) -> int:
    folder = Path(os.environ["FAKE_SLURM"])
    given, (script, *arguments) = options_of(words)
    lines = re.findall(r"^#SBATCH +([^#\n]+)", Path(script).read_text(), re.M)
    asked = options_of(shlex.split(" ".join(lines)))[0] | given
    tasks: list[int | None] = [*tasks_of(asked["array"])] if "array" in asked else [None]
    first = 1001 + sum(1 for _ in folder.glob("*/job.json"))
    for number, task in enumerate(tasks, first):
        job = folder / str(number)
        job.mkdir()
        (job / "script").write_text(Path(script).read_text())
        note(job, array_job=first, task=task, options=asked, arguments=arguments)
        with (job / "runner.out").open("w") as out:
            runner = subprocess.Popen(
                [sys.executable, __file__, "run", str(job)], start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            )  # fmt: skip
        note(job, runner=runner.pid)
        (job / "go").touch()
    sys.stdout.write(f"Submitted batch job {first}\n")
    return 0


def run(job: Path) -> int:
    """Start a job's script, and start it again each time it was requeued."""
    while not (job / "go").exists():
        time.sleep(0.01)
    about = json.loads((job / "job.json").read_text())
    asked, task = about["options"], about["task"]
    for before in re.findall(r"\d+", asked.get("dependency", "")):  # afterany:1001:1004
        while any("code" not in json.loads(x.read_text()) for x in array_of(job.parent, before)):
            time.sleep(0.05)
    ids = {"SLURM_JOB_ID": job.name, "SLURM_JOBID": job.name}
    if task is not None:
        ids |= {"SLURM_ARRAY_JOB_ID": str(about["array_job"]), "SLURM_ARRAY_TASK_ID": str(task)}
    output = file_name(asked.get("output", "slurm-%j.out"), about, job.name)
    ids |= {"SLURM_JOB_NAME": asked.get("job-name", "sbatch"), "SLURM_JOB_NODELIST": "localhost"}
    ids |= {"SLURM_NODELIST": "localhost", "SLURM_SUBMIT_DIR": os.getcwd(), "SLURM_PROCID": "0"}
    ids |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": asked.get("nodes", "1")}
    for option in ("ntasks", "ntasks-per-node"):
        if option in asked:
            ids[f"SLURM_{option.replace('-', '_').upper()}"] = asked[option]
    for restart in range(100):
        if restart:
            ids["SLURM_RESTART_COUNT"] = str(restart)
        (job / "requeue").unlink(missing_ok=True)
        with open(output, "a") as out:
            batch = subprocess.Popen(
                ["bash", str(job / "script"), *about["arguments"]], env=os.environ | ids,
                stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            )  # fmt: skip
        (job / "batch.pid").write_text(str(batch.pid))
        code = batch.wait()
        if not (job / "requeue").exists():
            note(job, restarts=restart, code=code if code >= 0 else 128 - code)
            return 0
    raise AssertionError("a hundred restarts")


def array_of(folder: Path, number: str) -> list[Path]:
    """What is known of the tasks of an array, or of the only one of a job."""
    paths = folder.glob("*/job.json")
    return [x for x in paths if json.loads(x.read_text())["array_job"] == int(number)]


def file_name(pattern: str, about: dict[str, Any], job: str, rank: int = 0) -> str:
    """Fill in the pattern of an output file."""
    filled = {"%j": job, "%A": about["array_job"], "%a": about["task"], "%t": rank}
    filled["%x"] = about["options"].get("job-name", "x")
    for sign, value in filled.items():
        pattern = pattern.replace(sign, str(value))
    return pattern


def srun(words: list[str]) -> int:
    """Start tasks; the highest exit code counts, and a task that fails ends the others."""
    asked, command = options_of(words)
    count = int(asked.get("ntasks", os.environ.get("SLURM_NTASKS", "1")))
    job = Path(os.environ["FAKE_SLURM"]) / os.environ["SLURM_JOB_ID"]
    step = sum(1 for _ in job.glob("step-*-0.pid"))
    both = {"SLURM_NTASKS": str(count), "SLURM_STEP_ID": str(step)}
    both["SLURM_STEP_NUM_TASKS"] = str(count)
    tasks, about = [], json.loads((job / "job.json").read_text())
    for number in range(count):
        out = None
        if "output" in asked:
            out = open(file_name(asked["output"], about, job.name, number), "a")  # noqa: SIM115
        own = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number), "SLURM_NODEID": "0"}
        tasks.append(subprocess.Popen(command, env=os.environ | both | own, stdout=out, stderr=out))
        (job / f"step-{step}-{number}.pid").write_text(str(tasks[-1].pid))
    for caught in (signal.SIGTERM, signal.SIGINT):
        signal.signal(caught, lambda number, _: [task.send_signal(number) for task in tasks])
    while any(task.poll() is None for task in tasks):
        if "kill-on-bad-exit" in asked and any(task.returncode for task in tasks):
            for task in tasks:
                task.kill()
        time.sleep(0.02)
    return max(t.returncode if t.returncode >= 0 else 128 - t.returncode for t in tasks)


def scontrol(words: list[str]) -> int:
    if words[:2] == ["show", "hostnames"]:
        sys.stdout.write("localhost\n")
        return 0
    if words[0] != "requeue":
        sys.stderr.write(f"invalid keyword: {words[0]}\n")
        return 1
    for job in jobs_called(words[1]):
        (job / "requeue").touch()
        deliver(job, signal.SIGTERM)
        deliver(job, signal.SIGTERM, batch=True)
    return 0


def scancel(words: list[str]) -> int:
    asked, names = options_of(words)
    number = signal.Signals[f"SIG{asked.get('signal', 'TERM').removeprefix('SIG')}"]
    for name in names:
        for job in jobs_called(name):
            deliver(job, number)
            if "signal" not in asked:
                deliver(job, number, batch=True)
    return 0


def sacct(words: list[str]) -> int:
    """Tell the states of jobs, as `--parsable2 -o JobID,State,NodeList -j 1001` does."""
    numbers = [value for option, value in pairwise(words) if option == "-j"]
    lines = ["JobID|State|NodeList"]
    for number in numbers:
        for path in array_of(Path(os.environ["FAKE_SLURM"]), number):
            about = json.loads(path.read_text())
            name = number if about["task"] is None else f"{number}_{about['task']}"
            ended = "FAILED" if about.get("code") else "COMPLETED"
            lines.append(f"{name}|{ended if 'code' in about else 'RUNNING'}|localhost")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def jobs_called(name: str) -> list[Path]:
    """Folders of a job, of an array (`1001`) or of a task of one (`1001_2`)."""
    array, underscore, task = name.partition("_")
    found = []
    for path in Path(os.environ["FAKE_SLURM"]).glob("*/job.json"):
        about = json.loads(path.read_text())
        if underscore:
            wanted = about["array_job"] == int(array) and about["task"] == int(task)
        else:
            wanted = int(array) in (about["array_job"], int(path.parent.name))
        if wanted and "code" not in about:
            found.append(path.parent)
    if not found:
        raise SystemExit(f"slurm error: Invalid job id {name}")
    return found


if __name__ == "__main__":
    name, *words = sys.argv[1:]
    if name == "run":
        sys.exit(run(Path(words[0])))
    commands = {"sbatch": sbatch, "srun": srun, "scontrol": scontrol, "scancel": scancel}
    commands["sacct"] = sacct
    sys.exit(commands[name](words))
