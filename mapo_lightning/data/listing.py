"""Lists the videos of a data set without opening them: types and tools for every layout."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mapo_lightning.data.video_info import Caption, printable
from mapo_lightning.types import ConfigError

SUFFIXES = frozenset({".mp4", ".mkv", ".webm", ".avi", ".m4v", ".mov"})
"""File names that count as videos, lower case."""


class Entry(NamedTuple):
    """One video that was found."""

    path: Path
    """A video file, a folder of numbered images, or the name of a run of images."""
    label: str = ""
    """Class, as text; empty if the data set names none."""
    validation: bool | None = None
    """Whether the data set's own split uses it for validation; None: it has no split."""
    numbers: tuple[int, ...] = ()
    """Numbers of the images of a run, ascending."""
    number_rate: float = 0.0
    """Image numbers per second, Hz; 0.0 if unknown."""
    captions: tuple[Caption, ...] = ()
    """Sentences about the video, by their start."""


@dataclass
class Listing:
    """All videos of a data set, and what does not match its lists."""

    entries: list[Entry] = field(default_factory=list)
    """Videos that were found, in a fixed order."""
    missing: list[str] = field(default_factory=list)
    """Videos in a list that were not found."""
    unlisted: list[str] = field(default_factory=list)
    """Videos that were found but are in no list, or whose name cannot be read."""
    unreadable: list[str] = field(default_factory=list)
    """Folders that could not be listed, with the reason."""


def walk(root: Path, unreadable: list[str]) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Walk a folder as `os.walk` does, without hidden names and without links to folders.

    Args:
        root: Where to begin.
        unreadable: Folders that cannot be listed are appended, with the reason.
    """

    def note(error: OSError) -> None:
        unreadable.append(f"{printable(error.filename)}: {error.strerror}")

    for folder, names, files in os.walk(root, onerror=note):
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield Path(folder), names, sorted(name for name in files if not name.startswith("."))


def list_folder(root: Path) -> Listing:
    """List every video file of a folder and its subfolders: no classes, no split."""
    listing = Listing()
    for folder, _, files in walk(root, listing.unreadable):
        paths = (folder / name for name in files)
        listing.entries += [Entry(path) for path in paths if path.suffix.lower() in SUFFIXES]
    listing.entries.sort()
    return listing


_FILMED = re.compile(r"metaworld_([a-z0-9-]+?)(?:_camera-.+)?_\d+")


def list_experts(root: Path) -> Listing:
    """List the films of Meta-World's experts: the task in the file's name is the class."""
    listing = list_folder(root)
    found = [(_FILMED.fullmatch(entry.path.stem), entry) for entry in listing.entries]
    listing.entries = [entry._replace(label=name[1]) for name, entry in found if name]
    listing.unlisted = [entry.path.name for name, entry in found if not name]
    return listing


def restrict(
    listing: Listing,
    classes: Sequence[str],
    limit: int | None,
    seed: int,
    leave_out: Sequence[str] = (),
) -> list[Entry]:
    """Choose among the entries.

    Args:
        listing: All entries.
        classes: Labels to keep, in upper or lower case; empty keeps all.
        limit: Keep at most this many, drawn by their names; both parts of a split keep their
            share.
        seed: Which ones a limit keeps.
        leave_out: Labels never to keep, in upper or lower case.

    Raises:
        ConfigError: There is no such class, or nothing is left.
    """
    for key, names in (("classes", classes), ("leave_out", leave_out)):
        _check_classes(listing, key, names)
    left, wanted = {name.lower() for name in leave_out}, {name.lower() for name in classes}
    kept = [
        entry
        for entry in listing.entries
        if (not wanted or entry.label.lower() in wanted) and entry.label.lower() not in left
    ]
    if listing.entries and not kept:
        raise ConfigError(
            f"data.leave_out={list(leave_out)} leaves none of the {len(listing.entries)} videos"
        )
    if limit is None or limit >= len(kept):
        return kept

    def draw(entry: Entry) -> str:
        return hashlib.blake2b(os.fsencode(f"{seed} {entry.path.name}")).hexdigest()

    parts = [[entry for entry in kept if bool(entry.validation) is side] for side in (False, True)]
    held = min(len(parts[1]), max(bool(parts[1]), round(limit * len(parts[1]) / len(kept))))
    chosen = set()
    for part, count in zip(parts, (limit - held, held), strict=True):
        chosen |= set(sorted(part, key=draw)[:count])
    return [entry for entry in kept if entry in chosen]


def _check_classes(listing: Listing, key: str, names: Sequence[str]) -> None:
    known = {entry.label.lower(): entry.label for entry in listing.entries if entry.label}
    for name in names:
        if name.lower() not in known:
            near = difflib.get_close_matches(name.lower(), known, 1, 0.0)
            hint = f"did you mean '{known[near[0]]}'?" if near else "it names no classes at all."
            raise ConfigError(
                f"data.{key} holds '{name}', which is none of the {len(known)} classes of this "
                f"data set; {hint}"
            )
