"""Checks the machine, one line per check: ``mapo-doctor [--json]``.

Its output belongs in a bug report. The exit code is 1 if something that a run needs fails.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import Version

from mapo_lightning.tracking.versions import (
    installed,
    requirements,
    supported_pythons,
    versions,
)
from mapo_lightning.types import MapoError

Verdict = Literal["ok", "WARN", "FAIL"]

_CHECKOUT = Path(__file__).resolve().parents[2]
# A checkout has a Makefile; an installed package lies beside all the others.
_REPAIR = (
    "make setup"
    if (_CHECKOUT / "Makefile").is_file()
    else "pip install --upgrade --force-reinstall mapo-lightning"
)

_GIB = 2**30
_DISK_WARN, _DISK_FAIL = 5 * _GIB, _GIB // 2
_RAM_WARN = 3 * _GIB


@dataclass(frozen=True)
class Check:
    """What one check found."""

    name: str
    verdict: Verdict
    found: str
    """What is the case."""
    do: str = ""
    """What to do about it; empty where nothing is wrong."""

    def line(self) -> str:
        """Return the check on one line."""
        advice = f" -> {self.do}" if self.do else ""
        return " ".join(f"{self.verdict:<5}{self.name:<14}{self.found}{advice}".split("\n"))


def check_python(version: str | None = None) -> Check:
    """The interpreter against what the package is made for."""
    version = version or platform.python_version()
    supported = supported_pythons()
    if not supported.contains(version, prereleases=True):
        found = f"Python {version}, this package needs {supported}"
        advice = (
            "make a new environment with Python 3.11 or 3.12: labmaze, which dm_control needs, has "
            "no wheel for later ones"
        )
        return Check("python", "FAIL", found, advice)
    return Check("python", "ok", f"{version} at {sys.executable}")


def check_platform() -> Check:
    """System, processors, threads and accelerators."""
    import torch

    cores = os.cpu_count() or 1
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = (
        f"{platform.platform()}, {cores} cores, "
        f"torch threads {torch.get_num_threads()}, GPU: {', '.join(gpus) or 'none'}"
    )
    return Check("platform", "ok", found)


def check_memory() -> Check:
    """Free memory, in GiB."""
    import psutil

    memory = psutil.virtual_memory()
    found = f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free"
    if memory.available < _RAM_WARN:
        return Check("memory", "WARN", found, "the demo wants 3 GiB: close other programs")
    return Check("memory", "ok", found)


def check_disk(folder: Path | None = None) -> Check:
    """Free disk space where runs and videos are written, in GiB."""
    folder = folder or Path.cwd()
    free = shutil.disk_usage(folder).free
    found = f"{free / _GIB:.1f} GiB free at {folder}"
    if free < _DISK_FAIL:
        return Check("disk", "FAIL", found, "make room: a demo run writes about 0.5 GiB")
    if free < _DISK_WARN:
        return Check("disk", "WARN", found, "longer runs keep their experience on disk: make room")
    return Check("disk", "ok", found)


def check_versions(declared: Sequence[Requirement] | None = None) -> Check:
    """Installed versions against what the package declares."""
    declared = requirements() if declared is None else declared
    if not declared:
        return Check(
            "versions", "WARN", "the package is not installed, so it declares nothing", _REPAIR
        )
    wrong = [
        f"{r.name} {installed(r.name) or 'missing'} (wants {r.specifier or 'any'})"
        for r in declared
        if installed(r.name) is None
        or not r.specifier.contains(installed(r.name) or "", prereleases=True)
    ]
    if wrong:
        return Check("versions", "FAIL", "; ".join(wrong), _REPAIR)
    listed = ", ".join(f"{name} {version}" for name, version in versions().items())
    return Check("versions", "ok", listed)


def check_pins(constraints: Path | None = None) -> Check:
    """Installed versions against the set that was run together."""
    path = constraints or _CHECKOUT / "constraints.txt"
    if not path.is_file():
        return Check("pins", "ok", "no constraints.txt here: installed without a checkout")
    other = []
    for line in path.read_text(encoding="utf-8").splitlines():
        pin = _pin(line)
        here = installed(pin.name) if pin else None
        if pin and here and not pin.specifier.contains(here, prereleases=True):
            other.append(f"{pin.name} {here} ({pin.specifier} was run)")
    if other:
        found = f"{len(other)} differ: " + "; ".join(other[:6])
        return Check("pins", "WARN", found, "make setup brings the set that was run together")
    return Check("pins", "ok", f"all that is installed agrees with {path.name}")


def _pin(line: str) -> Requirement | None:
    text = line.partition("#")[0].strip()
    try:
        return Requirement(text) if text else None
    except InvalidRequirement:
        return None


def check_combinations(version: Callable[[str], str | None] = installed) -> Check:
    """Pairs of versions that are known to fail together."""

    def at_least(name: str, least: str) -> bool:
        found = version(name)
        return found is not None and Version(found) >= Version(least)

    bad = []
    if at_least("mujoco", "3.17") and version("metaworld"):
        bad.append(f"mujoco {version('mujoco')} breaks Meta-World: pip install 'mujoco<3.17'")
    if at_least("mujoco", "4"):
        bad.append("mujoco 4 breaks dm_control: use a fresh environment with mujoco 3.16.0")
    if at_least("numpy", "2.4") and version("dm_control") and not at_least("dm_control", "1.0.36"):
        bad.append("dm_control before 1.0.36 fails with numpy 2.4: pip install dm_control==1.0.49")
    if version("lightning") in ("2.6.2", "2.6.3"):
        bad.append("this lightning steals credentials: uninstall it and change your passwords")
    if version("decord") and version("decord2"):
        bad.append("decord and decord2 overwrite each other: keep one of them")
    if at_least("torch", "0") and not at_least("torch", "2.10"):
        bad.append("torch before 2.10 can be attacked through checkpoints: raise it")
    if bad:
        return Check("combinations", "FAIL", f"{len(bad)} known to fail", "; ".join(bad))
    return Check("combinations", "ok", "none of those known to fail")


def check_gl() -> Check:
    """Rendering without a display."""
    from mapo_lightning.envs.gl import prepare_gl

    return Check("rendering", "ok", f"MUJOCO_GL={prepare_gl()} draws")


def check_video() -> Check:
    """Encoding and decoding of a short video."""
    from mapo_lightning.data.video import probe_video, read_frames, write_mp4

    ramp_THWC = np.zeros((8, 64, 64, 3), np.uint8)
    ramp_THWC += (np.arange(8, dtype=np.uint8) * 30)[:, None, None, None]
    with tempfile.TemporaryDirectory(prefix="mapo-") as place:
        path = Path(place) / "ramp.mp4"
        write_mp4(path, ramp_THWC, 10.0)
        count = probe_video(path).frames
        last = read_frames(path, [7], 64)[0]
    miss = float(np.abs(last.astype(float) - 210).mean())
    if count != 8 or miss > 20:
        found = f"8 frames written, {count} read, last one off by {miss:.0f} of 255"
        return Check("video", "FAIL", found, f"reinstall decord and av: {_REPAIR}")
    return Check("video", "ok", "an H.264 file is written and read back, frame by frame")


def check_store() -> Check:
    """The MLflow store of this folder; a new one is tried elsewhere where there is none."""
    from mapo_lightning.tracking.logger import open_store
    from mapo_lightning.tracking.settings import TrackingConfig

    if Path("runs/mlflow.db").is_file():
        open_store(TrackingConfig())
        return Check("tracking", "ok", "runs/mlflow.db opens")
    with tempfile.TemporaryDirectory(prefix="mapo-") as place:
        open_store(TrackingConfig(uri=f"sqlite:///{place}/mlflow.db", artifacts=place))
    return Check("tracking", "ok", "no runs yet; a new MLflow store can be made")


def check_describer() -> Check:
    """The offline describer, on a bright square that moves to the right."""
    from mapo_lightning.semantics.flow import FlowDescriber

    frames_THWC = np.full((4, 128, 128, 3), 40, np.uint8)
    texture = np.random.default_rng(0).integers(80, 255, (40, 40, 3), dtype=np.uint8)
    for t in range(4):
        frames_THWC[t, 44:84, 20 + 8 * t : 60 + 8 * t] = texture
    text = FlowDescriber().describe([frames_THWC])[0].text
    if "right" not in text:
        return Check("describer", "FAIL", f"a square moves right, it says {text!r}", _REPAIR)
    return Check("describer", "ok", f"flow: {text}")


CHECKS: tuple[tuple[str, Callable[[], Check]], ...] = (
    ("python", check_python),
    ("platform", check_platform),
    ("memory", check_memory),
    ("disk", check_disk),
    ("versions", check_versions),
    ("pins", check_pins),
    ("combinations", check_combinations),
    ("rendering", check_gl),
    ("video", check_video),
    ("tracking", check_store),
    ("describer", check_describer),
)


def run_check(name: str, check: Callable[[], Check]) -> Check:
    """Run one check; whatever goes wrong in it is its finding."""
    try:
        return check()
    except MapoError as error:
        return Check(name, "FAIL", str(error))
    except Exception as error:  # a broken installation may raise anything
        return Check(name, "FAIL", f"{type(error).__name__}: {error}", _REPAIR)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all checks and write their findings; return the exit code."""
    parser = argparse.ArgumentParser(prog="mapo-doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="write one JSON object")
    wants_json = parser.parse_args(argv).json
    found: list[Check] = []
    for name, check in CHECKS:
        found.append(run_check(name, check))
        if not wants_json:
            sys.stdout.write(found[-1].line() + "\n")
            sys.stdout.flush()
    failed = any(check.verdict == "FAIL" for check in found)
    if wants_json:
        text = json.dumps({"ok": not failed, "checks": [asdict(c) for c in found]}, indent=1)
        sys.stdout.write(text + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
