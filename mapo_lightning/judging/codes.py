"""What the codes of the scene stand for: who shares them, what they show, what they are worth.

Shapes: N frames, L places of a frame, Z code width, M codes, G groups (classes or videos).
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mapo_lightning.judging.measure import Estimate
from mapo_lightning.models.rssm_world.context import FrameContext
from mapo_lightning.models.rssm_world.encoder import normalised
from mapo_lightning.models.rssm_world.quantizer import Quantizer

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

_SHEET_CODES, _SHEET_PATCHES = 24, 8
_RESAMPLES = 1000
_RANDOM = 20  # codebooks that the learned one is compared with
_NAMED = 24  # groups whose names fit beside a heat map

Numbers = NDArray[np.float64]


class SceneCodes(NamedTuple):
    """Codes of frames, the features they were chosen for, and what each frame is of."""

    features: Numbers
    """(N, L, Z) before the look-up."""
    chosen: NDArray[np.int64]
    """(N, L) which code each place has."""
    codes: Numbers
    """(M, Z) the codebook."""
    group: NDArray[np.int64]
    """(N,) number of the frame's class, or of its video where there are no classes."""
    video: NDArray[np.int64]
    """(N,) number of the frame's video."""
    names: tuple[str, ...]
    """Of the groups, (G,)."""

    @property
    def vectors(self) -> Numbers:
        """One vector per frame, (N, Z): the mean code of its places (O35)."""
        found: Numbers = self.codes[self.chosen].mean(axis=1)
        return found

    @property
    def use(self) -> Numbers:
        """Share of all places that have each code, (M,)."""
        counts = np.bincount(self.chosen.ravel(), minlength=len(self.codes))
        shares: Numbers = counts / counts.sum()
        return shares

    @property
    def perplexity(self) -> float:
        """Exponential of the entropy of use, in [1, M]: how many codes are used alike."""
        used = self.use[self.use > 0]
        return float(np.exp(-(used * np.log(used)).sum()))


@torch.no_grad()
def scene_codes(
    context: FrameContext,
    frames: Tensor,
    video: Sequence[int],
    labels: Sequence[str],
) -> SceneCodes:
    """Look every frame up in the codebook.

    Args:
        context: Of a trained world model, with a codebook.
        frames: (N, H, W, 3) uint8, on its device.
        video: Number of each frame's video, (N,).
        labels: Class of each frame's video, (N,); where all are alike, the videos are the groups.

    Raises:
        ValueError: There is no codebook.
    """
    if not context.quantizers:
        raise ValueError("there is no codebook: the context of this model is not quantised")
    maps = context.encoder.maps(normalised(frames))
    if "frame" in context.quantizers:
        pooled = [maps[side].mean(dim=(2, 3)) for side in context.sides]
        rows = torch.cat(pooled, dim=1)[:, None]
        book = context.quantizers["frame"]
    else:
        side = min(context.sides)
        rows = maps[side].flatten(2).transpose(1, 2)
        book = context.quantizers[str(side)]
    assert isinstance(book, Quantizer)
    features = rows.double().cpu().numpy()
    codes = book.codes.double().cpu().numpy()
    of_class = len(set(labels)) > 1
    keys = list(labels) if of_class else [f"video {n}" for n in video]
    order = list(dict.fromkeys(keys))
    group = np.array([order.index(key) for key in keys], np.int64)
    return SceneCodes(
        features, nearest(features, codes), codes, group, np.array(video, np.int64), tuple(order)
    )


def nearest(features: Numbers, codes: Numbers) -> NDArray[np.int64]:
    """Number of the nearest code (M, Z) of each place (N, L, Z), (N, L)."""
    distance = (codes**2).sum(-1) - 2.0 * features @ codes.T
    found: NDArray[np.int64] = distance.argmin(-1)
    return found


def random_codes(found: SceneCodes, seed: int = 0) -> SceneCodes:
    """The same features with as many codes drawn from a normal of their mean and spread."""
    rows = found.features.reshape(-1, found.features.shape[-1])
    rng = np.random.default_rng(seed)
    codes = rng.normal(rows.mean(0), rows.std(0), found.codes.shape)
    return found._replace(codes=codes, chosen=nearest(found.features, codes))


def separation(vectors: Numbers, group: NDArray[np.int64], video: NDArray[np.int64]) -> Numbers:
    """How far groups are apart, video by video, (V,): log10 of between over within; 0: not at all.

    Within is the mean squared distance of a video's frames to other frames of its group, between
    that to frames of other groups. Where every video is a group, within is the distance of its own
    frames from one another; otherwise only frames of *other* videos of the group count, so that
    recognising the video is not taken for recognising the class. The value is bounded by 6: frames
    with the very same codes are a million times nearer.
    """
    square = (vectors**2).sum(1)
    distance = np.maximum(square[:, None] + square[None] - 2.0 * vectors @ vectors.T, 0.0)
    same = group[:, None] == group[None]
    own = video[:, None] == video[None]
    alone = len(set(group.tolist())) == len(set(video.tolist()))
    inside = same & ~np.eye(len(group), dtype=bool) if alone else same & ~own
    found = []
    for number in np.unique(video):
        rows = video == number
        within, between = inside[rows], ~same[rows]
        if within.any() and between.any():
            near, far = distance[rows][within].mean(), distance[rows][between].mean()
            found.append(np.log10(far / max(near, 1e-6 * far)) if far > 0 else 0.0)
    return np.array(found)


def interval(values: Numbers) -> Estimate:
    """Mean over videos with a 95 % percentile bootstrap; NaN without any."""
    if not len(values):
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    drawn = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high), len(values))


class CodesReport(NamedTuple):
    """What was found of a codebook."""

    codes: SceneCodes
    separation: Estimate
    of_random: Estimate
    """The same with random codebooks, mean over several."""
    gain: Estimate
    """Of the learned over a random one; the interval is over videos and random codebooks."""
    of_features: Estimate
    """The same with what is looked up, not quantised."""

    def sentence(self) -> str:
        """What a newcomer should know of it."""
        codes = self.codes
        what = "videos" if len(codes.names) == len(set(codes.video.tolist())) else "classes"
        if self.gain.low > 0:
            verdict = "That is more than random codebooks give"
        else:
            verdict = "That is not shown to be more than random codebooks give"
        return (
            f"{int((codes.use > 0).sum())} of {len(codes.codes)} codes are used (perplexity "
            f"{codes.perplexity:.1f}). By their codes, frames of different {what} are "
            f"{_times(self.separation)} times as far apart (squared) as frames of the same. "
            f"{verdict}: {_times(self.of_random)} times; by the features before the look-up "
            f"{_times(self.of_features)} times."
        )


def save_codes(report: CodesReport, frames: NDArray[np.uint8], folder: Path) -> None:
    """Write ``codebook.md`` (the sentence), ``codebook.json`` and ``codebook.png``.

    Args:
        report: Of these frames.
        frames: (N, H, W, 3) uint8.
        folder: Is made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    codes, kinds = report.codes, ("separation", "of_random", "gain", "of_features")
    figures = {name: getattr(report, name)._asdict() for name in kinds}
    figures |= {"perplexity": codes.perplexity, "use": codes.use.round(6).tolist()}
    figures["alike"] = {
        names: values.round(4).tolist()
        for names, values in zip(("correlation", "cosine"), heat_maps(codes), strict=True)
    } | {"groups": list(codes.names)}
    text = json.dumps(figures, indent=1)
    (folder / "codebook.json").write_text(text + "\n", encoding="utf-8")
    (folder / "codebook.md").write_text(report.sentence() + "\n", encoding="utf-8")
    (folder / "codebook.png").write_bytes(codes_sheet(report, frames))


def codes_report(codes: SceneCodes) -> CodesReport:
    """Measure how well codes, random codes and the features separate the groups.

    Raises:
        ValueError: There are fewer than two groups.
    """
    if len(codes.names) < 2:
        raise ValueError("codes of two videos or classes are needed to tell them apart")
    own = separation(codes.vectors, codes.group, codes.video)
    plain = separation(codes.features.mean(axis=1), codes.group, codes.video)
    random = np.stack(
        [
            separation(random_codes(codes, seed).vectors, codes.group, codes.video)
            for seed in range(_RANDOM)
        ]
    )
    return CodesReport(
        codes, interval(own), interval(random.mean(axis=0)), _gain(own, random), interval(plain)
    )


def _gain(own: Numbers, random: Numbers) -> Estimate:
    """How much more (V,) is than (R, V): one random codebook may do well or badly by chance."""
    if not len(own):
        return interval(own)
    rng = np.random.default_rng(0)
    videos = rng.integers(len(own), size=(_RESAMPLES, len(own)))
    books = rng.integers(len(random), size=(_RESAMPLES, 1))
    drawn = (own[videos] - random[books, videos]).mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(float((own - random).mean()), float(low), float(high), len(own))


def heat_maps(codes: SceneCodes) -> tuple[Numbers, Numbers]:
    """Pearson's correlation and cosine of the groups' mean vectors, (G, G) each (O35)."""
    groups = range(len(codes.names))
    mean = np.stack([codes.vectors[codes.group == g].mean(axis=0) for g in groups])
    return _cosine(mean - mean.mean(axis=1, keepdims=True)), _cosine(mean)


def codes_sheet(report: CodesReport, frames: NDArray[np.uint8]) -> bytes:
    """A picture, PNG: use of the codes, both heat maps, and what each of the commonest codes shows.

    Args:
        report: Of these frames.
        frames: (N, H, W, 3) uint8.
    """
    codes = report.codes
    figure = plt.figure(figsize=(15, 9), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 1.35))
    axes = figure.add_subplot(grid[0, 0])
    axes.bar(range(len(codes.codes)), np.sort(codes.use)[::-1], color="#0072B2")
    axes.set(title=f"use of the {len(codes.codes)} codes, perplexity {codes.perplexity:.1f}")
    axes.set(xlabel="codes, commonest first", ylabel="share of all places")
    axes.spines[["top", "right"]].set_visible(False)
    for column, (title, values) in enumerate(
        zip(("correlation", "cosine"), heat_maps(codes), strict=True), 1
    ):
        _heat(figure.add_subplot(grid[0, column]), values, codes.names, title)
    axes = figure.add_subplot(grid[1, :])
    axes.imshow(patches(codes, frames))
    axes.axis("off")
    axes.set_title("the commonest codes (columns) and the places nearest to each, in their frames")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, format="png", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def patches(codes: SceneCodes, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The places nearest to the commonest codes, a column per code, (H', W', 3) uint8.

    A place is shown with half its width around it; where a code stands for a whole frame, the frame
    is. Of each video at most one place is shown per code.
    """
    side = round(np.sqrt(codes.chosen.shape[1]))
    cell = frames.shape[1] // side
    margin = cell // 2 if side > 1 else 0
    size = cell + 2 * margin
    padded = np.pad(frames, ((0, 0), (margin, margin), (margin, margin), (0, 0)), mode="edge")
    zoom = max(1, 48 // size)
    columns = []
    for code in np.argsort(codes.use)[::-1][:_SHEET_CODES]:
        if not codes.use[code]:
            break
        column = np.full((_SHEET_PATCHES, size, size, 3), 255, np.uint8)
        for row, (frame, place) in enumerate(_nearest_places(codes, int(code))):
            top, left = cell * (place // side), cell * (place % side)
            column[row] = padded[frame, top : top + size, left : left + size]
        big = column.repeat(zoom, axis=1).repeat(zoom, axis=2)
        columns.append(np.pad(big, ((0, 0), (0, 3), (0, 6), (0, 0)), constant_values=255))
    return np.concatenate([np.concatenate(list(column)) for column in columns], axis=1)


def _nearest_places(codes: SceneCodes, code: int) -> list[tuple[int, int]]:
    """(frame, place) of at most 8 places nearest to a code, one of each video."""
    frame, place = np.nonzero(codes.chosen == code)
    apart = ((codes.features[frame, place] - codes.codes[code]) ** 2).sum(-1)
    found: dict[int, tuple[int, int]] = {}
    for i in np.argsort(apart):
        found.setdefault(int(codes.video[frame[i]]), (int(frame[i]), int(place[i])))
        if len(found) == _SHEET_PATCHES:
            break
    return list(found.values())


def _heat(axes: Axes, values: Numbers, names: Sequence[str], title: str) -> None:
    image = axes.imshow(values, vmin=-1.0, vmax=1.0, cmap="RdBu_r")
    axes.set_title(f"{title} of the groups' mean codes")
    if len(names) <= _NAMED:
        short = [name if len(name) <= 28 else f"{name[:27]}…" for name in names]
        axes.set_yticks(range(len(names)), short, fontsize=7)
        axes.set_xticks(range(len(names)), [str(i) for i in range(len(names))], fontsize=7)
    plt.colorbar(image, ax=axes, shrink=0.8)


def _times(decades: Estimate) -> str:
    """A ratio with its interval."""
    mean, low, high = (
        f"{ratio:,.0f}" if (ratio := 10**x) >= 100 else f"{ratio:.3g}" for x in decades[:3]
    )
    return f"{mean} [{low}, {high}]"


def _cosine(rows: Numbers) -> Numbers:
    """Cosines of rows (G, Z), (G, G)."""
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    found: Numbers = unit @ unit.T
    return found
