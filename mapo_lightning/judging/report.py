"""One table and one page of what dreams are worth: Markdown, CSV, JSON, a picture and HTML."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from mapo_lightning.judging.clips import MISLED
from mapo_lightning.judging.measure import Estimate, Measure
from mapo_lightning.reporting import style
from mapo_lightning.reporting.style import spaced
from mapo_lightning.tracking import artifacts
from mapo_lightning.training.told import student

ASPECTS = {
    "looks": "How the dream looks: PSNR in dB, SSIM, on whole frames and on the pixels that move",
    "control": "What the dream loses when it is misled, in dB of PSNR: 0 means that it does not "
    "obey what drives it",
    "executable": "Actions that an inverse model reads off pairs of dreamt frames: R², with the "
    "true frames as the ceiling",
    "foreseen": "Rewards and ends of episodes that the dream foresees: R² of a step and of the sum "
    "up to it, slope (1 if calibrated), bias per step, Brier score of going on",
    "consistency": "Two opposite action sequences from one state: how the difference of the dreamt "
    "pictures compares with the true one. Direction 1 and size 1 are right, 0: actions change "
    "nothing; spill is the share of the difference that lies elsewhere",
    "decisions": "Five random action sequences from one state, run and dreamt: true return lost by "
    "the one that the dream prefers (share of their range; 0 is best), share of pairs in the right "
    "order (0.5 by guessing), rank correlation",
    "foresight": "What the agent imagined of its own future, against what its imagined actions led "
    "to (executed) and what it then did (closed): squared error on moving pixels, with that of the "
    "start picture (still), and distance of beliefs (1: as far as from any other state). Last, its "
    "return and success where it stayed near its dream, and where not",
    "checkpoints": "Whether dreams tell which agent is better: all go on from the same states; the "
    "return that each imagines, against the one that it then gets. Rank correlation over agents, "
    "of means over states and of each state alone",
    "physics": "How far bodies are from where they really are, in pixels, as a network reads their "
    "places off true and dreamt frames: without action, under a held one, and when it is turned "
    "round half-way; and how far a dreamt step jumps beyond the largest true one. The spread is "
    "how far true takes are apart; a dream without error explains 1 of it, one that is as far away "
    "as another take 0. The reader's own error is that on real frames",
}
"""Aspect -> what its table says."""
_COLOURS = {
    "dream": style.BLUE, "null": style.ORANGE, "copy": style.RED, "still_scene": style.GREEN,
    "mean_picture": style.GREY, "oracle": style.BLACK,
    "random": style.BLUE, "swapped": style.PINK, "negated": style.RED,
}  # fmt: skip
_LINES = ("dream", "null", "copy", "still_scene", "mean_picture")

Found = Mapping[str, Mapping[str, Mapping[str, Measure]]]
"""Aspect -> who dreams -> name of the measure -> the measure."""


class Row(NamedTuple):
    """One figure."""

    aspect: str
    dream: str
    measure: str
    ahead: int
    estimate: Estimate

    def cells(self) -> dict[str, object]:
        """As a line of a table."""
        mean, low, high, contexts = self.estimate
        numbers = {"mean": mean, "low": low, "high": high}
        return {
            "aspect": self.aspect,
            "dream": self.dream,
            "measure": self.measure,
            "frames_ahead": self.ahead,
            **{key: float(f"{x:.5g}") if np.isfinite(x) else None for key, x in numbers.items()},
            "contexts": contexts,
        }


class DreamReport(NamedTuple):
    """Everything that was measured of one model's dreams."""

    title: str
    rows: tuple[Row, ...]

    def at(self, aspect: str, dream: str, measure: str, ahead: int) -> Estimate:
        """One figure.

        Raises:
            KeyError: It was not measured.
        """
        for row in self.rows:
            if row[:4] == (aspect, dream, measure, ahead):
                return row.estimate
        raise KeyError(f"{aspect}/{dream}/{measure} {ahead} ahead was not measured")

    def with_more(self, other: DreamReport) -> DreamReport:
        """The same with the rows of another report behind its own."""
        return self._replace(rows=self.rows + other.rows)

    def metrics(self) -> dict[str, float]:
        """For a logger: ``dream/looks_psnr_moving_5``; other dreamers by name between."""
        return {
            "dream/"
            + "_".join(
                [r.aspect, *([] if r.dream == "dream" else [r.dream]), r.measure, str(r.ahead)]
            )
            .replace(",", "")
            .replace(" ", "_"): r.estimate.mean
            for r in self.rows
            if np.isfinite(r.estimate.mean)
        }

    def sentence(self) -> str:
        """What a newcomer should know of it."""
        ahead = max((r.ahead for r in self.rows if r.aspect == "looks" and r.ahead <= 5), default=1)

        def psnr(dream: str) -> str:
            return f"{self.at('looks', dream, 'psnr_moving', ahead).mean:.1f}"

        text = (
            f"{ahead} frames ahead the dream has a PSNR of {psnr('dream')} dB on moving pixels; "
            f"copying the last frame has {psnr('copy')}, the still scene {psnr('still_scene')}, "
            f"the mean picture {psnr('mean_picture')}."
        )
        lost = [r for r in self.rows if r[:3] == ("control", "random", "control_moving")]
        if lost:
            four = next((r for r in lost if r.ahead == 4), lost[-1])
            verdict = "It obeys" if four.estimate.low > 0 else "That it obeys is not shown"
            text += (
                f" {verdict}: misled at random it loses {four.estimate} dB {four.ahead} frames "
                "ahead."
            )
        return text

    def tables(self) -> Iterator[tuple[str, list[list[str]]]]:
        """Aspect -> its table, a row per dream and measure, a column per frames ahead."""
        for aspect in dict.fromkeys(row.aspect for row in self.rows):
            mine = [row for row in self.rows if row.aspect == aspect]
            ahead = sorted({row.ahead for row in mine})
            cells: dict[tuple[str, str], dict[int, str]] = {}
            measures = list(dict.fromkeys(row.measure for row in mine))
            for row in sorted(mine, key=lambda row: measures.index(row.measure)):
                text = str(row.estimate) if row.estimate.contexts else ""
                cells.setdefault((row.measure, row.dream), {})[row.ahead] = text
            head = ["measure", "dream", *(f"{n} ahead" for n in ahead)]
            body = [
                [spaced(measure), spaced(dream), *(line.get(n, "") for n in ahead)]
                for (measure, dream), line in cells.items()
            ]
            yield aspect, [head, *body]

    def markdown(self) -> str:
        """The sentence and all tables."""
        parts = [f"# {self.title}", self.sentence()]
        for aspect, (head, *body) in self.tables():
            lines = [head, ["---"] * len(head), *body]
            table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
            parts += [f"{ASPECTS[aspect]}.", table]
        return "\n\n".join(parts) + "\n"

    def page(self) -> str:
        """A self-contained HTML page with the picture and all tables."""
        parts = [f"<h1>{html.escape(self.title)}</h1><p>{html.escape(self.sentence())}</p>"]
        parts.append(style.image(_png(self), "png", "figures over frames ahead"))
        for aspect, (head, *body) in self.tables():
            parts.append(f"<h2>{aspect}</h2><p>{html.escape(ASPECTS[aspect])}.</p>")
            parts.append(style.table(head, body))
        return artifacts.html_page("\n".join(parts), self.title)

    def save(self, folder: Path) -> None:
        """Write ``dreams.md``, ``.csv``, ``.json``, ``.png`` and ``.html``."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = [row.cells() for row in self.rows]
        (folder / "dreams.csv").write_text(style.csv_text(rows), encoding="utf-8")
        (folder / "dreams.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        (folder / "dreams.md").write_text(self.markdown(), encoding="utf-8")
        (folder / "dreams.png").write_bytes(_png(self))
        (folder / "dreams.html").write_text(self.page(), encoding="utf-8")

    def record(self, logger: object, step: int) -> None:
        """Put figures, table and page into an MLflow run."""
        if hasattr(logger, "log_metrics"):
            logger.log_metrics(self.metrics(), step)
        artifacts.log_table(logger, [row.cells() for row in self.rows], "dreams/dreams")
        artifacts.log_page(logger, self.page(), "dreams/dreams.html")


def report(title: str, found: Found, groups: NDArray[np.int64]) -> DreamReport:
    """Estimate every figure, with intervals over the groups of contexts.

    Args:
        title: Whose dreams they are.
        found: All measures.
        groups: Number of the group of each context, (C,).
    """
    return DreamReport(
        title,
        tuple(
            Row(aspect, dream, name, ahead, measure.estimate(column, groups))
            for aspect, dreams in found.items()
            for dream, measures in dreams.items()
            for name, measure in measures.items()
            for column, ahead in enumerate(measure.ahead)
        ),
    )


def over_models(reports: Sequence[DreamReport]) -> DreamReport:
    """Means over models, of several seeds for example, with 95 % Student's t intervals over them.

    Figures that not all of them have are left out; ``contexts`` counts models.
    """
    figures = [{row[:4]: row.estimate.mean for row in report.rows} for report in reports]
    rows = []
    for key in figures[0]:
        found = [mine[key] for mine in figures if np.isfinite(mine.get(key, np.nan))]
        if len(found) == len(reports):
            rows.append(Row(*key, Estimate(*student(found), len(found))))
    return DreamReport(f"Means over {len(reports)} models", tuple(rows))


def _png(told: DreamReport) -> bytes:
    """Four panels: looks on moving pixels, control, and what can be acted on."""
    figure, panels = style.sheet(1, 4, 4, 16)
    _lines(panels[0], told, ("looks", "psnr_moving"), _LINES, "PSNR on moving pixels (dB)")
    _lines(panels[1], told, ("looks", "ssim_moving"), _LINES, "SSIM on moving pixels")
    _lines(panels[2], told, ("control", "control_moving"), MISLED, "lost when misled (dB)")
    panels[2].axhline(0.0, color="0.4", lw=1, ls="--")
    _bars(panels[3], [r for r in told.rows if r.measure in ("action", "reward", "reward_sum")])
    picture = style.picture(figure, "png")
    style.close(figure)
    return picture


def _lines(
    axes: Axes, told: DreamReport, what: tuple[str, str], dreams: Sequence[str], title: str
) -> None:
    aspect, measure = what
    ahead: list[int] = []
    for dream in dreams:
        mine = [r for r in told.rows if r[:3] == (aspect, dream, measure) and r.estimate.contexts]
        if not mine:
            continue
        ahead = [r.ahead for r in mine]
        mean, low, high = ([r.estimate[i] for r in mine] for i in range(3))
        colour = _COLOURS[dream]
        axes.plot(ahead, mean, marker="o", ms=3, color=colour, label=spaced(dream))
        axes.fill_between(ahead, low, high, color=colour, alpha=0.15, lw=0)
    axes.set(title=title, xlabel="frames ahead", xticks=ahead)
    if ahead:
        axes.legend(
            frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.18)
        )


def _bars(axes: Axes, rows: Sequence[Row]) -> None:
    """R² of actions and rewards."""
    if not rows:
        axes.axis("off")
        return
    names = [f"{spaced(r.measure)}, {spaced(r.dream)}, {r.ahead} ahead" for r in rows]
    mean = np.array([r.estimate.mean for r in rows])
    low, high = (np.array([r.estimate[i] for r in rows]) for i in (1, 2))
    axes.barh(names, np.clip(mean, -1.0, 1.0), color=[_COLOURS[r.dream] for r in rows], alpha=0.7)
    axes.errorbar(mean, names, xerr=[mean - low, high - mean], fmt="none", ecolor="0.2", lw=1)
    axes.set(xlim=(-1.0, 1.05), title="R² of actions and rewards")
    axes.tick_params(labelsize=7)
    axes.invert_yaxis()
