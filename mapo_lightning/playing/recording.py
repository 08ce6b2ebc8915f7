"""A recorded play: a film of reality and dreams side by side, and a strip of some moments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mapo_lightning.data.video import write_mp4
from mapo_lightning.files import atomic_write
from mapo_lightning.playing.commands import CommandError
from mapo_lightning.playing.scene import Moment
from mapo_lightning.types import Frames

_SIDE = 256  # pixels of a pane in the film, about
_CELL = 96  # pixels of a frame in the strip, about
_IN_STRIP = 12  # moments in a strip, at most
_GAP = 4  # white pixels between panes


def save(moments: Sequence[Moment], folder: Path, fps: int) -> list[Path]:
    """Write ``play-001.mp4`` and ``play-001.png``, or the next free number.

    Args:
        moments: As they were shown, one at least.
        folder: Made if missing.
        fps: Frames a second.

    Raises:
        CommandError: There is nothing to write, or it cannot be written.
    """
    if not moments:
        raise CommandError("nothing was recorded: let the play run, or step, before you stop")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = 1 + max((_number(path) for path in folder.glob("play-*")), default=0)
        film, strip = (folder / f"play-{number:03d}.{kind}" for kind in ("mp4", "png"))
        write_mp4(film, np.stack([_side_by_side(moment) for moment in moments]), fps)
        with atomic_write(strip) as draft:
            Image.fromarray(_strip(moments)).save(draft, format="PNG")
    except OSError as error:
        raise CommandError(f"the recording cannot be written: {error.strerror}") from error
    return [film, strip]


def _side_by_side(moment: Moment) -> Frames:
    panes = [_enlarged(frame, _SIDE) for frame in (moment.real, *moment.frames)]
    gap = np.full((panes[0].shape[0], _GAP, 3), 255, np.uint8)
    parts = [part for pane in panes for part in (gap, pane)][1:]
    return np.concatenate(parts, axis=1)


def _strip(moments: Sequence[Moment]) -> Frames:
    """Reality above, a row for every dream below; time runs to the right."""
    chosen = np.linspace(0, len(moments) - 1, min(len(moments), _IN_STRIP)).round().astype(int)
    columns = []
    for index in chosen:
        panes = [_enlarged(x, _CELL) for x in (moments[index].real, *moments[index].frames)]
        gap = np.full((_GAP, panes[0].shape[1], 3), 255, np.uint8)
        column = np.concatenate([part for pane in panes for part in (pane, gap)][:-1])
        columns.append(np.pad(column, ((0, 0), (0, _GAP), (0, 0)), constant_values=255))
    return np.concatenate(columns, axis=1)[:, :-_GAP]


def _enlarged(frame: Frames, side: int) -> Frames:
    """Each pixel as a square of pixels."""
    zoom = max(1, side // frame.shape[0])
    return frame.repeat(zoom, axis=0).repeat(zoom, axis=1)


def _number(path: Path) -> int:
    digits = path.stem.removeprefix("play-")
    return int(digits) if digits.isascii() and digits.isdigit() else 0
