"""Do the phrases lead the dream? The same weights, told what happens, untold and mistold.

A few frames are shown and the rest is dreamt: with the phrases of what really happens next (told),
without them (untold), or with those of another video (mistold). The frames are compared on the
pixels that move in the clip, beside what needs no model: copying the last frame, the video's still
scene, and one mean picture for all.

Shapes: N clips, T frames, H W image, K horizons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from mapo_lightning.models.interfaces import WorldModel
from mapo_lightning.training.datamodule import VideoDataModule
from mapo_lightning.types import Batch, Frames

HORIZONS = (1, 5, 10, 15)
"""Frames ahead of the last one that was shown."""
MOVING = 0.1
"""A pixel moves if one of its colours varies by more than this share of the range in the clip."""
_COSTS = ("untold", "mistold")  # compared with told, video by video
_GATED = (1, 5, 10)  # frames ahead at which told has to beat every yardstick
_YARDSTICKS = {
    "copy": "copying the last frame",
    "still_scene": "the still scene",
    "mean_picture": "one mean picture",
}
_EDGES = {
    "truth": (40, 40, 40),
    "told": (60, 180, 75),
    "untold": (245, 150, 40),
    "mistold": (230, 60, 60),
}

Errors = NDArray[np.float64]
"""Mean squared error on moving pixels, colours in [0, 1]: (videos, K)."""


class Interval(NamedTuple):
    """A mean over videos with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


class ToldReport(NamedTuple):
    """Errors of the dreams and of the yardsticks, by name; rows are videos."""

    errors: dict[str, Errors]
    horizons: tuple[int, ...]
    frames: dict[str, Tensor]
    """Truth and dreams, (N, T, H, W, 3) in [0, 1], for pictures."""
    seen: int
    """Frames that were shown."""

    def at(self, name: str, horizon: int) -> Interval:
        """Error at a horizon, in thousandths."""
        return _interval(1e3 * self.errors[name][:, self.horizons.index(horizon)])

    def gain(self, worse: str, horizon: int, better: str = "told") -> Interval:
        """By how much one errs more than another, in thousandths, video by video."""
        step = self.horizons.index(horizon)
        return _interval(1e3 * (self.errors[worse][:, step] - self.errors[better][:, step]))

    def metrics(self) -> dict[str, float]:
        """All means, for a logger: ``told/untold_5`` is the error in thousandths."""
        return {
            f"told/{name}_{horizon}": self.at(name, horizon).mean
            for name in self.errors
            for horizon in self.horizons
        }

    def led(self) -> bool:
        """Whether untold and mistold err more than told, by more than the interval.

        Five frames ahead, or as many as there are.
        """
        return all(self.gain(name, self._horizon).low > 0 for name in _COSTS)

    def unbeaten(self) -> dict[str, tuple[int, ...]]:
        """What needs no model and still does not err more than told, and how far ahead."""
        gated = [horizon for horizon in _GATED if horizon in self.horizons]
        found = {
            name: tuple(h for h in gated if self.at("told", h).mean >= self.at(name, h).mean)
            for name in _YARDSTICKS
        }
        return {name: horizons for name, horizons in found.items() if horizons}

    def sentence(self) -> str:
        """What a newcomer should know of it: the errors, and which part of the gate they pass."""
        horizon = self._horizon
        told, untold, mistold = (self.at(n, horizon).mean for n in ("told", *_COSTS))
        known = [f"{says} by {self.at(n, horizon).mean:.1f}" for n, says in _YARDSTICKS.items()]
        verdict = "lead the dream" if self.led() else "do not lead the dream yet"
        gated = _listed([h for h in _GATED if h in self.horizons])
        judged = f"Told is better than these three {gated} frames ahead."
        if unbeaten := self.unbeaten():
            named = [f"{_YARDSTICKS[n]} ({_listed(at)} ahead)" for n, at in unbeaten.items()]
            judged = f"Told is not better than {_listed(named)}."
        return (
            f"Dreaming {horizon} frames ahead of held-out videos, the model errs by {told:.1f} "
            f"(thousandths, moving pixels) when it is told what happens, by {untold:.1f} untold "
            f"and {mistold:.1f} mistold; {_listed(known)}. The phrases {verdict}: untold costs "
            f"{self.gain('untold', horizon)}, mistold {self.gain('mistold', horizon)}. {judged}"
        )

    @property
    def _horizon(self) -> int:
        return 5 if 5 in self.horizons else self.horizons[-1]

    def rows(self) -> list[tuple[str, int, Interval]]:
        """Everything that is reported: name, horizon, and error or difference in thousandths."""
        errors = [(name, h, self.at(name, h)) for name in self.errors for h in self.horizons]
        costs = [(f"{n} - told", h, self.gain(n, h)) for n in _COSTS for h in self.horizons]
        return errors + costs

    def table(self) -> str:
        """Markdown: a row per dream, yardstick and difference, a column per horizon."""
        return _table(self.rows(), self.horizons)


def over_seeds(reports: Sequence[ToldReport]) -> str:
    """Markdown: means over models of several seeds, with Student's t interval over the models.

    What not all of them have is left out: a horizon, or dreams without a body.
    """
    found = [{(name, ahead): value.mean for name, ahead, value in r.rows()} for r in reports]
    of_all = [row for row in found[0] if all(row in mine for mine in found)]
    rows = [(*row, student([mine[row] for mine in found])) for row in of_all]
    horizons = tuple(dict.fromkeys(ahead for _, ahead in of_all))
    return (
        f"Means over {len(reports)} models, with 95 % Student's t intervals over them.\n\n"
        + _table(rows, horizons)
    )


def _table(rows: Sequence[tuple[str, int, Interval]], horizons: tuple[int, ...]) -> str:
    head = " | ".join(f"{horizon} ahead" for horizon in horizons)
    lines = [f"| thousandths | {head} |", "|---" * (len(horizons) + 1) + "|"]
    for start in range(0, len(rows), len(horizons)):
        cells = " | ".join(str(value) for _, _, value in rows[start : start + len(horizons)])
        lines.append(f"| {rows[start][0].replace('_', ' ')} | {cells} |")
    return "\n".join(lines) + "\n"


def student(values: Sequence[float]) -> Interval:
    """A mean with its 95 % interval by Student's t."""
    mean, half = float(np.mean(values)), float(stats.sem(values))
    half *= float(stats.t.ppf(0.975, len(values) - 1))
    return Interval(mean, mean - half, mean + half)


def measure_held_out(world_model: WorldModel, data: VideoDataModule, clips: int) -> ToldReport:
    """`measure_told` of at most ``clips`` clips of the held-out videos of a data module.

    Raises:
        ValueError: See `measure_told`.
        VideoFileError: A video can no longer be read.
    """
    batch = data.held_out_batch(clips)
    still, device = data.still_scenes(batch["video"]), next(world_model.parameters()).device
    batch = {key: value.to(device) for key, value in batch.items()}
    return measure_told(world_model, batch, still, data.mean_picture(), body=data.body_width)


def measure_told(
    world_model: WorldModel,
    batch: Batch,
    still: Tensor,
    mean_picture: Tensor,
    seen: int = 5,
    body: int = 0,
    seed: int = 0,
) -> ToldReport:
    """Dream the rest of held-out clips in every version and compare.

    Args:
        world_model: Pre-trained with phrases.
        batch: Clips (N, T, ...) with ``semantic`` and ``has_semantic``; ``video`` (N,) says which
            of them are of one video.
        still: The still scene of each clip, (N, H, W, 3) in [0, 1]: its whole video's median.
        mean_picture: Mean frame of the training videos, (H, W, 3) in [0, 1].
        seen: Frames that are shown.
        body: Leading entries of a semantic vector that stand for the body; 0 where there are none.
        seed: Of the dreams' random numbers, the same for every version.

    Raises:
        ValueError: Fewer than two videos, or fewer than two in which anything moves; or clips that
            are not longer than ``seen``.
    """
    obs = batch["obs"]
    video = batch.get("video", torch.arange(len(obs)))
    videos, needed = len(set(video.tolist())), "told, untold and mistold need two videos"
    if videos < 2 or obs.shape[1] <= seen:
        raise ValueError(f"{needed} and more than {seen} frames, got {videos} and {obs.shape[1]}")
    clips = {key: value for key, value in batch.items() if value.ndim > 1}
    truth = obs.float() / 255.0
    dreams = {
        name: dreamt(world_model, told, seen, seed)
        for name, told in versions(clips, seen, body, of_another(video)).items()
    }
    yardsticks = {
        "copy": truth[:, seen - 1 : seen],
        "still_scene": still.to(truth)[:, None],
        "mean_picture": mean_picture.to(truth),
    }
    horizons = tuple(h for h in HORIZONS if seen + h <= obs.shape[1])
    moving = moving_pixels(truth)
    errors = {
        name: _per_video(_errors(truth, frames.expand_as(truth), moving, seen, horizons), video)
        for name, frames in (dreams | yardsticks).items()
    }
    if (moved := len(errors["told"])) < 2:
        raise ValueError(f"{needed} in which something moves, got {moved} of {videos}")
    return ToldReport(errors, horizons, {"truth": truth} | dreams, seen)


def moving_pixels(truth: Tensor) -> Tensor:
    """Where something moves in a clip: (N, T, H, W, 3) in [0, 1] -> (N, H, W, 1) bool."""
    return (truth.amax(1) - truth.amin(1)).amax(-1, keepdim=True) > MOVING


def versions(batch: Batch, seen: int, body: int, other: Tensor) -> Mapping[str, Batch]:
    """The clips with the phrases of the future as they are, removed, swapped, and in honest forms.

    ``other`` (N,) says from which clip each gets its phrases when it is mistold.

    ``told_late`` has every phrase one frame later, so that none has seen the frame that it is to
    predict; in ``told_late_bodiless`` it does not say either what or where the moving thing is.
    """
    semantic, known = batch["semantic"], batch["has_semantic"]
    future = torch.arange(known.shape[1], device=known.device) >= seen
    others = {key: batch[key][other] for key in ("semantic", "has_semantic")}
    late = {
        "semantic": torch.cat([torch.zeros_like(semantic[:, :1]), semantic[:, :-1]], dim=1),
        "has_semantic": torch.cat([torch.zeros_like(known[:, :1]), known[:, :-1]], dim=1),
    }
    found = {
        "told": batch,
        "untold": batch | {"has_semantic": known & ~future},
        "mistold": batch
        | {
            "semantic": torch.where(future[:, None], others["semantic"], semantic),
            "has_semantic": torch.where(future, others["has_semantic"], known),
        },
        "told_late": batch | late,
    }
    if body:
        bodiless = late["semantic"].clone()
        bodiless[..., :body] = 0.0
        found["told_late_bodiless"] = found["told_late"] | {"semantic": bodiless}
    return found


def dreamt(world_model: WorldModel, batch: Batch, seen: int, seed: int = 0) -> Tensor:
    """Frames (N, T, H, W, 3) in [0, 1] of a dream; the same random numbers whatever leads it."""
    device = batch["obs"].device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return world_model.open_loop(batch, seen)


def of_another(group_N: Tensor) -> Tensor:
    """For each clip the nearest one before it, in a circle, that is of another video, (N,).

    Args:
        group_N: Number of each clip's video or episode; two of them at least.
    """
    found, numbers = [], group_N.tolist()
    for clip, number in enumerate(numbers):
        before = (clip - step for step in range(1, len(numbers)))
        found.append(next(i % len(numbers) for i in before if numbers[i] != number))
    return torch.tensor(found, device=group_N.device)


def told_strip(report: ToldReport, clips: int = 4, zoom: int = 0) -> Frames:
    """Draw clips as rows of frames: truth, told (green edge), untold (orange), mistold (red).

    Args:
        report: With its frames.
        clips: Clips, spread evenly over those of the report.
        zoom: Side of a source pixel; 0: such that a frame is about 64 pixels wide.

    Returns:
        (H', W', 3) uint8; frames that were shown to the model are set off by a gap.
    """
    truth = report.frames["truth"]
    count, steps, side = truth.shape[:3]
    zoom = zoom or max(1, 64 // side)
    edge = max(2, zoom)
    lines = []
    for clip in np.linspace(0, count - 1, min(clips, count)).astype(int):
        for name, colour in _EDGES.items():
            frames = (report.frames[name][clip].clamp(0, 1) * 255).round().to(torch.uint8)
            big = frames.cpu().numpy().repeat(zoom, axis=1).repeat(zoom, axis=2)
            tile = np.full((steps, side * zoom + 2 * edge, side * zoom + edge, 3), colour, np.uint8)
            tile[:, edge:-edge, : side * zoom] = big
            strip = np.concatenate(list(tile), axis=1)
            gap = np.full((strip.shape[0], 3 * edge, 3), 255, np.uint8)
            cut = report.seen * tile.shape[2]
            lines.append(np.concatenate([strip[:, :cut], gap, strip[:, cut:]], axis=1))
        lines.append(np.full((4 * edge, lines[-1].shape[1], 3), 255, np.uint8))
    return np.concatenate(lines[:-1], axis=0)


def _errors(
    truth: Tensor, frames: Tensor, moving: Tensor, seen: int, horizons: tuple[int, ...]
) -> Tensor:
    """Mean squared error on moving pixels, (N, K); NaN where nothing moves."""
    ahead = [seen + horizon - 1 for horizon in horizons]
    squared = (frames[:, ahead] - truth[:, ahead]).pow(2) * moving[:, None]
    return squared.sum(dim=(2, 3, 4)) / (3 * moving.sum(dim=(1, 2, 3))[:, None])


def _per_video(errors_NK: Tensor, video_N: Tensor) -> Errors:
    """Means over the clips of each video in which something moves: videos are independent."""
    rows = []
    for number in sorted(set(video_N.tolist())):
        found = errors_NK[video_N.to(errors_NK.device) == number]
        found = found[~found.isnan().any(dim=1)]
        if len(found):
            rows.append(found.mean(dim=0).cpu().numpy())
    return np.asarray(rows, np.float64).reshape(len(rows), errors_NK.shape[1])


def _listed(things: Sequence[object]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    *most, last = map(str, things)
    return f"{', '.join(most)} and {last}" if most else last


def _interval(values: NDArray[np.float64]) -> Interval:
    """Mean and percentile bootstrap over videos, always from the same draws."""
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Interval(float(values.mean()), float(found.low), float(found.high))
