"""Judges the dreams of a world model: looks, control, and whether they can be acted on."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mapo_lightning.judging.clips import Clips, misled, yardsticks
from mapo_lightning.judging.control import controllability
from mapo_lightning.judging.executable import executable, foreseen
from mapo_lightning.judging.looks import Distance, looks
from mapo_lightning.judging.measure import Measure
from mapo_lightning.judging.regression import Reader
from mapo_lightning.judging.report import DreamReport, report
from mapo_lightning.models.interfaces import WorldModel
from mapo_lightning.training.told import dreamt

SEEN = 5
"""Frames that are shown before a dream."""

Measures = dict[str, dict[str, Measure]]


def judge(
    world_model: WorldModel,
    clips: Clips,
    title: str,
    inverse: Reader | None = None,
    perceptual: Distance | None = None,
    seen: int = SEEN,
    keep: Callable[[Tensor], None] | None = None,
) -> DreamReport:
    """Dream the rest of every clip, rightly driven and misled, and measure it.

    Args:
        world_model: Trained; used in evaluation mode, whatever mode it is in.
        clips: Of two videos or episodes at least, that it has not learned from.
        title: Whose dreams they are, for the report.
        inverse: Reads actions off pairs of frames; None: executability is left out.
        perceptual: LPIPS; None: it is left out.
        seen: Frames that are shown.
        keep: Gets the frames of the dream, (C, T, H, W, 3) in [0, 1].

    Raises:
        ValueError: The clips are too short, or all of one group.
    """
    if clips.steps <= seen:
        raise ValueError(
            f"dreams are judged after {seen} frames, and the longest sequence has {clips.steps}"
        )
    truth = clips.truth
    dream = dreamt(world_model, clips.batch, seen)
    if keep is not None:
        keep(dream)
    wrong = {name: dreamt(world_model, batch, seen) for name, batch in misled(clips, seen).items()}
    compared: dict[str, Tensor] = {"dream": dream, "null": wrong["null"]}
    compared |= yardsticks(clips, seen)
    found: dict[str, Measures] = {
        "looks": {
            name: looks(truth, frames, seen, perceptual=perceptual)
            for name, frames in compared.items()
        },
        "control": controllability(truth, dream, wrong, seen),
    }
    if clips.driver == "action":
        if inverse is not None and clips.steps > seen + 1:
            found["executable"] = {
                name: executable(inverse, clips.batch["action"], compared[name], seen)
                for name in ("oracle", "dream", "null")
            }
        found["foreseen"] = {"dream": foreseen(world_model, clips.batch, seen)}
    return report(title, found, clips.group.cpu().numpy())
