"""Draws the figures of the README and of docs/architecture.md: ``python docs/figures.py``.

Coordinates are pixels of a page 900 wide, the width at which a README is read; pictures are saved
at twice that. Colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

HERE = Path(__file__).resolve().parent

INK, GREY, PALE = "#222222", "#666666", "#d0d0d0"
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#aa4499"
BLUE_BACK, ORANGE_BACK = "#eaf3fa", "#fdf1e8"

Point = tuple[float, float]


def page(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty page, measured in pixels from its lower left corner."""
    figure = plt.figure(figsize=(width / 100, height / 100), dpi=200, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def write(
    axes: Axes, x: float, y: float, text: str, size: float = 12, color: str = INK, **how: Any
) -> None:
    """Text of a height in pixels, centred unless told otherwise."""
    how = {"ha": "center", "va": "center"} | how
    axes.text(x, y, text, fontsize=size * 0.72, color=color, zorder=4, **how)


def box(
    axes: Axes,
    corner: Point,
    size: Point,
    text: str = "",
    *,
    edge: str = INK,
    face: str = "white",
    font: float = 12,
    width: float = 1.2,
    round_: float = 5,
    **how: Any,
) -> None:
    """A box with rounded corners, from its lower left corner, with text in the middle."""
    axes.add_patch(
        FancyBboxPatch(
            corner,
            *size,
            boxstyle=f"round,pad=0,rounding_size={round_}",
            edgecolor=edge,
            facecolor=face,
            linewidth=width,
        )
    )
    write(axes, corner[0] + size[0] / 2, corner[1] + size[1] / 2, text, font, **how)


def arrow(
    axes: Axes,
    *points: Point,
    color: str = INK,
    width: float = 1.4,
    style: str | tuple[float, tuple[float, float]] = "-",
) -> None:
    """An arrow along straight lines, with its head at the last point."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points[:-1]):
        axes.plot(
            [x0, x1], [y0, y1], color=color, linewidth=width, linestyle=style,
            solid_capstyle="round",
        )  # fmt: skip
    axes.add_patch(
        FancyArrowPatch(
            points[-2],
            points[-1],
            arrowstyle="-|>,head_length=4.5,head_width=2.4",
            color=color,
            linewidth=width,
            linestyle=style,
            shrinkA=0,
            shrinkB=0,
        )
    )


def frame(axes: Axes, x: float, y: float, at: Point, size: float = 40) -> None:
    """A frame of a film: a hand's block that is lifted from a table; ``at`` in [0, 1]."""
    axes.add_patch(Rectangle((x, y), size, size, facecolor="#f7f4ec", edgecolor=INK, linewidth=1))
    axes.add_patch(Rectangle((x, y), size, 0.22 * size, facecolor="#b9a98a", edgecolor="none"))
    axes.add_patch(Rectangle((x, y), size, size, fill=False, edgecolor=INK, linewidth=1))
    left, low = x + at[0] * size, y + at[1] * size
    axes.add_patch(Rectangle((left, low), 0.3 * size, 0.24 * size, facecolor="#333333"))
    finger: dict[str, Any] = {"facecolor": "#e3a98c", "edgecolor": "#8a5a44", "linewidth": 0.6}
    for shift in (-0.07, 0.3):
        axes.add_patch(Rectangle((left + shift * size, low + 0.06 * size), 0.07 * size, 0.3 * size,
                                 **finger))  # fmt: skip
    axes.add_patch(Rectangle((left - 0.07 * size, low + 0.33 * size), 0.44 * size, 0.12 * size,
                             **finger))  # fmt: skip


def states(axes: Axes, xs: list[float], y: float, color: str, names: list[str]) -> None:
    """A chain of latent states."""
    for i, (x, name) in enumerate(zip(xs, names, strict=True)):
        axes.add_patch(Circle((x, y), 16, facecolor="white", edgecolor=color, linewidth=1.6))
        write(axes, x, y, name, 12)
        if i:
            arrow(axes, (xs[i - 1] + 16, y), (x - 16, y), color=color)


def method() -> Figure:
    """From a video's frames to a phrase, to a world model, to an agent that dreams in it."""
    figure, axes = page(900, 486)
    box(axes, (8, 8), (884, 252), edge=BLUE_BACK, face=BLUE_BACK, round_=8)
    write(axes, 20, 24, "1  Pre-training on plain videos", 14, BLUE, ha="left", weight="bold")
    box(axes, (8, 270), (884, 208), edge=ORANGE_BACK, face=ORANGE_BACK, round_=8)
    write(axes, 20, 462, "2  Fine-tuning with a robot's actions", 14, ORANGE, ha="left",
          weight="bold")  # fmt: skip
    _watching(axes)
    _acting(axes)
    return figure


def _watching(axes: Axes) -> None:
    """The lower band: what is learned from videos."""
    for i, lift in enumerate((0.22, 0.28, 0.36, 0.44)):
        frame(axes, 20 + 42 * i, 136, (0.33, lift))
    axes.plot([20, 20, 186, 186], [130, 125, 125, 130], color=INK, linewidth=1.2)
    write(axes, 103, 113, r"window of frames $o_{t-3:t}$", 12, GREY)
    arrow(axes, (166, 178), (166, 215), (212, 215))
    box(axes, (212, 200), (106, 30), "image encoder")
    arrow(axes, (318, 215), (556, 215))
    _describing(axes)
    box(axes, (556, 130), (186, 104), edge=BLUE, width=2)
    write(axes, 649, 147, "lower dynamics", 13, BLUE, weight="bold")
    names = [r"$\hat{s}_{t-1}$", r"$\hat{s}_t$", r"$\hat{s}_{t+1}$"]
    states(axes, [588, 649, 710], 190, BLUE, names)
    arrow(axes, (742, 170), (768, 170))
    box(axes, (768, 130), (58, 104), "decoder")
    arrow(axes, (826, 182), (842, 182))
    frame(axes, 842, 162, (0.33, 0.44))
    write(axes, 862, 150, r"frame $o_t$", 12, GREY)
    _remembering_the_scene(axes)


def _describing(axes: Axes) -> None:
    """From a window to a semantic action."""
    arrow(axes, (190, 156), (212, 156))
    box(axes, (212, 135), (106, 42), "vision-language\nmodel", edge=GREEN, width=1.8)
    arrow(axes, (318, 156), (338, 156), color=GREEN)
    box(axes, (338, 108), (112, 96), edge=GREEN)
    for i, slot in enumerate(("Hand", "lifting", "brick", "upwards", "one arm's length")):
        write(axes, 394, 186 - 17 * i, slot, 11.5, GREEN, style="italic", va="baseline")
    arrow(axes, (450, 156), (476, 156), color=GREEN)
    for i, strength in enumerate((1.0, 0.5, 0.2, 0.7, 0.1)):
        shade = mpl.colors.to_rgba(GREEN, strength)
        axes.add_patch(
            Rectangle((476, 131 + 10 * i), 12, 10, facecolor=shade, edgecolor=GREEN, linewidth=0.8)
        )
    arrow(axes, (488, 156), (556, 156), color=GREEN)
    write(axes, 456, 118, r"semantic action $\hat{a}_t$", 12, GREEN, ha="left")


def _remembering_the_scene(axes: Axes) -> None:
    """From one frame to the code of what does not move."""
    frame(axes, 20, 48, (0.33, 0.36))
    write(axes, 68, 68, "one random\nframe " + r"$o_\tau$", 12, GREY, ha="left")
    arrow(axes, (148, 68), (212, 68))
    box(axes, (212, 48), (106, 40), "context encoder", font=11.5)
    arrow(axes, (318, 68), (338, 68), color=PURPLE)
    rng = np.random.default_rng(3)
    for i, j in itertools.product(range(14), range(4)):
        shade = mpl.colors.to_rgba(PURPLE, 0.12 + 0.75 * float(rng.random()) ** 2)
        cell = Rectangle((338 + 8 * i, 52 + 8 * j), 8, 8, facecolor=shade, edgecolor="white")
        axes.add_patch(cell)
    write(axes, 394, 40, "codebook", 12, PURPLE)
    arrow(axes, (450, 68), (797, 68), (797, 130), color=PURPLE)
    write(axes, 622, 79, "context code: background, texture, light", 12, PURPLE)


def _acting(axes: Axes) -> None:
    """The upper band: what is learned with a robot, on top of the lower one."""
    _robot(axes)
    arrow(axes, (78, 306), (78, 180), style=(0, (4, 2.5)))
    write(axes, 88, 288, "its frames are encoded and described like those of the videos", 12, GREY,
          ha="left")  # fmt: skip
    arrow(axes, (136, 346), (556, 346), color=ORANGE, width=1.8)
    write(axes, 346, 358, r"robot action $a_{t-1}$, from replayed experience", 12, ORANGE)
    box(axes, (556, 302), (186, 104), edge=ORANGE, width=2)
    write(axes, 649, 390, "upper dynamics", 13, ORANGE, weight="bold")
    names = [r"$\tilde{s}_{t-1}$", r"$\tilde{s}_t$", r"$\tilde{s}_{t+1}$"]
    states(axes, [588, 649, 710], 346, ORANGE, names)
    for x in (588, 649, 710):
        arrow(axes, (x, 206), (x, 330), color=BLUE)
    arrow(axes, (742, 316), (755, 316), (755, 206), (768, 206), color=ORANGE)
    arrow(axes, (742, 346), (772, 346), color=ORANGE, width=1.8)
    box(axes, (772, 302), (110, 128), edge=ORANGE, width=2)
    write(axes, 827, 415, "imagination", 13, ORANGE, weight="bold")
    for i, part in enumerate(("actor", "reward head", "critic")):
        box(axes, (784, 376 - 33 * i), (86, 25), part, edge=ORANGE)
    arrow(axes, (827, 430), (827, 444), (78, 444), (78, 424), color=ORANGE, width=1.8)
    write(axes, 649, 456, "the actor chooses the robot's actions", 12, ORANGE)


def _robot(axes: Axes) -> None:
    """The environment: a robot's arm above a cube."""
    box(axes, (20, 306), (116, 118), "")
    write(axes, 78, 319, "environment")
    arm = [(48, 336), (58, 380), (92, 400), (108, 376)]
    axes.plot(*zip(*arm, strict=True), color=INK, linewidth=3.4, solid_joinstyle="round")
    axes.add_patch(Rectangle((36, 332), 24, 8, facecolor=INK))
    for joint in arm[1:3]:
        axes.add_patch(Circle(joint, 4.2, facecolor="white", edgecolor=INK, zorder=3))
    axes.plot([102, 102, 114, 114], [366, 376, 376, 366], color=INK, linewidth=2)
    axes.add_patch(Rectangle((103, 336), 10, 10, facecolor=ORANGE))


# The layers from the lowest up, as tests/unit/test_architecture.py checks them: the subpackages of
# each, with what is in them.
FLOORS: list[dict[str, str]] = [
    {
        "types": "batch keys,\ntime, errors",
        "files": "atomic writes,\nlocks",
        "ownership": "whose settings\nthese are",
        "stopping": "signals",
        "waiting": "messages of\nlong waits",
    },
    {
        "config": "YAML and command line\nbecome dataclasses",
        "models": "world model and agent;\ntensors only",
        "semantics": "describers, phrases,\nvectors, label store",
    },
    {"data": "videos, clips, replay"},
    {"envs": "simulators, the collector, live labels, rendering without a display"},
    {"tracking": "runs, curves and videos in MLflow"},
    {
        "training": "Lightning modules, data modules,\ncheckpoints",
        "label_tools": "gallery, Parquet",
    },
    {"reporting": "what runs have left behind; statistics over seeds; figures and page"},
    {
        "judging": "what dreams are worth",
        "playing": "reality and dream side by side,\nand their page",
    },
    {"callbacks": "what happens around an update: collect, evaluate, record"},
    {"run": "composes a run, builds its objects, runs its stages; load_agent; doctor"},
]

PATHS: list[tuple[str, str, list[tuple[str, str]]]] = [
    (
        "From a video to a loss",
        BLUE,
        [
            ("data/scan.py", "which videos are usable"),
            ("data/clips.py", "draws a clip"),
            ("data/reader.py", "reads the frames"),
            ("data/window_labels.py", "the clip's windows and labels"),
            ("semantics/labeler.py", "window to phrase to vector"),
            ("training/datamodule.py", "the data loader"),
            ("training/pretrain.py", "one update, eq. (2)"),
            ("models/rssm_world/world_model.py", "named loss terms"),
            ("models/rssm_world/rssm.py", "the dynamics"),
        ],
    ),
    (
        "From an environment to a policy",
        ORANGE,
        [
            ("callbacks/collect.py", "when the agent acts"),
            ("envs/collector.py", "steps the environments"),
            ("envs/live_labels.py", "labels what they show"),
            ("training/acting.py", "belief and action"),
            ("data/replay.py", "keeps the experience"),
            ("training/datamodule.py", "chunks become a batch"),
            ("training/finetune.py", "one update, eq. (3) to (5)"),
            ("models/rssm_world/world_model.py", "losses, imagination"),
            ("models/agents/dreamer.py", "actor and critic"),
        ],
    ),
]


def architecture() -> Figure:
    """The subpackages in their layers, and the files that the two data paths go through."""
    left, wide, high = 34, 530, 62
    tall = 28 + high * len(FLOORS)
    figure, axes = page(900, tall)
    for floor, rooms in enumerate(FLOORS):
        low, each = 16 + high * floor, (wide - 8 * (len(rooms) - 1)) / len(rooms)
        for i, (room, what) in enumerate(rooms.items()):
            corner = (left + i * (each + 8), low)
            box(axes, corner, (each, high - 8), face="#f6f6f6", edge=GREY)
            _room(axes, corner, room, what)
    arrow(axes, (18, tall - 20), (18, 16), color=GREY)
    write(axes, 10, tall / 2, "a subpackage imports only from lower layers", 11, GREY, rotation=90)
    top = tall - 26.0
    for title, color, files in PATHS:
        write(axes, 586, top, title, 14, color, ha="left", va="baseline", weight="bold")
        for number, (name, what) in enumerate(files, 1):
            y = top - 24.4 * number
            _stop(axes, (594, y), number, color)
            write(axes, 611, y + 1.5, name, 11, ha="left", va="baseline", family="DejaVu Sans Mono")
            write(axes, 611, y - 10, what, 10.5, GREY, ha="left", va="baseline")
        top -= 24.4 * len(files) + 34
    return figure


def _room(axes: Axes, corner: Point, room: str, what: str) -> None:
    """Name and content of a subpackage, and which steps of the paths happen in it."""
    x, y = corner
    write(axes, x + 10, y + 34, room, 13.5, ha="left", va="baseline", weight="bold")
    for i, line in enumerate(what.split("\n")):
        down = (19 if "\n" in what else 15) - 13 * i
        write(axes, x + 10, y + down, line, 11, GREY, ha="left", va="baseline")
    stops = [
        (number, color)
        for _, color, files in PATHS
        for number, (name, _) in enumerate(files, 1)
        if name.partition("/")[0] == room
    ]
    start = x + 30 + 9 * len(room)
    for i, (number, color) in enumerate(stops):
        _stop(axes, (start + 19 * i, y + 38.5), number, color)


def _stop(axes: Axes, centre: Point, number: int, color: str) -> None:
    axes.add_patch(Circle(centre, 8, facecolor=color, edgecolor="none"))
    write(axes, *centre, str(number), 10.5, "white", weight="bold", va="center_baseline")


FIGURES = {"method": method, "architecture": architecture}


def main() -> None:
    """Draw every figure beside this file."""
    with plt.rc_context({"font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans"}):
        for name, draw in FIGURES.items():
            draw().savefig(HERE / f"{name}.png", metadata={"Software": None})
            plt.close("all")


if __name__ == "__main__":
    main()
