"""A self-contained HTML page of labels beside their frames, for `gallery` and MLflow.

All texts in it come from outside and are escaped by the template. The page's content policy allows
only embedded pictures, and its own style and script by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from mapo_lightning.data.ground_truth import GroundTruth
from mapo_lightning.data.prefetch import prefetch
from mapo_lightning.data.video import VideoFileError, fingerprint, read_frames
from mapo_lightning.semantics.agreement import CLEAR_PERCENT, clear_shift, said_direction, same_way
from mapo_lightning.semantics.labeler import label_key
from mapo_lightning.semantics.phrase import MAX_SLOT, MAX_TEXT, SLOTS, Phrase, clean_text
from mapo_lightning.semantics.point_tracking import dominant_motion
from mapo_lightning.semantics.reviews import Reviews
from mapo_lightning.semantics.store import StoredLabel
from mapo_lightning.semantics.vocabulary import COMPASS, compass_word
from mapo_lightning.types import Frames

_PAGES = Path(__file__).parent / "pages"
_TITLES = ("body", "action", "target object", "direction", "displacement")
_GAP = 3  # pixels right of every frame
_OTHER_DIRECTIONS = ("towards or away", "turning", "none named")
_HEIGHT = 112  # pixels of a frame in the page
_WIDEST = 220
_FRAMES = 8  # frames of a window that are shown
_MEASURED_AT = 128  # short side at which motion is measured, pixels
_AT_ONCE = 4  # labels drawn side by side


class Place(NamedTuple):
    """Frames of a video that a label is about, by the name in the store."""

    name: str
    first: int
    last: int
    step: int
    listed: tuple[int, ...] = ()
    """All frames, where they are not evenly spaced."""

    @property
    def frames(self) -> Sequence[int]:
        """Numbers of the frames, in order."""
        return self.listed or range(self.first, self.last + 1, self.step)

    @property
    def spacing(self) -> str:
        """How far apart the frames are, for people; empty if they follow each other."""
        if self.listed:
            return "unevenly spaced"
        return f"every {self.step}" if self.step > 1 else ""


class Sample(NamedTuple):
    """Labels drawn from a store, and counts of the whole store."""

    labels: list[tuple[str, StoredLabel, Place, list[Path]]]
    """Key, label, place, and the videos of that name."""
    counts: Counter[str]
    """Labels by how they were read."""
    elsewhere: int
    """Labels of environments, or of videos in other folders."""


def page(
    sample: Sample,
    title: str,
    reviews: Reviews | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Write the page.

    Args:
        sample: What to show.
        title: Where the labels come from; any text.
        reviews: Reviews to start from.
        progress: Told how many labels are drawn, of how many.

    Returns:
        HTML; 5 to 20 kB a label.
    """
    reviews = reviews or Reviews()
    ground_truth = GroundTruth({path.parent for *_, paths in sample.labels for path in paths})
    items = []
    # Decoding, tracking and compressing, nearly all the work, leave the interpreter to others.
    jobs = ((entry[0], partial(_item, *entry, ground_truth)) for entry in sample.labels)
    for _, drawn in prefetch(jobs, _AT_ONCE):
        items.append(drawn())
        if progress is not None:
            progress(len(items), len(sample.labels))
    for item in items:
        review = reviews.row(item["key"])
        item["mark"], item["by"], item["at"] = (review.get(x, "") for x in ("mark", "by", "at"))
        item["corrected"] = json.dumps(review["slots"]) if "slots" in review else ""
    others = sorted(reviews.keys - {item["key"] for item in items})
    style, script = ((_PAGES / name).read_text() for name in ("gallery.css", "gallery.js"))
    # Everything is escaped but the page's own style and script; a missing value is an error.
    templates = Environment(
        loader=FileSystemLoader(_PAGES), autoescape=True, undefined=StrictUndefined
    )
    return templates.get_template("gallery.html.j2").render(
        policy=_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        title=clean_text(title, MAX_TEXT),
        total=sample.counts.total(),
        counts=dict(sorted(sample.counts.items())),
        elsewhere=sample.elsewhere,
        items=items,
        ways=(*COMPASS, *_OTHER_DIRECTIONS),
        longest=MAX_SLOT,
        others=json.dumps([reviews.row(key) for key in others]),
    )


def _policy(style: str, script: str) -> str:
    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest(style)}'; "
        f"script-src 'sha256-{digest(script)}'; base-uri 'none'; form-action 'none'"
    )


def _item(
    key: str, label: StoredLabel, place: Place, paths: list[Path], ground_truth: GroundTruth
) -> dict[str, Any]:
    """Everything that the template shows of one label."""
    # Cleaned again: the store may come from anywhere.
    slots = [clean_text(slot, MAX_SLOT) for slot in label.phrase or ("",) * len(SLOTS)]
    item: dict[str, Any] = {
        "key": clean_text(key, MAX_SLOT),
        "status": label.status,
        "text": clean_text(label.text, MAX_TEXT),
        "phrase": label.phrase,
        "slots": list(zip(_TITLES, slots, strict=True)),
        "was": json.dumps(slots),
        "describer": clean_text(label.describer, MAX_TEXT),
        "video": clean_text(place.name, MAX_TEXT),
        "first": place.first,
        "last": place.last,
        "spacing": place.spacing,
        "way": _way(label.phrase),
        "strip": "",
        "trouble": "",
        "facts": [],
        "verdict": "unclear",
    }
    try:
        path = _file_of(key, label, place, paths)
        frames = read_frames(path, place.frames, _MEASURED_AT)
    except VideoFileError as error:
        return item | {"trouble": clean_text(str(error), MAX_TEXT)}
    strip, shown = _strip(frames)
    moved = ground_truth.moved(path, place.first, place.last)
    real = None if moved is None or not len(moved.parts) else clear_shift(moved.shifts)
    facts = [
        _fact("tracked points", dominant_motion(frames), label.phrase),
        *([_fact("simulator", real, label.phrase)] if moved is not None else []),
    ]
    judged = [fact["verdict"] for fact in reversed(facts) if fact["verdict"] != "unclear"]
    return item | {
        "strip": _data_uri(strip),
        "shown": shown,
        "width": strip.width,
        "height": strip.height,
        "facts": facts,
        "verdict": judged[0] if judged else "unclear",
    }


def _file_of(key: str, label: StoredLabel, place: Place, paths: list[Path]) -> Path:
    """Find the file that the label is about, among those of one name."""
    if len(paths) == 1:
        return paths[0]
    where = f"frames {place.first}..{place.last} step {place.step}"
    for path in paths:
        name = fingerprint(path)
        identities = (f"{name} {where} size {size}" for size in range(16, 2049))
        if any(label_key(label.describer, identity) == key for identity in identities):
            return path
    detail = (
        f"{len(paths)} files have this name, and which one it is about cannot be told: the file "
        "was changed, data.rate or data.square changed what is seen of it, or its labels are "
        "sentences that come with the videos (vlm=templates)"
    )
    raise VideoFileError(Path(place.name), "missing", detail)


def _fact(who: str, shift: np.ndarray[Any, Any] | None, phrase: Phrase | None) -> dict[str, str]:
    """One reference motion of a window, compared with the phrase."""
    if shift is None:
        return {"text": f"{who}: no single clear motion", "verdict": "unclear"}
    text = f"{who}: {compass_word(shift)} {np.linalg.norm(shift):.1f} %"
    if np.linalg.norm(shift) < CLEAR_PERCENT:
        return {"text": f"{text}, not clear", "verdict": "unclear"}
    said = said_direction(phrase)
    if phrase is None:
        return {"text": text, "verdict": "missed"}
    if said is None:
        return {"text": text, "verdict": "unclear"}
    return {"text": text, "verdict": "agrees" if same_way(said, shift) else "disagrees"}


def _way(phrase: Phrase | None) -> str:
    """Name of the filter for a phrase's direction."""
    said = said_direction(phrase)
    if said is not None:
        return compass_word(said)
    low = phrase.direction.lower() if phrase is not None else ""
    if "clockwise" in low:
        return "turning"
    return (
        "towards or away"
        if re.search(r"toward|away|forward|backward|closer", low)
        else ("none named")
    )


def _strip(frames: Frames) -> tuple[Image.Image, int]:
    """Frames side by side, and how many."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), _FRAMES)).round())
    height, width = frames.shape[1:3]
    scale = min(_HEIGHT / height, _WIDEST / width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    cell = size[0] + _GAP
    strip = Image.new("RGB", (cell * len(chosen), size[1]), (128, 128, 128))
    for place, index in enumerate(chosen.astype(int)):
        small = Image.fromarray(frames[index]).resize(size, Image.Resampling.LANCZOS)
        strip.paste(small, (place * cell, 0))
    return strip, len(chosen)


def _data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, format="WEBP", quality=72, method=4)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
