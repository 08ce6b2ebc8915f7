"""Writes requirements.lock: every pin of constraints.txt, but torch, with the hashes of its files.

pip itself is asked, by its `--report`, for the wheel that each Python of `PYTHONS` would install on
Linux, x86-64. torch is left out: its builds for CPUs and for CUDA have one version and different
files, and which one is right depends on the index that is configured.

    .venv/bin/python .ci/lock.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")
UNLOCKED = ("torch",)
HEAD = """\
# The pins of constraints.txt with the SHA-256 hashes of their wheels for Linux, x86-64, Python 3.11
# and 3.12. Written by .ci/lock.py; do not edit. torch is missing: see there.
"""


def pins() -> list[str]:
    """The lines of constraints.txt that pin a package that can be locked, by name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [line for line in lines if line and not line.startswith("#")]
    return sorted((pin for pin in found if pin.partition("==")[0] not in UNLOCKED), key=str.lower)


def hashes(pin: str, python: str) -> str:
    """SHA-256 of the wheel that pip would install for ``pin``."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
        command += ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version", python]
        command += [word for name in PLATFORMS for word in ("--platform", name)]
        command += ["--target", str(Path(folder) / "nowhere"), "--report", str(report), pin]
        subprocess.run(command, check=True)
        [package] = json.loads(report.read_text())["install"]
    digest: str = package["download_info"]["archive_info"]["hashes"]["sha256"]
    return digest


def main() -> None:
    """Write the lock."""
    lines = [HEAD]
    for pin in pins():
        found = sorted({hashes(pin, python) for python in PYTHONS})
        words = [pin, *(f"--hash=sha256:{digest}" for digest in found)]
        lines.append(" \\\n    ".join(words) + "\n")
    (ROOT / "requirements.lock").write_text("".join(lines))


if __name__ == "__main__":
    main()
