"""Versions of this package and of those it uses, and the state of the git checkout."""

from __future__ import annotations

import platform
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mapo_lightning.config.redact import redact_text

DISTRIBUTION = "mapo-lightning"
_MOST_DIFF = 1_000_000  # characters


class GitState(NamedTuple):
    """State of a checkout."""

    commit: str
    """Full hash of HEAD, or ``none`` before the first commit."""

    dirty: bool
    """Whether tracked files differ from HEAD or untracked files exist."""

    diff: str
    """Differences of tracked files and names of untracked ones, without secrets."""


def package_version() -> str:
    """Return the version of this package."""
    return installed(DISTRIBUTION) or str(_project()["version"])


def supported_pythons() -> SpecifierSet:
    """Return the versions of Python that this package is made for."""
    try:
        declared = metadata.metadata(DISTRIBUTION)["Requires-Python"]
    except metadata.PackageNotFoundError:
        declared = _project()["requires-python"]
    return SpecifierSet(declared)


def _project() -> dict[str, Any]:
    """What the checkout declares, where nothing is installed: Python runs in its folder."""
    path = Path(__file__).resolve().parents[2] / "pyproject.toml"
    project: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    return project


def requirements() -> list[Requirement]:
    """Return what the installed package declares for this machine, extras left out."""
    try:
        declared = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    parsed = [Requirement(text) for text in declared]
    return [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]


def installed(name: str) -> str | None:
    """Return the version of an installed distribution, None where it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Return name -> version of Python, of this package and of what it declares."""
    found = {"python": platform.python_version(), DISTRIBUTION: installed(DISTRIBUTION) or "source"}
    for requirement in requirements():
        found[requirement.name] = installed(requirement.name) or "missing"
    return found


def own_git_state() -> GitState | None:
    """Read the state of the checkout that this package runs from; None if it was installed.

    Never that of another checkout, such as the folder the program was started in or a repository
    around the environment that the package is installed in.
    """
    root = Path(__file__).resolve().parents[2]
    return git_state(root) if (root / ".git").exists() else None


def git_state(root: Path) -> GitState | None:
    """Read the state of the git checkout that holds ``root``.

    Args:
        root: A folder.

    Returns:
        The state, or None where there is no checkout or no git.
    """
    status = _git(root, "status", "--porcelain")
    if status is None:
        return None
    commit = (_git(root, "rev-parse", "--verify", "HEAD") or "none").strip()
    changes = _git(root, "diff", "HEAD") if commit != "none" else ""
    untracked = [line[3:] for line in status.splitlines() if line.startswith("??")]
    diff = (changes or "") + "".join(f"# untracked: {name}\n" for name in untracked)
    if len(diff) > _MOST_DIFF:
        diff = f"{diff[:_MOST_DIFF]}\n# ... shortened, {len(diff)} characters in all\n"
    return GitState(commit, bool(status.strip()), redact_text(diff))


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
