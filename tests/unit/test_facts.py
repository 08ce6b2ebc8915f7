"""Whatever code and pages cite can be looked up: facts, open points, papers, this software."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PLACES = ("mapo_lightning", "callbacks", "conf", "docs", "tests", "benchmarks")
KINDS = {".py", ".md", ".yaml", ".toml", ".cff"}
FACTS = (ROOT / "docs" / "facts.md").read_text()
CITATIONS = (ROOT / "docs" / "citation.md").read_text()

SECTIONS = set(re.findall(r"^#{2,3} (\d+(?:\.\d+)?)\.? ", FACTS, re.M))
POINTS = set(re.findall(r'^- <a id="o\d+"></a>\*\*(O\d+)\. ', FACTS, re.M))

# One item of a list: a section, an open point, or a range of points such as O11-O16.
_ITEM = r"(?:O\d+(?:-O?\d+)?|\d+(?:\.\d+)?)"
# In a comment the list may go on behind the next line's `#`.
_GAP = r"\s+(?:#\s*)?"
_LIST = re.compile(rf"\b[Ff]acts{_GAP}({_ITEM}(?:(?:,{_GAP}and|{_GAP}and|,){_GAP}{_ITEM})*)")
_POINT = re.compile(r"\bO(\d+)(?:-O?(\d+))?\b")
_UNPUBLISHED = re.compile(r"(?i)\b(deps|design|house|performance|users|issues?)(\.md)?\s+#?\d")


def texts() -> dict[str, str]:
    """Return every text of the repository but this one, which names what must not be found."""
    paths = [*ROOT.iterdir(), *(p for place in PLACES for p in (ROOT / place).rglob("*"))]
    chosen = [p for p in paths if p.suffix in KINDS and p != Path(__file__).resolve()]
    return {p.relative_to(ROOT).as_posix(): p.read_text() for p in sorted(chosen)}


def cited(text: str) -> Iterator[str]:
    """Yield the sections and the open points that a text names."""
    for listed in _LIST.finditer(text):
        yield from re.findall(r"(?<![O\d.-])\d+(?:\.\d+)?", listed[1])
    for point in _POINT.finditer(text):
        for number in range(int(point[1]), int(point[2] or point[1]) + 1):
            yield f"O{number}"


def unknown(text: str) -> list[str]:
    return [name for name in cited(text) if name not in SECTIONS | POINTS]


def test_everything_that_is_cited_stands_in_the_facts() -> None:
    found = {path: unknown(text) for path, text in texts().items()}
    assert {path: names for path, names in found.items() if names} == {}


def test_the_code_cites_the_facts_at_all() -> None:
    """A pattern that matches nothing would pass the test above."""
    code = [text for path, text in texts().items() if path.startswith(("mapo_lightning", "tests"))]
    names = {name for text in code for name in cited(text)}
    assert {"2.2", "3.5", "6", "7.4", "O1", "O30"} <= names
    assert len(names & SECTIONS) > 15


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("(facts 2.4, 6).", ["2.4", "6"]),
        ("facts 4, 5", ["4", "5"]),
        ("Facts 2.1, 2.5, 3, 4, 7.4: sizes", ["2.1", "2.5", "3", "4", "7.4"]),
        ("facts 3.1 and 3.2. Then", ["3.1", "3.2"]),
        ("(facts 5.1: 600 and 239 videos)", ["5.1"]),
        ("facts 3.2, O11, O15", ["3.2", "O11", "O15"]),
        ("the codebook (facts O11-O13)", ["O11", "O12", "O13"]),
        ("facts 5, O27, O28", ["5", "O27", "O28"]),
        ("as published (O30), and O5-O7", ["O30", "O5", "O6", "O7"]),
        ("# of the actor (facts\n    # 4.1, and 6.2)", ["4.1", "6.2"]),
        ("two facts about 3 films; gcc -O2x", []),
    ],
)
def test_every_form_of_a_citation_is_read(text: str, names: list[str]) -> None:
    assert list(cited(text)) == names
    assert unknown(text) == []


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("facts 99.1", ["99.1"]),
        ("facts 2.2, 2.9", ["2.9"]),
        ("facts 11 and 4", ["11"]),
        ("facts O39", ["O39"]),
        ("a reading (O0)", ["O0"]),
        ("O37-O39", ["O39"]),
    ],
)
def test_a_citation_that_leads_nowhere_is_found(text: str, names: list[str]) -> None:
    assert unknown(text) == names


def test_nothing_cites_a_document_that_readers_do_not_have() -> None:
    for text in ("hangs (deps 1)", "Issue 2: sizes", "see design.md 5", "house 3", "users  12"):
        assert _UNPUBLISHED.search(text)
    for path, text in texts().items():
        found = _UNPUBLISHED.search(text)
        assert found is None, f"{path}: {found and found[0]!r} is no document of this repository"


def test_the_facts_are_numbered_without_a_gap() -> None:
    parts: dict[int, list[int]] = {}
    for chapter, part in re.findall(r"^#{2,3} (\d+)(?:\.(\d+))?\.? ", FACTS, re.M):
        parts.setdefault(int(chapter), []).append(int(part or 0))
    assert list(parts) == list(range(1, 11))
    for chapter, found in parts.items():
        assert found == list(range(len(found))), f"chapter {chapter}"
    assert {f"O{number}" for number in range(1, 39)} == POINTS


def test_sections_and_points_have_the_anchor_that_their_name_says() -> None:
    anchors = re.findall(r'<a id="([^"]+)"></a>', FACTS)
    wanted = {name.replace(".", "-") for name in SECTIONS} | {name.lower() for name in POINTS}
    assert set(anchors) == wanted
    assert len(anchors) == len(wanted)
    for anchor, name in re.findall(r'<a id="([\d-]+)"></a>\n\n#+ ([\d.]+)', FACTS):
        assert anchor == name.rstrip(".").replace(".", "-")
    for anchor, name in re.findall(r'<a id="(o\d+)"></a>\*\*(O\d+)', FACTS):
        assert anchor == name.lower()


def test_links_to_the_facts_find_their_anchor() -> None:
    anchors = {*re.findall(r'<a id="([^"]+)"></a>', FACTS), "sources"}
    links = [("docs/facts.md", target) for target in re.findall(r"\]\(#([^)]+)\)", FACTS)]
    assert len(links) > 20
    for path, text in texts().items():
        links += [(path, target) for target in re.findall(r"facts\.md#([\w-]+)", text)]
    for path, target in links:
        assert target in anchors, f"{path} links to #{target}"


def test_every_paper_that_is_cited_by_number_has_its_bibtex() -> None:
    numbers = {n for text in texts().values() for n in re.findall(r"arXiv:(\d{4}\.\d{5})", text)}
    assert "2010.02193" in numbers
    assert numbers <= set(re.findall(r"eprint\s*= \{([\d.]+)\}", CITATIONS))


def test_every_entry_of_bibtex_is_complete() -> None:
    entries = re.findall(r"^@\w+\{(\w+),\n(.*?)^\}$", CITATIONS, re.M | re.S)
    assert len({key for key, _ in entries}) == len(entries) == CITATIONS.count("\n@")
    for key, body in entries:
        fields = set(re.findall(r"^  (\w+) +=", body, re.M))
        assert {"title", "author", "year"} <= fields, key
        assert body.count("{") == body.count("}"), key


def test_the_citation_file_describes_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["title"] == "MAPO Lightning"
    assert citation["message"]
    assert citation["authors"] == project["authors"]
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert f"version = {{{project['version']}}}" in CITATIONS
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Wan", "Xu", "Gan", "Zhan"]
    place = (paper["journal"], paper["volume"], paper["issue"], paper["start"], paper["end"])
    assert place == ("Computer Science", 53, 1, 51, 57)
    assert paper["year"] == 2026
    assert paper["title"].replace("MLM", "{MLM}").replace("MAPO", "{MAPO}") in CITATIONS
