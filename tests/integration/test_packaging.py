from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    # From a copy: a build leaves folders behind.
    listed = [
        "pyproject.toml",
        "MANIFEST.in",
        "LICENSE",
        "README.md",
        "mapo_lightning",
        "callbacks",
    ]
    source.mkdir()
    subprocess.run(["cp", "-r", *(str(root / name) for name in listed), source], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", place, source], check=True, timeout=240)
    return next(place.glob("mapo_lightning-*.whl"))


def test_the_wheel_holds_both_packages_and_nothing_else(wheel: Path, root: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "mapo_lightning",
        "callbacks",
    }
    for package in ("mapo_lightning", "callbacks"):
        sources = {p.relative_to(root).as_posix() for p in (root / package).rglob("*.py")}
        assert sources <= set(names)
        assert f"{package}/py.typed" in names
    pages = {p.relative_to(root).as_posix() for p in (root / "mapo_lightning/pages").iterdir()}
    assert len(pages) == 3
    assert pages <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target]
    subprocess.run([*command, wheel], check=True, timeout=240)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "import callbacks, mapo_lightning, mapo_lightning.config.compose\n"
        "import mapo_lightning.tracking.logger\n"
        "print(callbacks.__file__); print(mapo_lightning.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        check=True,
        timeout=240,
        capture_output=True,
        text=True,
    )
    for line in done.stdout.splitlines():
        assert Path(line).is_relative_to(target)
