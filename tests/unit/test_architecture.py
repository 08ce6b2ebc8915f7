"""Rules of the house that no single module can hold: who imports whom, how large things grow."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mapo_lightning"
LIBRARY = sorted(PACKAGE.rglob("*.py")) + sorted((ROOT / "callbacks").glob("*.py"))
PROGRAM = [*LIBRARY, *(path for path in [ROOT / "train.py"] if path.exists())]
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# Rooms from the bottom up. A room may import what it names and what those may import.
ABOVE: dict[str, set[str]] = {
    "types": set(),
    "semantics": {"types"},
    "models": {"types"},
    "data": {"semantics"},
    "envs": {"data"},
    "datamodule": {"envs"},
    "capture": {"types"},
    "optimization": {"models", "capture"},
    "checkpoint": {"types"},
    "pretrain": {"optimization", "checkpoint"},
    "finetune": {"optimization", "checkpoint"},
    "redact": {"types"},
    "runtime": {"types"},
    "schema": {"types"},
    "command_line": {"types"},
    "conf_groups": {"schema"},
    "compose": {"conf_groups", "command_line", "redact"},
    "outbox": {"types"},
    "provenance": {"redact"},
    "mlflow_store": {"provenance"},
    "tracking": {"mlflow_store", "outbox"},
    "artifacts": {"tracking", "data"},
    "doctor": {"tracking", "envs"},
    "evaluation": {"artifacts", "envs"},
    "labels": {"semantics"},
}
# Above all rooms: they put the parts together and may import every one of them.
FRONT = {"config", "build", "origin", "agent", "quality", "gallery", "gallery_page"}

DOORS = {
    "av": {"data/video.py"},
    "cv2": {"semantics/flow.py", "semantics/reference.py", "data/stills.py", "data/video.py"},
    "decord": {"data/video.py"},
    "dm_control": {"envs/dmc.py"},
    "jinja2": {"gallery_page.py"},
    "metaworld": {"envs/metaworld.py", "envs/demo.py"},
    "mlflow": {"mlflow_store.py"},
    "mujoco": {"envs/gl.py"},
    "omegaconf": {"compose.py"},
    "openai": {"semantics/openai_server.py"},
    "pyarrow": {"labels.py"},
    "scipy": {"evaluation.py"},
    "transformers": {"semantics/qwen.py", "semantics/text_encoder.py"},
}
LIGHTNING = {"datamodule.py", "pretrain.py", "finetune.py", "optimization.py", "tracking.py"}
LIGHTNING |= {"build.py"}

MAX_FILE, MAX_FUNCTION = 300, 50


def reachable(room: str) -> set[str]:
    found: set[str] = set()
    todo = set(ABOVE[room])
    while todo:
        other = todo.pop()
        found.add(other)
        todo |= ABOVE[other] - found
    return found


def imported(path: Path) -> Iterator[str]:
    """Yield every imported module, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):  # relative imports are banned by ruff TID252
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_imports_point_downwards_and_use_their_door(path: Path) -> None:
    here = path.relative_to(PACKAGE)
    room = here.parts[0].removesuffix(".py")
    for module in imported(path):
        top, _, rest = module.partition(".")
        assert top != "callbacks", f"{here} imports {module}, which lies above the library"
        doors = LIGHTNING if top in ("lightning", "pytorch_lightning") else DOORS.get(top)
        assert doors is None or here.as_posix() in doors, f"{here}: {top} has its door in {doors}"
        other = rest.partition(".")[0]
        if top != "mapo_lightning" or room in FRONT or room == "__init__" or not other:
            continue
        assert room in ABOVE, f"{here}: a new room; give it its place in ABOVE"
        assert other in {room, *reachable(room)}, f"{room} may not import {other}"


@pytest.mark.parametrize("path", [p for p in PROGRAM if p.parent != PACKAGE], ids=str)
def test_third_parties_stay_behind_their_doors_outside_the_package(path: Path) -> None:
    if path.is_relative_to(PACKAGE):
        return
    for module in imported(path):
        assert module.partition(".")[0] not in DOORS, f"{path.name} imports {module}"


@pytest.mark.parametrize("path", [*PROGRAM, *TESTS], ids=lambda p: p.name)
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text()
    length = len(text.splitlines())
    assert length <= MAX_FILE, f"{path.name} has {length} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or 0) - node.lineno + 1
            assert size <= MAX_FUNCTION, f"{path.name}: {node.name} has {size} lines"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.name)
def test_the_library_speaks_only_through_logging(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("print", "warnings.filterwarnings", "warnings.simplefilter")
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None)


def texts() -> list[Path]:
    kinds = ("*.py", "*.toml", "*.yaml", "*.md", "Makefile")
    places = ["mapo_lightning", "callbacks", "conf", "docs", "tests", "benchmarks"]
    found = [p for place in places for kind in kinds for p in (ROOT / place).rglob(kind)]
    return found + [p for kind in kinds for p in ROOT.glob(kind)]


def test_nothing_names_the_machine_it_was_written_on() -> None:
    # Built from parts, so that this line does not find itself.
    places = "|".join(["wor" + "k", "ro" + "ot", "ho" + "me/[a-z]", "tm" + "p"])
    machine = re.compile(rf"(?<![\w.\-:/}}])/(?:{places})/")
    for path in texts():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not machine.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def test_every_deviation_is_written_down_and_every_one_written_down_exists() -> None:
    """``Deviation: short-id. Why`` in the code, the same words in docs/decisions.md."""
    name = re.compile(r"Deviation: ([a-z0-9-]+)\b")
    in_code: set[str] = set()
    for path in PROGRAM:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if "Deviation:" in line:
                found = name.search(line)
                assert found, f"{path.name}:{number}: write 'Deviation: short-id. Why'"
                in_code.add(found[1])
    page = ROOT / "docs" / "decisions.md"
    assert in_code == set(name.findall(page.read_text() if page.exists() else ""))
