"""Puts files, pictures, videos and pages beside a run; a failure is logged, never raised.

Every function takes the logger of a Trainer and does nothing where it is not a
:class:`~mapo_lightning.tracking.logger.RunLogger`, which only the main process has.
"""

from __future__ import annotations

import csv
import html
import io
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mapo_lightning.config.redact import redact, redact_text
from mapo_lightning.data.video import FILM_HEIGHT, write_mp4
from mapo_lightning.tracking.logger import RunLogger
from mapo_lightning.types import Frames

_POLICY = (
    "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; "
    "form-action 'none'; base-uri 'none'"
)

_STYLE = (
    "body{font:14px sans-serif;margin:2em}img,video{max-width:100%}table{border-collapse:collapse}"
    "th,td{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd}"
)


def log_file(logger: object, path: Path, folder: str = "") -> bool:
    """Copy a file into the artifact folder ``folder``; returns whether it arrived."""
    if not isinstance(logger, RunLogger):
        return False
    return logger.attempt(
        f"the file {path.name}",
        lambda: logger.experiment.log_artifact(logger.active_run, str(path), folder or None),
    )


def log_text(logger: object, text: str, name: str) -> bool:
    """Record a text under the artifact path ``name``; access tokens in it are hidden."""
    return _made(logger, name, lambda path: path.write_text(redact_text(text), encoding="utf-8"))


def log_dict(logger: object, tree: Mapping[str, Any] | Sequence[Any], name: str) -> bool:
    """Record plain dicts and lists as JSON, without their secrets."""
    plain = redact(list(tree) if not isinstance(tree, Mapping) else dict(tree))
    return log_text(logger, json.dumps(plain, indent=1, ensure_ascii=False, default=str), name)


def log_image(logger: object, image_HWC: NDArray[np.uint8], name: str) -> bool:
    """Record a picture, (H, W, 3) uint8, as PNG under the artifact path ``name``."""
    return _made(logger, name, lambda path: Image.fromarray(image_HWC).save(path, format="PNG"))


def log_video(
    logger: object,
    frames_THWC: Frames,
    name: str,
    step: int,
    fps: float,
    height: int = FILM_HEIGHT,
) -> bool:
    """Record a video, (T, H, W, 3) uint8, as ``videos/<name>/step_00001200.mp4``.

    Frames of fewer rows than ``height`` are enlarged to it.
    """
    target = f"videos/{name}/{step_name(step)}.mp4"
    return _made(logger, target, lambda path: write_mp4(path, frames_THWC, fps, height))


def log_html(logger: object, body: str, name: str, title: str = "") -> bool:
    """Record a page that may load nothing from anywhere.

    Args:
        logger: The run's logger.
        body: HTML; the caller escapes what it does not control.
        name: Artifact path ending in ``.html``.
        title: Title of the page, any text.

    Returns:
        Whether it arrived.
    """
    return log_page(logger, html_page(body, title), name)


def html_page(body: str, title: str = "") -> str:
    """A whole page around a body of HTML; it may load nothing from anywhere."""
    return (
        "<!doctype html><html><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )


def log_page(logger: object, page: str, name: str) -> bool:
    """Record a whole HTML page under ``name``; it brings its own policy and is not changed."""
    return _made(logger, name, lambda path: path.write_text(page, encoding="utf-8"))


def log_table(logger: object, rows: Sequence[Mapping[str, object]], name: str) -> bool:
    """Record rows as ``<name>.csv`` and ``<name>.json``.

    Cells that a spreadsheet would run as a formula get a leading apostrophe in the CSV.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows([csv_cell(row.get(column, "")) for column in columns] for row in rows)
    arrived = log_text(logger, text.getvalue(), f"{name}.csv")
    return log_dict(logger, [dict(row) for row in rows], f"{name}.json") and arrived


def step_name(step: int) -> str:
    """Return ``step_00001200``: sorts by name as by number."""
    return f"step_{step:08d}"


def plain_text(text: str) -> str:
    """Drop control characters, so that a text from outside cannot steer a terminal or a file."""
    return "".join(c if c.isprintable() else " " for c in text)


def csv_cell(value: object) -> object:
    """A cell of a CSV file, which no spreadsheet takes for a formula and no terminal obeys."""
    if not isinstance(value, str):
        return value
    text = plain_text(value)
    return f"'{text}" if text.lstrip()[:1] in ("=", "+", "-", "@") else text


def _made(logger: object, name: str, make: Callable[[Path], object]) -> bool:
    """Make a file in a folder that goes away, and log it under ``name``."""
    if not isinstance(logger, RunLogger):
        return False
    folder, _, leaf = name.rpartition("/")
    with tempfile.TemporaryDirectory(prefix="mapo-") as place:
        path = Path(place) / leaf
        # Making it can fail too, where the disk is full.
        return logger.attempt(name, lambda: make(path)) and log_file(logger, path, folder)
