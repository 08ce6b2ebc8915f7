"""Human3.6M, as videos or as prepared frames, by subject, action and camera.

Names that are recognised, anywhere below the given folder::

    S1/Videos/Directions 1.54138969.mp4          the original release, 50 frames per second
    S1_Directions_1.54138969.mp4
    S1_Directions_1.54138969_000006.jpg          prepared frames; numbers count at 50 Hz
    S1/Directions_1.54138969/000006.jpg
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from mapo_lightning.data.image_sequence import IMAGES, name_run
from mapo_lightning.data.listing import SUFFIXES, Entry, Listing, walk
from mapo_lightning.types import VideoError

VALIDATION_SUBJECTS = frozenset({"S9", "S11"})
"""Subjects that the published split uses for validation (facts 5.1: 600 and 239 videos)."""

ACTIONS = (
    "Directions", "Discussion", "Eating", "Greeting", "Phoning", "Photo", "Posing", "Purchases",
    "Sitting", "SittingDown", "Smoking", "Waiting", "WalkDog", "WalkTogether", "Walking",
)  # fmt: skip
"""The 15 actions; two of them have a second name in the files of subject S1."""

_OTHER_NAMES = {"TakingPhoto": "Photo", "WalkingDog": "WalkDog"}
_CAMERA_RATE = 50.0  # Hz; the numbers of prepared frames count the frames of the original video
_NAME = re.compile(
    r"(?:.*/)?(?P<subject>S\d+)[/_](?:.*/)?(?P<action>[A-Za-z]+)(?:[ _]\d+)?\.\d{8}"
    r"(?:[_/](?P<number>\d+))?(?P<suffix>\.\w+)"
)


def list_human36m(root: Path) -> Listing:
    """List videos and runs of frames.

    Returns:
        Entries with the action as label and the published split by subject.

    Raises:
        VideoError: No file is named like one of the data set.
    """
    listing, runs = Listing(), defaultdict[tuple[Path, str, bool], list[int]](list)
    for folder, _, files in walk(root, listing.unreadable):
        for file in files:
            path = folder / file
            suffix = path.suffix.lower()
            if suffix not in SUFFIXES | IMAGES:
                continue
            name = _NAME.fullmatch(path.relative_to(root.parent).as_posix())
            action = _OTHER_NAMES.get(name["action"], name["action"]) if name else ""
            if name is None or action not in ACTIONS or (suffix in IMAGES) != bool(name["number"]):
                listing.unlisted.append(path.relative_to(root).as_posix())
                continue
            validation = name["subject"] in VALIDATION_SUBJECTS
            if name["number"]:
                prefix = file.removesuffix(name["number"] + name["suffix"])
                run = folder / name_run(prefix, name["number"], name["suffix"])
                runs[run, action, validation].append(int(name["number"]))
            else:
                listing.entries.append(Entry(path, action, validation))
    for (run, action, validation), numbers in runs.items():
        entry = Entry(run, action, validation, tuple(sorted(numbers)), _CAMERA_RATE)
        listing.entries.append(entry)
    if not listing.entries:
        raise VideoError(
            f"'{root}' is not Human3.6M: no file in it or its folders is named like "
            "'S1/Videos/Directions 1.54138969.mp4' or 'S1_Directions_1.54138969_000001.jpg'"
        )
    listing.entries.sort()
    return listing
