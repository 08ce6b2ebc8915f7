"""How reports look: one colour per method wherever it is drawn, pictures as bytes, tables as HTML.

The colours are those of Okabe and Ito's palette, which can be told apart with any kind of colour
vision, and a few darker ones for what it is too small for.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import logging
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mapo_lightning.tracking.artifacts import csv_cell

plt.rcParams["text.parse_math"] = False  # a name with two dollar signs is no formula
logging.getLogger("fontTools").setLevel(logging.WARNING)  # it tells of every letter of a PDF

BLUE, SKY, GREEN, ORANGE = "#0072B2", "#56B4E9", "#009E73", "#E69F00"
PINK, RED, GREY, BLACK = "#CC79A7", "#D55E00", "#999999", "#000000"

METHODS: Mapping[str, str] = {
    "mapo": BLUE,
    "mapo_no_cvq": SKY,
    "contextwm": GREEN,
    "apv": ORANGE,
    "prelar": PINK,
    "prelar_fixed": "#882255",
    "dreamerv2": RED,
    "ivideogpt": BLACK,
    "ivideogpt_fixed": "#6A51A3",
    "ivideogpt_semantic": "#8C6D1F",
}
"""Colour of each method that the package brings, in every figure of every report."""

_OTHERS = ("#44AA99", "#AA4499", "#117733", "#332288", "#999933", "#661100")
_MARKERS = "osD^vPX*"
_WIDTH = 9.0  # inches, the width of a page on screen; figures are drawn for it
_DPI = 144


def colour_of(method: str) -> str:
    """Colour of a method; one that the package does not know gets one that its name decides."""
    return METHODS.get(method) or _OTHERS[zlib.crc32(method.encode()) % len(_OTHERS)]


def marker_of(number: int) -> str:
    """Marker by which the variants of one method are told apart; they share their colour."""
    return _MARKERS[number % len(_MARKERS)]


def sheet(
    rows: int, columns: int, height: float, width: float = _WIDTH
) -> tuple[Figure, list[Axes]]:
    """A figure of panels, row by row.

    Args:
        rows: Of panels.
        columns: Of panels.
        height: Of a row, in inches.
        width: Of all, in inches.
    """
    figure, panels = plt.subplots(
        rows, columns, figsize=(width, rows * height), layout="constrained", squeeze=False
    )
    found = [axes for row in panels for axes in row]
    for axes in found:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    return figure, found


def picture(figure: Figure, kind: str) -> bytes:
    """A figure as a file, the same bytes for the same figure.

    Args:
        figure: It stays open.
        kind: ``png``, ``pdf`` or ``svg``.
    """
    dates = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
    buffer = io.BytesIO()
    with plt.rc_context({"svg.hashsalt": "mapo", "pdf.fonttype": 42}):
        figure.savefig(buffer, format=kind, dpi=_DPI, metadata=dates[kind])
    return buffer.getvalue()


def close(figure: Figure) -> None:
    """Free a figure."""
    plt.close(figure)


def image(data: bytes, kind: str, alt: str) -> str:
    """A picture inside a page.

    Args:
        data: Content of the file.
        kind: ``png`` or ``svg+xml``.
        alt: What it shows, for those who do not see it.
    """
    text = base64.b64encode(data).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/{kind};base64,{text}">'


class Link(NamedTuple):
    """A text that leads somewhere."""

    text: str
    target: str
    """Address; empty: nowhere."""
    note: str = ""
    """What is shown over it."""

    def html(self) -> str:
        """As HTML."""
        note = f' title="{html.escape(self.note)}"' if self.note else ""
        shown = html.escape(self.text)
        if not self.target:
            return f"<span{note}>{shown}</span>" if note else shown
        return f'<a href="{html.escape(self.target)}"{note}>{shown}</a>'


Cell = str | Link | Sequence[Link]
"""Of a table: a text, a link, or several links."""


def table(head: Sequence[str], body: Iterable[Sequence[Cell]], style: str = "") -> str:
    """A table of HTML; everything in it is escaped.

    Args:
        head: Titles of the columns.
        body: Rows.
        style: Name of a class of styles; empty: none.
    """
    lines = "".join(table_row(line) for line in body)
    named = f' class="{style}"' if style else ""
    return f"<table{named}>{table_row(head, 'th')}{lines}</table>"


def table_row(cells: Sequence[Cell], tag: str = "td") -> str:
    """One row of a table."""
    return f"<tr>{''.join(f'<{tag}>{_inside(cell)}</{tag}>' for cell in cells)}</tr>"


def _inside(cell: Cell) -> str:
    if isinstance(cell, str):
        return html.escape(cell)
    return cell.html() if isinstance(cell, Link) else ", ".join(link.html() for link in cell)


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as CSV, with every column that any of them has; None and what is missing are empty.

    Cells that a spreadsheet would run as a formula get a leading apostrophe.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None else csv_cell(v) for k, v in row.items()} for row in rows)
    return text.getvalue()


def spaced(name: str) -> str:
    """A name without its underscores."""
    return name.replace("_", " ")
