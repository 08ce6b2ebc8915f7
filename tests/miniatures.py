"""Small data sets laid out on disk as the large ones are, with real files in them."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from mapo_lightning.types import Frames

CLASSES = ("Holding something", "Pushing something from left to right", "Closing something")
"""Three of the templates of Something-Something V2."""


def scene(seed: int, frames: int, height: int = 48, width: int = 64) -> Frames:
    """A bright block that moves to the right over a background of the seed's own colours."""
    rng = np.random.default_rng(seed)
    film = np.empty((frames, height, width, 3), np.uint8)
    patches = rng.integers(30, 120, (height // 8, width // 8, 3), np.uint8)
    film[:] = patches.repeat(8, axis=0).repeat(8, axis=1)
    for t in range(frames):
        left = (seed + 2 * t) % (width - 12)
        film[t, height // 3 : height // 3 + 12, left : left + 12] = (230, 200, 40)
    return film


def write_webm(path: Path, frames: Frames, fps: int = 12) -> None:
    """Write a VP9 film, as Something-Something V2 is handed out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="webm") as container:
        stream = container.add_stream("libvpx-vp9", rate=Fraction(fps))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.options = {"deadline": "realtime", "cpu-used": "8", "crf": "20", "b": "0"}
        stream.codec_context.thread_count = 1
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def write_images(run: Path, frames: Frames, first: int = 1, step: int = 1) -> None:
    """Write numbered images; ``run`` is the path of one, its number as ``%06d``."""
    run.parent.mkdir(parents=True, exist_ok=True)
    for t, frame in enumerate(frames):
        assert cv2.imwrite(str(run.with_name(run.name % (first + step * t))), frame[..., ::-1])


def write_ssv2(root: Path, train: int = 4, validation: int = 2, frames: int = 30) -> Path:
    """Lay out Something-Something V2: ids from 101, classes in turn, lists in ``labels``."""
    rows = []
    for number in range(train + validation):
        template = CLASSES[number % 3].replace("something", "[something]", 1)
        row = {"id": str(101 + number), "template": template, "placeholders": [f"cup {number}"]}
        rows.append(row | {"label": CLASSES[number % 3].lower().replace("something", "cup")})
        write_webm(
            root / "20bn-something-something-v2" / f"{101 + number}.webm", scene(number, frames)
        )
    write_list(root / "labels" / "labels.json", {name: str(i) for i, name in enumerate(CLASSES)})
    write_list(root / "labels" / "train.json", rows[:train])
    write_list(root / "labels" / "validation.json", rows[train:])
    return root


def write_list(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
