from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

from mapo_lightning.tracking import versions as versions_module
from mapo_lightning.tracking.versions import git_state, own_git_state, versions


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    words = ("-c", "core.hooksPath=", "-c", "commit.gpgsign=false", *words)
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True)


def test_the_state_of_a_checkout(tmp_path: Path) -> None:
    git(tmp_path, "init")
    (tmp_path / "a.txt").write_text("one\n")
    before = git_state(tmp_path)
    assert before is not None
    assert (before.commit, before.dirty) == ("none", True)
    assert before.diff == "# untracked: a.txt\n"

    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    clean = git_state(tmp_path)
    assert clean is not None
    assert (len(clean.commit), clean.dirty, clean.diff) == (40, False, "")

    (tmp_path / "a.txt").write_text("two http://me:canary@host\n")
    dirty = git_state(tmp_path)
    assert dirty is not None
    assert dirty.commit == clean.commit
    assert dirty.dirty
    assert "+two http://***@host" in dirty.diff


def test_no_checkout_is_no_error(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    assert git_state(tmp_path / "missing") is None


def test_versions_are_those_that_python_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = [Requirement("numpy>=1"), Requirement("no-such-package")]
    monkeypatch.setattr(versions_module, "requirements", lambda: declared)
    found = versions()
    assert found["numpy"] == np.__version__
    assert found["no-such-package"] == "missing"
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))


def test_an_installed_package_has_no_git_state_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where the environment lies inside the repository of somebody's project."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    file = tmp_path / ".venv/lib/site-packages/mapo_lightning/tracking/versions.py"
    file.parent.mkdir(parents=True)
    monkeypatch.setattr(versions_module, "__file__", str(file))
    assert git_state(file.parent) is not None
    assert own_git_state() is None
