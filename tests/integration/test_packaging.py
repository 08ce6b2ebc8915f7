"""The wheel, built and installed away from the checkout: what somebody gets who never clones it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import mapo_lightning
from mapo_lightning.run.config import conf_folder

pytestmark = pytest.mark.slow

PROGRAMS = (
    "mapo-train", "mapo-gallery", "mapo-labels", "mapo-quality", "mapo-told", "mapo-dreams",
    "mapo-report", "mapo-play", "mapo-export", "mapo-doctor", "mapo-gpu-check",
)  # fmt: skip
TINY = [
    "trainer=debug", "env=toy", "world_model.image.channels=[4]", "tracking.enabled=true",
    "run_dir=run",
]  # fmt: skip
BUILD_SDIST = "import sys, setuptools.build_meta as build; build.build_sdist(sys.argv[1])"


def pip(*words: str | Path, python: str | Path = sys.executable) -> None:
    command = [sys.executable, "-m", "pip", "--python", python, *words, "--quiet", "--no-deps"]
    subprocess.run(command, check=True, timeout=300)


@pytest.fixture(scope="module")
def sdist(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the source distribution from a copy, because a build leaves folders behind."""
    place = tmp_path_factory.mktemp("sdist")
    source = place / "source"
    source.mkdir()
    listed = ["pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "conf"]
    listed += ["mapo_lightning", "callbacks"]
    subprocess.run(["cp", "-r", *(str(root / name) for name in listed), source], check=True)
    command = [sys.executable, "-c", BUILD_SDIST, place]
    subprocess.run(command, cwd=source, check=True, timeout=240, capture_output=True)
    return next(place.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Build the wheel from the source distribution, as an installer without a wheel does."""
    pip("wheel", "--no-build-isolation", "--wheel-dir", sdist.parent, sdist)
    return next(sdist.parent.glob("*.whl"))


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into an environment of its own; returns its folder of programs."""
    place = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True, timeout=120)
    python = place / "bin/python"
    pip("install", wheel, python=python)
    # The dependencies are those of the running environment: its packages, but not its .pth files,
    # through which the checkout would come.
    site = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    Path(site.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin"


def run(folder: Path, *command: str | Path, code: int = 0) -> str:
    """Run an installed program in ``folder``; returns what it said."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MAPO_RUN_DIR")}
    done = subprocess.run(
        command, cwd=folder, env=clean, timeout=300, check=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == code, done.stdout
    return done.stdout


def test_every_package_of_the_tree_is_listed(root: Path) -> None:
    tools = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    tree = {
        ".".join(path.parent.relative_to(root).parts)
        for package in ("mapo_lightning", "callbacks")
        for path in (root / package).rglob("*.py")
    }
    assert sorted(tree | {"mapo_lightning.conf"}) == tools["packages"]


def test_the_wheel_holds_everything_and_nothing_else(wheel: Path, root: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {name for name in names if ".dist-info/" not in name}
    wanted = {
        path.relative_to(root).as_posix()
        for package in ("mapo_lightning", "callbacks")
        for path in (root / package).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    }
    conf = {path.relative_to(root).as_posix() for path in (root / "conf").rglob("*.yaml")}
    assert len(conf) > 20
    assert "mapo_lightning/label_tools/pages/gallery.html.j2" in wanted
    assert ours == wanted | {f"mapo_lightning/{name}" for name in conf}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_source_distribution_has_the_configuration_once(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        found = [name for name in archive.getnames() if name.endswith("/config.yaml")]
    assert [name.partition("/")[2] for name in found] == ["conf/config.yaml"]


def test_the_installed_package_knows_its_version_and_its_files(
    programs: Path, root: Path, tmp_path: Path
) -> None:
    code = (
        "import callbacks, mapo_lightning; from mapo_lightning.run.config import conf_folder\n"
        "for x in (callbacks.__file__, mapo_lightning.__file__, conf_folder()): print(x)\n"
        "print(mapo_lightning.__version__)"
    )
    *places, version = run(tmp_path, programs / "python", "-c", code).splitlines()
    for place in places:
        assert Path(place).is_relative_to(programs.parent)
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert version == mapo_lightning.__version__ == project["version"]
    assert conf_folder() == root / "conf"  # of this process, which runs in a checkout


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_explains_itself(program: str, programs: Path, tmp_path: Path) -> None:
    assert "sage:" in run(tmp_path, programs / program, "--help")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["doctor", "export", "gallery", "labels", "quality"])
def test_the_long_form_of_a_program_is_the_same(name: str, programs: Path, tmp_path: Path) -> None:
    long = run(tmp_path, programs / "python", "-m", f"mapo_lightning.{name}", "--help")
    assert long == run(tmp_path, programs / f"mapo-{name}", "--help")


def test_the_installed_program_trains(programs: Path, tmp_path: Path) -> None:
    assert "kind: toy" in run(tmp_path, programs / "mapo-train", "env=toy", "--show")
    assert list(tmp_path.iterdir()) == []
    said = run(tmp_path, programs / "mapo-train", *TINY)
    assert "toy/disc after 260 frames" in said
    assert "Trainer.fit" not in said  # Lightning's own messages are for developers
    assert f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/runs/mlflow.db" in said
    again = ["stage=evaluate", "checkpoint=run/finetune/last.ckpt", "tracking.enabled=false"]
    assert "  mapo" in run(tmp_path, programs / "mapo-train", *again, "run_dir=played")
    videos = next(tmp_path.glob("data/*"), tmp_path)
    words = ["--store", "runs/cache/labels", "--videos", str(videos)]
    assert "labels: runs/gallery.html" in run(tmp_path, programs / "mapo-gallery", *words)
    exported = run(tmp_path, programs / "mapo-labels", "export", "runs/cache/labels", "x.parquet")
    assert "labels -> x.parquet" in exported


def test_the_installed_doctor_finds_nothing_wrong(programs: Path, tmp_path: Path) -> None:
    said = run(tmp_path, programs / "mapo-doctor")
    assert "installed without a checkout" in said
    assert "make setup" not in said


def test_another_package_named_callbacks_is_refused(programs: Path, tmp_path: Path) -> None:
    other = tmp_path / "callbacks"
    other.mkdir()
    (other / "__init__.py").write_text("")
    program = str(programs / "mapo-train")
    said = run(tmp_path, "env", f"PYTHONPATH={tmp_path}", program, "--show", code=2)
    assert said.startswith("error: the package 'callbacks' must be the one in ")
    assert str(other) in said
