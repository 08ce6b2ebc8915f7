"""The table of open points, held against the configuration and the code."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from mapo_lightning.config.compose import compose
from mapo_lightning.config.schema import lookup, section, walk
from mapo_lightning.run.config import RunConfig

ROOT = Path(__file__).parents[2]
ROWS = {
    row[1]: row
    for line in (ROOT / "docs/open_points.md").read_text().splitlines()
    if len(row := [cell.strip() for cell in line.split("|")]) == 7 and row[1][:1] == "O"
}
DOCS = {leaf.key: leaf.doc for leaf in walk(RunConfig)}


def keys(point: str) -> list[str]:
    return re.findall(r"`([^`]+)`", ROWS[point][3])


def words(text: str) -> list[str]:
    """Choices and overrides of a command line that a cell names."""
    found = [word for span in re.findall(r"`([^`]+)`", text) for word in span.split()]
    return [w for w in found if re.fullmatch(r"[\w.]+=[\w.\[\],]+", w)]


def test_every_open_point_has_its_row_in_order() -> None:
    assert list(ROWS) == [f"O{i}" for i in range(1, 39)]


@cache
def defaults() -> dict[str, Any]:
    chosen = ["method=mapo", "size=paper", "env=dmc/quadruped_run", "data=ssv2"]
    return compose(chosen, RunConfig, ROOT / "conf").flat


@pytest.mark.parametrize("point", [p for p in ROWS if keys(p)])
def test_its_keys_exist_with_that_default_and_name_it(point: str) -> None:
    stated = [yaml.safe_load(value) for value in ROWS[point][4].split("; ")]
    for key, value in zip(keys(point), stated, strict=True):
        leaf = key if key in DOCS else key.rpartition(".")[0]  # one name of a dict of scales
        owner = section(lookup(RunConfig, leaf.rpartition(".")[0]))
        assert owner is not None
        assert point_in(point, f"{DOCS[leaf]} {owner.__doc__}"), f"{leaf} does not name {point}"
        assert defaults()[key] == value


@pytest.mark.parametrize("point", [p for p in ROWS if not keys(p)])
def test_a_point_without_a_key_says_where_its_reading_is(point: str) -> None:
    kind, _, place = ROWS[point][4].partition(": ")
    assert place
    assert kind in ("built in", "not built", "stated in")
    if kind == "built in":
        code = [path.read_text() for path in (ROOT / "mapo_lightning").rglob("*.py")]
        assert any(point_in(point, text) for text in code)


def point_in(point: str, text: str) -> bool:
    """Whether a text names a point: ``O6``, or ``O5-O7`` around it."""
    spans = re.findall(r"O(\d+)(?:-O(\d+))?", text)
    return any(int(a) <= int(point[1:]) <= int(b or a) for a, b in spans)


@pytest.mark.slow
@pytest.mark.parametrize("point", [p for p, row in ROWS.items() if words(row[5])])
def test_its_alternatives_can_be_chosen(point: str) -> None:
    for word in words(ROWS[point][5]):
        compose([word, "env=toy"], RunConfig, ROOT / "conf")
