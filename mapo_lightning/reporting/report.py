"""Makes a report of a study, and writes its page, figures and tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from mapo_lightning.files import atomic_write
from mapo_lightning.reporting import compare, figures
from mapo_lightning.reporting.page import Page
from mapo_lightning.reporting.published import Beside, Protocol, beside
from mapo_lightning.reporting.study import Study
from mapo_lightning.reporting.style import close, csv_text, picture
from mapo_lightning.types import ConfigError

PAGE = "report.html"


class Report(NamedTuple):
    """Everything that is written."""

    study: Study
    page: str
    """HTML."""
    tables: Mapping[str, str]
    """Name of a CSV file -> its content."""
    pictures: Mapping[str, bytes]
    """Name of a PNG or PDF file -> its content."""

    def save(self, folder: Path) -> list[Path]:
        """Write all files; returns them, the page first.

        Raises:
            ConfigError: The folder cannot be written.
        """
        content = {PAGE: self.page.encode(), **{k: v.encode() for k, v in self.tables.items()}}
        written = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, data in (*content.items(), *self.pictures.items()):
                with atomic_write(folder / name) as draft:
                    draft.write_bytes(data)
                written.append(folder / name)
        except OSError as error:
            raise ConfigError(
                f"cannot write the report into '{folder}' ({error.strerror}); give another folder "
                "with out=DIR"
            ) from error
        return written


def view_of(study: Study, asked: str = "") -> str:
    """Method that is compared with each other one: the one asked for, mapo, or the first.

    Raises:
        ConfigError: There is no such method.
    """
    if not asked:
        return "mapo" if "mapo" in study.labels else study.labels[0]
    if asked not in study.labels:
        raise ConfigError(
            f"against={asked}: no run here is of it, only of {'; '.join(study.labels)}"
        )
    return asked


def make(
    study: Study, protocol: Protocol, folder: Path, asked: str = "", title: str = ""
) -> Report:
    """Compare, draw and set.

    Args:
        study: With at least one run that counts.
        protocol: Settings of the published experiments.
        folder: Where the report will lie.
        asked: Method that is compared with each other one; empty: `view_of`'s choice.
        title: Of the page; empty: the tasks.
    """
    view = view_of(study, asked)
    compared, paper = compare.comparisons(study), beside(study, protocol)
    mine = compare.from_view(view, compared)
    drawn = dict(_figures(study, mine, paper))
    try:
        shown = {name: picture(figure, "svg") for name, figure in drawn.items()}
        files = {
            f"{name}.{kind}": picture(figure, kind)
            for name, figure in drawn.items() for kind in ("png", "pdf")
        }  # fmt: skip
    finally:
        for figure in drawn.values():
            close(figure)
    title = title or f"Report: {', '.join(study.tasks)}"
    page = Page(title, study, compared, paper, view, shown, folder).html()
    tables = {
        "runs.csv": compare.run_lines(study), "scores.csv": compare.score_lines(study),
        "curves.csv": compare.curve_lines(study),
        "comparisons.csv": compare.comparison_lines(compared),
        "paper.csv": compare.published_lines(paper), "dreams.csv": compare.dream_lines(study),
    }  # fmt: skip
    return Report(study, page, {k: csv_text(v) for k, v in tables.items() if v}, files)


def _figures(
    study: Study, mine: list[compare.Comparison], paper: list[Beside]
) -> Iterator[tuple[str, Figure]]:
    if any(cell.band for cell in study.cells):
        yield "curves", figures.curves(study, robust=False)
        yield "curves_iqm", figures.curves(study, robust=True)
    yield "scores", figures.scores(study)
    over = [one for one in mine if not one.task] or mine
    first = [one for one in over if one.task == over[0].task]
    if first:
        yield "improvement", figures.improvements(study, first)
    for name, figure in (
        ("profiles", figures.profiles(study)),
        ("paper", figures.against_paper(paper)),
    ):
        if figure is not None:
            yield name, figure
