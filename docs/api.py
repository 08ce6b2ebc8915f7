"""Writes docs/api.md, the API reference, from the docstrings: ``python docs/api.py``.

The source is read, not imported. What is listed follows from rules, such as "every class that is a
Lightning callback", so that a new part appears without a change here.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
WIDTH = 118

Node = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Item(NamedTuple):
    """A public class or function at the top level of a module."""

    module: str
    """Dotted."""
    node: Node

    @property
    def bases(self) -> list[str]:
        """Last names of the classes that a class is derived from."""
        listed = self.node.bases if isinstance(self.node, ast.ClassDef) else []
        return [re.sub(r"\[.*", "", ast.unparse(base)).rpartition(".")[2] for base in listed]


class Section(NamedTuple):
    """A part of the page."""

    title: str
    about: str
    holds: Callable[[Item], bool]
    whole: bool
    """Whether methods are shown with their whole docstring, or with its first line."""


def _named(*names: str) -> Callable[[Item], bool]:
    return lambda item: f"{item.module}.{item.node.name}" in names


def _derived(*bases: str) -> Callable[[Item], bool]:
    return lambda item: any(base in bases for base in item.bases)


SECTIONS = (
    Section(
        "Trained agents",
        "`mapo_lightning.load_agent` and `mapo_lightning.Agent`: for your own programs.",
        _named("mapo_lightning.run.agent.load_agent", "mapo_lightning.run.agent.Agent"),
        True,
    ),
    Section(
        "Interfaces",
        "What a part must offer; any class with these methods will do.",
        _derived("Protocol"),
        True,
    ),
    Section(
        "Lightning modules",
        "One update of each kind of training.",
        _derived("LightningModule", "TrainedModule"),
        False,
    ),
    Section(
        "Data modules",
        "Batches for Lightning's Trainer.",
        _derived("LightningDataModule"),
        False,
    ),
    Section(
        "Callbacks",
        "What happens around an update. They are given to the Trainer in the order of "
        "[architecture.md](architecture.md#the-loop-of-fine-tuning).",
        _derived("Callback"),
        False,
    ),
    Section(
        "Describers",
        "What can say in words what happens in a window of frames.",
        lambda item: item.node.name.endswith("Describer") and "Protocol" not in item.bases,
        False,
    ),
    Section(
        "Environments",
        "Simulators as Gymnasium environments that show pixels.",
        lambda item: (
            (item.module == "mapo_lightning.envs.factory" and item.node.name.startswith("make_"))
            or "gymnasium.Env" in ast.unparse(item.node).split(":")[0]
            or item.node.name == "PixelEnv"
        ),
        False,
    ),
    Section(
        "Judging dreams",
        "Futures really played from one state, and what dreams of them are worth.",
        lambda item: item.module.startswith("mapo_lightning.judging"),
        False,
    ),
    Section(
        "Reports",
        "Reads runs back, compares methods over seeds and tasks, and writes the report.",
        lambda item: (
            item.module.rpartition(".")[0] == "mapo_lightning.reporting"
            and item.module.rpartition(".")[2] in ("gather", "study", "statistics", "report")
        ),
        False,
    ),
    Section(
        "Errors",
        "Each says what was asked, what was found and what to do.",
        _derived("Exception", "MapoError"),
        False,
    ),
)


def items() -> Iterator[Item]:
    """Every public class and function of the library, in the order of the modules."""
    files = [*(ROOT / "mapo_lightning").rglob("*.py"), *(ROOT / "callbacks").glob("*.py")]
    for path in sorted(files):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, Node) and not node.name.startswith("_"):
                yield Item(module, node)


def page() -> str:
    """The whole page."""
    found = list(items())
    lines = [
        "# API reference",
        "",
        "Made from the docstrings by `python docs/api.py`; do not edit it by hand. Shapes: "
        "[tensor_shapes.md](tensor_shapes.md). Settings: `mapo-train --help`.",
    ]
    for section in SECTIONS:
        lines += ["", f"## {section.title}", "", section.about]
        for item in found:
            if section.holds(item):
                lines += ["", *_entry(item, section.whole)]
    return "\n".join(_wrapped(line) for line in lines) + "\n"


def _entry(item: Item, whole: bool) -> Iterator[str]:
    """One class or function."""
    node = item.node
    yield f"### {node.name}"
    yield ""
    yield f"`{item.module}`"
    if not isinstance(node, ast.ClassDef):
        yield from ["", *_signature(node), "", *_markdown(node)]
        return
    made = next((m for m in _methods(node) if m.name == "__init__"), None)
    if made is not None and "Protocol" not in item.bases:
        yield from ["", *_signature(made, node.name)]
    yield from ["", *_markdown(node)]
    yield from _attributes(node)
    public = [m for m in _methods(node) if _doc(m) and (m.name[0] != "_" or m.name == "__call__")]
    if public and not whole:
        yield from ["", "**Methods**", ""]
        yield from (f"- `{_short(m)}`: {_doc(m)[0].lower()}{_first(m)[1:]}" for m in public)
    for method in public if whole else ():
        yield from ["", f"#### {node.name}.{method.name}", "", *_signature(method)]
        yield from ["", *_markdown(method)]


def _methods(node: ast.ClassDef) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [m for m in node.body if isinstance(m, ast.FunctionDef | ast.AsyncFunctionDef)]


def _attributes(node: ast.ClassDef) -> Iterator[str]:
    """Fields that have a string below them, as the library documents them."""
    documented = [
        (field, note.value.value)
        for field, note in zip(node.body, node.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(note, ast.Expr)
        and isinstance(note.value, ast.Constant)
        and not ast.unparse(field.target).startswith("_")
    ]
    if documented:
        yield from ["", "**Attributes**", ""]
    for field, note in documented:
        kind = ast.unparse(field.annotation)
        yield f"- `{ast.unparse(field.target)}: {kind}`: {_plain(str(note))}"


def _short(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Name and arguments of a method; hooks of Lightning without those that Lightning gives."""
    given = {"self", "trainer", "pl_module", "batch_idx", "stage", "checkpoint", "dataloader_idx"}
    names = [a.arg for a in [*node.args.args, *node.args.kwonlyargs] if a.arg not in given]
    decorated = {ast.unparse(d).rpartition(".")[2] for d in node.decorator_list}
    return node.name if "property" in decorated else f"{node.name}({', '.join(names)})"


def _signature(
    node: ast.FunctionDef | ast.AsyncFunctionDef, name: str | None = None
) -> Iterator[str]:
    """A code block with name, arguments and result."""
    if any(ast.unparse(d).rpartition(".")[2] == "property" for d in node.decorator_list):
        head = f"{node.name}: {ast.unparse(node.returns)}" if node.returns else node.name
    else:
        arguments = re.sub(r"^self(, )?", "", ast.unparse(node.args))
        result = f" -> {ast.unparse(node.returns)}" if node.returns and name is None else ""
        head = f"{name or node.name}({arguments}){result}"
        if len(head) > WIDTH:
            parts = re.sub(r"^self, ", "", ast.unparse(node.args))
            inner = textwrap.wrap(parts, WIDTH - 4, break_on_hyphens=False)
            body = "\n".join(f"    {part}" for part in inner)
            head = f"{name or node.name}(\n{body}\n){result}"
    yield f"```python\n{head}\n```"


def _doc(node: Node) -> str:
    return ast.get_docstring(node) or ""


def _first(node: Node) -> str:
    """The first line of a docstring, which ends with its first sentence."""
    return _plain(_doc(node).partition("\n\n")[0])


def _plain(text: str) -> str:
    """One line of Markdown."""
    return re.sub(r"``+", "`", " ".join(text.split()))


def _markdown(node: Node) -> Iterator[str]:
    """A docstring in Google's style as Markdown: paragraphs, and a list for each section."""
    title = re.compile(r"(Args|Returns|Yields|Raises|Attributes|Source|Example):\n")
    for number, block in enumerate(re.split(r"\n\n", _doc(node))):
        if number:
            yield ""
        heading = title.match(block)
        if not heading:
            yield _plain(block)
            continue
        yield f"**{heading[1]}**"
        yield ""
        body = textwrap.dedent(block[heading.end() :])
        entries = re.split(r"\n(?=\S)", body)
        for entry in entries if heading[1] in ("Args", "Raises", "Attributes") else [body]:
            name, colon, rest = entry.partition(": ")
            named = colon and re.fullmatch(r"\*{0,2}[\w.]+( \([^)]*\))?", name)
            yield f"- `{name}`: {_plain(rest)}" if named else f"- {_plain(entry)}"


def _wrapped(line: str) -> str:
    if line.startswith(("```", "#")) or len(line) <= WIDTH:
        return line
    indent = "  " if line.startswith("- ") else ""
    wrapped = textwrap.wrap(
        line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(wrapped)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
