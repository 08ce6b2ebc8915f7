"""What a newcomer types before any Python of ours runs: Makefile, constraints, pyproject."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "requirements.lock"):
        shutil.copy(root / name, tmp_path)
    return tmp_path


def make(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    # MAKEFLAGS of a surrounding `make test` would leak in.
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    return subprocess.run(
        ["make", *words],
        cwd=folder,
        env={**clean, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.mark.slow
def test_the_pages_are_served_to_this_machine_only(checkout: Path) -> None:
    commands = make(checkout, "-n", "ui").stdout
    assert "--host 127.0.0.1" in commands
    assert "0.0.0.0" not in commands


def test_help_lists_every_target_a_user_may_type(checkout: Path) -> None:
    out = make(checkout).stdout
    for target in ("demo", "vlm-check", "test", "ui", "setup", "doctor", "format", "clean", "help"):
        assert f"make {target} " in out


def test_a_python_without_venv_gets_one_clear_line(checkout: Path) -> None:
    # Debian's python3 without python3-venv: runs, but cannot import ensurepip.
    python = script(
        checkout / "python3",
        f'case "$2" in *ensurepip*) exit 1;; esac; exec {sys.executable} "$@"',
    )
    done = make(checkout, "setup", "GL=skip", f"PYTHON={python}")
    assert done.returncode != 0
    assert "sudo apt-get install -y python3-venv" in done.stderr
    assert not (checkout / ".venv").exists()


def test_an_old_python_is_refused(checkout: Path) -> None:
    python = script(checkout / "python3", 'case "$2" in *version_info*) exit 1;; esac')
    done = make(checkout, "setup", "GL=skip", f"PYTHON={python}")
    assert done.returncode != 0
    assert "older than 3.11" in done.stderr


def test_missing_gl_without_root_gives_the_line_to_type(checkout: Path) -> None:
    tools = checkout / "tools"
    tools.mkdir()
    python = script(tools / "python3", "exit 1")  # cannot load libEGL
    script(tools / "id", "echo 1000")
    script(tools / "sudo", "exit 1")
    script(tools / "apt-get", "echo called; exit 1")
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    done = make(checkout, "gl", f"PYTHON={python}", PATH=path)
    assert done.returncode != 0
    assert "sudo apt-get update && sudo apt-get install -y libegl1 libgl1" in done.stderr
    assert "called" not in done.stdout
    assert make(checkout, "gl", "GL=skip", f"PYTHON={python}", PATH=path).returncode == 0


def test_missing_gl_is_installed_with_sudo_where_it_asks_nothing(checkout: Path) -> None:
    tools = checkout / "tools"
    tools.mkdir()
    python = script(tools / "python3", "exit 1")
    script(tools / "id", "echo 1000")
    script(tools / "sudo", 'shift; [ "$1" = true ] || "$@"')
    script(tools / "apt-get", 'echo "apt-get $*"')
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    done = make(checkout, "gl", f"PYTHON={python}", PATH=path)
    assert done.returncode == 0, done.stderr
    assert "apt-get update -qq" in done.stdout
    assert "libegl1 libgl1 libgl1-mesa-dri" in done.stdout


def pinned(path: Path) -> dict[str, str]:
    """Versions by name, of a file of constraints or of a lock."""
    pins = {}
    for line in path.read_text().splitlines():
        if line and not line.startswith(("#", " ")):
            name, _, version = line.removesuffix(" \\").partition("==")
            assert version, f"{path.name} must pin exactly, got {line!r}"
            pins[canonicalize_name(name)] = version
    return pins


def test_every_pin_but_torch_has_hashes(root: Path) -> None:
    """Test 26. torch's builds for CPUs and for CUDA have one version and different files."""
    wanted = pinned(root / "constraints.txt")
    del wanted["torch"]
    assert pinned(root / "requirements.lock") == wanted
    lock = (root / "requirements.lock").read_text().replace(" \\\n", " ").splitlines()
    for line in lock:
        if not line.startswith("#"):
            hashes = line.split()[1:]
            assert 1 <= len(hashes) <= 2, line
            assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", word) for word in hashes), line
    assert "://" not in "".join(lock)


@pytest.mark.skipif(sys.platform != "linux", reason="the lock is for Linux")
def test_setting_up_compares_hashes_before_anything_else_is_installed(checkout: Path) -> None:
    told = script(checkout / "python3", f'exec {sys.executable} "$@"')
    said = make(checkout, "-n", "setup", "GL=skip", f"PYTHON={told}").stdout
    locked, free = said.index("--require-hashes"), said.index("-c constraints.txt -e")
    assert locked < free
    assert "--no-deps" in said[locked:free]
    assert "--only-binary :all:" in said[locked:free]


@pytest.mark.slow
def test_a_file_with_another_hash_is_not_installed(root: Path, tmp_path: Path) -> None:
    """pip itself, on a wheel of one file; nothing is looked up."""
    wheel = tmp_path / "toml-0.10.2-py2.py3-none-any.whl"
    info = "toml-0.10.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toml.py", "stolen = True\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toml\nVersion: 0.10.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py2.py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    lines = (root / "requirements.lock").read_text().replace(" \\\n", " ").splitlines()
    (line,) = (line for line in lines if line.startswith("toml=="))
    (tmp_path / "one.lock").write_text(line + "\n")
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--find-links", str(tmp_path)]
    command += ["--require-hashes", "--no-deps", "--target", str(tmp_path / "to")]
    done = subprocess.run(
        [*command, "-r", str(tmp_path / "one.lock")],
        env={**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr.upper()
    assert not (tmp_path / "to" / "toml.py").exists()


def test_every_dependency_is_pinned_within_its_range(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = [text for group in project["optional-dependencies"].values() for text in group]
    pins = pinned(root / "constraints.txt")
    for text in [*project["dependencies"], *extras]:
        wanted = Requirement(text)
        if wanted.marker is None or wanted.marker.evaluate():
            name = canonicalize_name(wanted.name)
            assert name in pins, f"{name} is not pinned"
            assert wanted.specifier.contains(pins[name]), f"{text}, but {pins[name]} is pinned"


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("lightning", "2.6.2"),
        ("lightning", "2.6.3"),
        ("mujoco", "3.17.0"),
        ("mujoco", "4.0.0"),
        ("dm_control", "1.0.50"),
        ("torch", "2.9.1"),
        ("omegaconf", "2.3.1"),
    ],
)
def test_versions_known_to_be_bad_are_excluded(root: Path, name: str, version: str) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = {r.name: r for r in map(Requirement, project["dependencies"])}
    assert not wanted[name].specifier.contains(version)


def test_the_workflow_runs_what_a_developer_runs(root: Path) -> None:
    workflow = yaml.safe_load((root / ".github/workflows/test.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    job = workflow["jobs"]["test"]
    assert ".ci/run" in [step.get("run") for step in job["steps"]]
    wanted = SpecifierSet(pyproject(root)["project"]["requires-python"])
    assert all(wanted.contains(version) for version in job["strategy"]["matrix"]["python"])


def test_hooks_use_the_environment_of_make_setup(root: Path) -> None:
    hooks = yaml.safe_load((root / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in hooks["repos"]] == ["local"]
    for hook in hooks["repos"][0]["hooks"]:
        assert hook["language"] == "system"
        assert hook["entry"].startswith(".venv/bin/")


def test_the_image_installs_the_makefiles_packages_and_names_no_address(root: Path) -> None:
    image, makefile = (root / "Dockerfile").read_text(), (root / "Makefile").read_text()
    packages = re.search(r"^GL_PACKAGES := (.+)$", makefile, re.M)
    assert packages is not None
    assert packages[1] in image
    assert "://" not in image


@pytest.mark.parametrize("name", ["bug_report.yml", "config.yml"])
def test_issue_templates_are_whole(root: Path, name: str) -> None:
    content = yaml.safe_load((root / ".github/ISSUE_TEMPLATE" / name).read_text())
    ids = [part.get("id") for part in content.get("body", ())]
    assert ("doctor" in ids) == (name == "bug_report.yml")


def pyproject(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text())
