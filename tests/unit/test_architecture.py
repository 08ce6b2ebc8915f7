"""Rules of the house that no single module can hold: who imports whom, how large things grow."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mapo_lightning"
LIBRARY = sorted(PACKAGE.rglob("*.py")) + sorted((ROOT / "callbacks").glob("*.py"))
PROGRAM = [*LIBRARY, *(path for path in [ROOT / "train.py"] if path.exists())]
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# Floors of the house from the ground up: a room knows those below it, never one beside or above it.
FLOORS: list[set[str]] = [
    {"types", "files", "ownership", "stopping", "waiting"},
    {"config", "models", "semantics"},
    {"data"},
    {"envs"},
    {"tracking"},
    {"training", "label_tools"},
    {"reporting"},
    {"judging", "playing"},
    {"callbacks"},
    {"run"},
    {
        "doctor",
        "dreams",
        "export",
        "gallery",
        "gpu_check",
        "labels",
        "play",
        "quality",
        "report",
        "told",
    },  # other ways to type the commands
]
# On the ground floor: a lock says that it is waited for, and a key is a file.
STEPS = {("files", "waiting"), ("ownership", "files")}
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Rooms that are free of MAPO or of words and pixels: they know the ground floor only.
SEPARATE = {"config", "models", "semantics"}

DOORS = {
    "av": {"data/container.py", "data/video.py"},
    "cv2": {
        "semantics/flow.py",
        "semantics/point_tracking.py",
        "data/image_sequence.py",
        "data/video.py",
    },
    "decord": {"data/random_access.py"},
    "dm_control": {"envs/dmc.py"},
    "jinja2": {"label_tools/page.py", "playing/page.py"},
    "metaworld": {"envs/metaworld.py", "envs/demo.py"},
    "mlflow": {"tracking/mlflow_client.py", "tracking/mlflow_models.py"},
    "mujoco": {"envs/gl.py", "envs/mujoco_state.py"},
    "omegaconf": {"config/compose.py"},
    "openai": {"semantics/chat_client.py"},
    "pyarrow": {"label_tools/parquet.py"},
    "safetensors": {"training/export.py", "training/published_weights.py"},
    "scipy": {
        "reporting/statistics.py",
        "semantics/agreement.py",
        "training/across_seeds.py",
        "training/evaluation.py",
        "training/told.py",
    },
    "submitit": {"run/sweep/slurm.py"},
    "starlette": {"playing/app.py"},
    "transformers": {
        "semantics/image_text.py",
        "semantics/in_process.py",
        "semantics/qwen.py",
        "semantics/text_encoder.py",
    },
    "uvicorn": {"playing/app.py"},
    "wordllama": {"semantics/text_encoder.py"},
}
LIGHTNING = {"training", "tracking", "run"}  # rooms that know Lightning

MAX_FILE, MAX_FUNCTION = 450, 50  # above 300 lines a review asks whether it is still one file


def imported(path: Path) -> Iterator[str]:
    """Yield every imported module, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):  # relative imports are banned by ruff TID252
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def room_of(module: str) -> str | None:
    """Room of an imported module of ours; None for those of others, and for the package itself."""
    top, _, rest = module.partition(".")
    if top == "callbacks":
        return top
    room = rest.partition(".")[0]
    return room if top == "mapo_lightning" and room in FLOOR_OF else None


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_point_downwards(path: Path) -> None:
    here = path.relative_to(PACKAGE) if path.is_relative_to(PACKAGE) else Path("callbacks")
    room = here.parts[0].removesuffix(".py")
    if room == "__init__":
        return
    assert room in FLOOR_OF, f"{here}: a new room; give it its floor"
    for module in imported(path):
        other = room_of(module)
        if other in (None, room) or (room, other) in STEPS:
            continue
        assert FLOOR_OF[other] < FLOOR_OF[room], f"{here} imports {module}, which lies no lower"
        assert room not in SEPARATE or FLOOR_OF[other] == 0, f"{here} imports {module}"


@pytest.mark.parametrize("path", PROGRAM, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_third_parties_stay_behind_their_doors(path: Path) -> None:
    inside = path.is_relative_to(PACKAGE)
    here = path.relative_to(PACKAGE if inside else ROOT).as_posix()
    for module in imported(path):
        top = module.partition(".")[0]
        doors = DOORS.get(top)
        assert doors is None or (inside and here in doors), f"{here}: {top} has its door in {doors}"
        if top in ("lightning", "pytorch_lightning") and inside:
            assert here.partition("/")[0] in LIGHTNING, f"{here} imports {module}"


@pytest.mark.parametrize("path", [p for p in LIBRARY if p.name == "settings.py"], ids=str)
def test_settings_are_free_of_torch(path: Path) -> None:
    heavy = {"torch", "lightning", "transformers", "mlflow", "cv2", "decord", "gymnasium"}
    for module in imported(path):
        assert module.partition(".")[0] not in heavy, f"{path} imports {module}"


WORDS = """
import sys
from mapo_lightning.run.main import main
code = main(sys.argv[1:])
heavy = {"torch", "lightning", "torchmetrics", "transformers", "mlflow", "cv2", "decord", "av"}
heavy |= {"gymnasium", "mujoco", "dm_control", "metaworld", "scipy", "pyarrow", "openai"}
heavy |= {"submitit"}
sys.exit(f"imported: {sorted(heavy & sys.modules.keys())}" if heavy & sys.modules.keys() else code)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("--help", 0),
        ("--show env=toy", 0),
        ("--show seed=0..2", 0),
        ("method=mapoo", 2),
        ("--amp", 2),
    ],
)
def test_the_command_line_is_read_without_heavy_packages(words: str, code: int) -> None:
    command = [sys.executable, "-c", WORDS, *words.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr


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
