"""Something-Something V2 as it is distributed: a folder of webm files, and lists with classes.

Layout below the given folder; folders may have any names and depth::

    20bn-something-something-v2/78687.webm ...     or folders of frames: 78687/000001.jpg ...
    labels/labels.json                             {"Holding something": "41", ...}
    labels/train.json, validation.json             [{"id": "78687", "placeholders":
                                    ["a cup"], "template": "Holding [something]"}, ...]
    labels/test.json                               [{"id": ...}, ...], may be missing

The lists may also be called ``something-something-v2-train.json`` and so on.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mapo_lightning.data.listing import SUFFIXES, Entry, Listing, walk
from mapo_lightning.data.video_info import Caption
from mapo_lightning.types import VideoError

_PLACE, _PLAIN = re.compile(r"\[[^\[\]]*\]"), re.compile(r"[\[\]]")


def list_ssv2(root: Path) -> Listing:
    """List the videos of the training and the validation list.

    Returns:
        Entries with the class template, without brackets, as label, the template with its objects
        as caption, and the official split.

    Raises:
        VideoError: The folder is not SSv2, a list is damaged, or no listed video was found.
    """
    listing, listed = Listing(), set()
    files, videos = _find(root, listing.unreadable)
    classes = _read(files["labels"], dict)
    for split in ("train", "validation"):
        for row in _read(files[split], list):
            name, label, caption = _row(row, classes, files[split])
            listed.add(name)
            if name in videos:
                entry = Entry(videos[name], label, split == "validation", captions=(caption,))
                listing.entries.append(entry)
            else:
                listing.missing.append(name)
    if not listing.entries:
        raise VideoError(
            f"none of the {len(listed)} videos that the lists in '{files['train'].parent}' name is "
            f"below '{root}': expected files like {next(iter(listed), 'ID')}.webm there"
        )
    if "test" in files:  # not trained on, but not unlisted either
        rows = _read(files["test"], list)
        listed |= {str(row.get("id")) for row in rows if isinstance(row, dict)}
    listing.unlisted = sorted(videos.keys() - listed)
    return listing


def _find(root: Path, unreadable: list[str]) -> tuple[dict[str, Path], dict[str, Path]]:
    """(split or "labels" -> JSON file, id -> video file or folder of frames)."""
    files: dict[str, Path] = {}
    videos: dict[str, Path] = {}
    for folder, names, found in walk(root, unreadable):
        for name in found:
            stem, _, suffix = name.rpartition(".")
            if suffix == "json":
                files.setdefault(stem.rpartition("-")[2], folder / name)
            elif f".{suffix.lower()}" in SUFFIXES:
                videos[stem] = folder / name  # a video file is preferred to its frames
        for name in [name for name in names if name.isdigit()]:
            names.remove(name)  # not walked: it may hold millions of frames
            videos.setdefault(name, folder / name)
    for split in ("train", "validation", "labels"):
        if split not in files:
            raise VideoError(
                f"'{root}' is not Something-Something V2: there is no {split}.json in it or in its "
                "folders; it needs the webm files, labels.json, train.json and validation.json"
            )
    return files, videos


def _read(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise VideoError(
            f"'{path}' cannot be read as JSON ({error}); unpack the labels of the data set again"
        ) from error
    if not isinstance(content, kind):
        raise VideoError(
            f"'{path}' must hold a JSON {'object' if kind is dict else 'list'}, it holds "
            f"{type(content).__name__}; is it from Something-Something V2?"
        )
    return content


def _row(row: Any, classes: dict[str, Any], path: Path) -> tuple[str, str, Caption]:
    """(id, class, sentence) of one row of a list."""
    if not isinstance(row, dict) or not isinstance(row.get("template"), str) or "id" not in row:
        raise VideoError(
            f"'{path}' must list objects with id and template, it holds {json.dumps(row)[:80]}"
        )
    label = row["template"].replace("[", "").replace("]", "")
    if label not in classes:
        raise VideoError(
            f"'{path}' gives video {row['id']} the class '{label}', which labels.json does not "
            "have; take all lists from one release of the data set"
        )
    return str(row["id"]), label, Caption(_sentence(row["template"], row.get("placeholders")))


def _sentence(template: str, objects: Any) -> str:
    """The template with its objects, still in brackets; as it is, where they do not fit it."""
    if not isinstance(objects, list) or len(objects) != len(_PLACE.findall(template)):
        return template
    names = iter(objects)
    return _PLACE.sub(lambda place: f"[{_PLAIN.sub(' ', str(next(names)))}]", template)
