"""The documentation: links, commands, settings, and what is made from the code."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from gymnasium.utils.env_checker import check_env

from mapo_lightning.config.compose import compose
from mapo_lightning.config.product import Product
from mapo_lightning.envs.wrappers import PixelEnv
from mapo_lightning.run.config import RunConfig
from mapo_lightning.run.doctor import CHECKS
from mapo_lightning.run.renamed import RENAMED
from mapo_lightning.run.sweep.plan import WHOLE
from mapo_lightning.semantics.describer import Describer
from mapo_lightning.semantics.phrase import parse_reply

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
OTHERS = [p for p in sorted(ROOT.glob("*.md")) if p != README]
PAGES = [README, *OTHERS, *sorted((ROOT / "docs").glob("*.md"))]
MEASURED = [
    *sorted((ROOT / "docs" / "protocols").glob("*.md")),
    *sorted((ROOT / "benchmarks" / "results").glob("*.md")),
]
# These have words of earlier versions, or of other programs.
HISTORY = {"CHANGELOG.md", "renamed.md", "facts.md"}
NO_SETTINGS = {  # not of a run, or of a file that only the reader has
    "key=value", "group=file", "weights_only=True", "describe=False", "words=[...]", "config=FILE",
    "against=METHOD",
}  # fmt: skip


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines outside blocks of code."""
    inside = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            inside = not inside
        elif not inside and not line.startswith("    "):
            yield number, line


def anchors(path: Path) -> set[str]:
    """Anchors of headings, as GitHub makes them, and those written out."""
    titles = [line.lstrip("#").strip() for _, line in prose(path) if re.match(r"#+ ", line)]
    plain = [re.sub(r"[`*]|\]\([^)]*\)|\[", "", title).lower() for title in titles]
    made = {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}
    return made | set(re.findall(r'(?:id|name)="([^"]+)"', path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", [*PAGES, *MEASURED], ids=name)
def test_links_and_pictures_lead_somewhere(path: Path) -> None:
    text = "\n".join(line for _, line in prose(path))
    for target in re.findall(r"\]\(([^()\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{name(path)}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{name(path)}: {target} has no such heading"


@pytest.mark.parametrize("path", [*PAGES, *MEASURED], ids=name)
def test_lines_are_short(path: Path) -> None:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        table = line.startswith("|") and path != README  # a row cannot be broken
        assert len(line) <= 120 or table, f"{name(path)}:{number} has {len(line)} characters"


def blocks(path: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of every block of code; indented ones are of the shell."""
    language, held = None, ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            if language is not None:
                yield language, held
            language, held = (line[3:], "") if language is None else (None, "")
        elif language is not None or line.startswith("    "):
            held += line + "\n"
        elif held:
            yield "sh", held
            held = ""


def code(path: Path) -> Iterator[str]:
    """Lines typed into a shell, with continued ones joined, and code within the text."""
    for language, block in blocks(path):
        if language in ("", "sh"):
            whole = re.sub(r"\\\n\s*", "", block)
            yield from (line.strip() for line in whole.splitlines())
    for _, line in prose(path):
        yield from re.findall(r"`([^`]+)`", line)


def commands() -> Iterator[tuple[str, list[str]]]:
    """(where and what, words) of every start of a training in README and docs."""
    start = re.compile(
        r"(?:\$ )?(?:mapo-train|mapo-quality|(?:python |torchrun .*)train\.py)( .*)?"
    )
    for path in [README, *(p for p in PAGES if p.parent.name == "docs")]:
        for line in dict.fromkeys(code(path)):
            found = start.fullmatch(line)
            if found and path.name not in HISTORY:
                yield f"{name(path)}: {line}", shlex.split(found[1] or "", comments=True)


def composed(words: list[str]) -> dict[str, Any]:
    """The last run that words describe, with placeholders filled in; no file is read."""
    filled = [re.sub(r"\$\w+", "0", word) for word in words]
    open_ = ("...", "vlm=NAME", "method=NAME")  # any file of a group
    product = Product.read([w for w in filled if w not in open_], WHOLE)
    runs = [product.words_of(choice) for choice in product.choices()]
    return [compose(run, RunConfig, ROOT / "conf").flat for run in runs][-1]


COMMANDS = list(commands())


def test_commands_are_found_at_all() -> None:
    pages = {where.partition(":")[0] for where, _ in COMMANDS}
    wanted = ("README.md", *(f"docs/{p}.md" for p in ("tutorial", "vlm", "evaluate", "reproduce")))
    assert set(wanted) <= pages
    assert len(COMMANDS) > 50


@pytest.mark.slow
@pytest.mark.parametrize(("where", "words"), COMMANDS, ids=[where for where, _ in COMMANDS])
def test_every_documented_command_composes(where: str, words: list[str]) -> None:
    options = [word for word in words if word.startswith("--")]
    assert set(options) <= {"--help", "--show", "--preflight"}, where
    if "--help" not in words:
        composed([word for word in words if word not in options])


def settings() -> Iterator[tuple[str, list[str]]]:
    """(where and what, words) of settings within the text, such as ``data.rate=10``."""
    for path in PAGES:
        if path.name in HISTORY or path.name == "api.md":
            continue
        for span in dict.fromkeys(code(path)):
            words = span.split()
            if words and all(re.fullmatch(r"[a-z_][\w.]*=\S+", word) for word in words):
                whole = [w for w in words if not w.endswith(("...", "i/n", "A,B,C"))]
                whole = [w for w in whole if w not in NO_SETTINGS]
                if whole:
                    yield f"{name(path)}: {span}", whole


@pytest.mark.slow
@pytest.mark.parametrize(("where", "words"), list(settings()), ids=lambda x: x)
def test_every_setting_in_the_text_exists(where: str, words: list[str]) -> None:
    # Some are one half of a pair that the sentence has completely.
    needed = {
        "stage=evaluate": ["checkpoint=PATH"],
        "checkpoint": ["stage=evaluate"],
        "init_from": ["stage=finetune"],
        "vlm": ["vlm.server.base_url=http://HOST:8000/v1"],
        "vlm.direction=flow": ["vlm=openai_server", "vlm.server.base_url=http://HOST:8000/v1"],
    }
    keys = {word.partition("=")[0] for word in words}
    extra = [w for key, more in needed.items() if key in {*keys, *words} for w in more]
    composed([*words, *(w for w in extra if w.partition("=")[0] not in keys)])


def test_scripts_and_make_targets_exist() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    scripts = set(declared["project"]["scripts"])
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in PAGES:
        for line in code(path):
            if found := re.match(r"(?:\$ )?(mapo-[a-z-]+)\b", line):
                assert found[1] in scripts, f"{name(path)}: {line}"
            if found := re.match(r"(?:\$ )?make ([a-z-]+)", line):
                assert found[1] in targets, f"{name(path)}: {line}"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_python_in_the_pages_can_be_read(path: Path) -> None:
    for language, block in blocks(path):
        if language == "python" and path.name != "api.md":  # which has signatures
            ast.parse(block)


def test_the_examples_of_extending_fulfil_their_interfaces() -> None:
    names: dict[str, Any] = {}
    for language, block in blocks(ROOT / "docs" / "extending.md"):
        if language == "python":
            exec(block, names)
    describer = names["BrightnessDescriber"]()
    assert isinstance(describer, Describer)
    shades = [np.full((2, 8, 8, 3), 10, np.uint8) for _ in range(3)]
    shades[1][1], shades[2][0] = 60, 60
    read = [parse_reply(reply.text) for reply in describer.describe(shades)]
    assert [parsed.status for parsed in read] == ["null", "slots", "slots"]
    assert [parsed.phrase.action for parsed in read[1:]] == ["brightening", "dimming"]
    check_env(PixelEnv(names["Lamp"]()), skip_render_check=True)
    env = PixelEnv(names["SavedLamp"]())
    env.reset(seed=0)
    snapshot, action = env.save(), np.ones(1, np.float32)
    one = env.step(action)
    env.restore(snapshot)
    assert env.step(action)[1:] == one[1:]


@pytest.mark.slow
def test_the_api_reference_is_that_of_the_code() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "api.py"))
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert text == made["page"](), "type: python docs/api.py"
    for title in ("load_agent", "WorldModel", "Describer", "FinetuneModule", "CollectExperience"):
        assert f"### {title}\n" in text


def test_the_picture_of_the_architecture_is_that_of_the_code() -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "figures.py"))
    rules = runpy.run_path(str(Path(__file__).with_name("test_architecture.py")))
    aliases = {"doctor", "dreams", "export", "gallery", "gpu_check", "labels", "play"}
    aliases |= {"quality", "report", "told"}
    floors = [set(floor) - aliases for floor in rules["FLOORS"]]
    assert [set(rooms) for rooms in drawn["FLOORS"]] == [floor for floor in floors if floor]
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for title, _, files in drawn["PATHS"]:
        listed = page.partition(f"## {title}\n")[2].partition("\n## ")[0]
        assert re.findall(r"^\| \d+ \| `([^`]+)`", listed, re.MULTILINE) == [f for f, _ in files]
        assert len(files) < 10
        for file, _ in files:
            inside = ROOT / "mapo_lightning" / file
            assert inside.is_file() or (ROOT / file).is_file(), file


def test_troubleshooting_has_every_check_of_the_doctor() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    for check, _ in CHECKS:
        assert re.search(rf"^\| `{check}` \|", page, re.MULTILINE), check


def texts_of(path: Path) -> Iterator[str]:
    """Texts in a program's file; a null character stands for what is filled in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [x.value if isinstance(x, ast.Constant) else "\0" for x in node.values]
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_troubleshooting_quotes_messages_that_the_program_has() -> None:
    places = [*ROOT.glob("mapo_lightning/**/*.py"), *ROOT.glob("callbacks/*.py")]
    said = "\n".join(text for path in places for text in texts_of(path))
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    table = page.partition("## Frequent messages\n")[2].partition("\n## ")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(messages) > 20
    for message in messages:
        pieces = [piece.strip(" ':()") for piece in re.split(r"\.\.\.|\b[NM]\b", message)]
        pieces = [piece for piece in pieces if len(piece) > 3]
        assert pieces, message
        for piece in pieces:
            assert piece in said, f"{message}: nothing in the program says '{piece}'"


def test_renamed_words_are_those_of_the_program() -> None:
    page = (ROOT / "docs" / "renamed.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|$", page, re.MULTILINE))
    commands = {old for old in rows if old.startswith(("python", "--"))}
    assert {old: new for old, new in rows.items() if old not in commands} == {
        **RENAMED.keys,
        **RENAMED.choices,
        **{
            f"{key}={str(old).lower()}": f"{key}={new}"
            for key, successors in RENAMED.values.items()
            for old, new in successors.items()
        },
    }


def test_the_readme_cites_what_the_citation_file_cites() -> None:
    entry = re.search(r"```bibtex\n(@article\{.*?\n\})", README.read_text("utf-8"), re.DOTALL)
    assert entry
    assert entry[1] in (ROOT / "docs" / "citation.md").read_text(encoding="utf-8")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["references"][0]
    field = dict(re.findall(r"^  (\w+) += \{(.*)\},?$", entry[1], re.MULTILINE))
    assert re.sub(r"[{}]", "", field["title"]) == cited["title"]
    assert field["journal"] == cited["journal"]
    assert [field["volume"], field["number"]] == [str(cited["volume"]), str(cited["issue"])]
    assert field["pages"] == f"{cited['start']}--{cited['end']}"
    assert field["year"] == str(cited["year"])
    authors = [person["family-names"] for person in cited["authors"]]
    assert field["author"] == " and ".join(authors)
