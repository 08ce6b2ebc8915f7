"""Measures how good a describer's labels are: ``mapo-quality``.

Takes the words of ``mapo-train``, for example ``data=demo vlm=flow callbacks.quality=600``. Prints
one table, and writes it as Markdown and JSON into ``run_dir`` (``runs/quality`` if none is given).
Answers come from the label store where they are known, and are kept there where they are new.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mapo_lightning.config.compose import compose
from mapo_lightning.run.config import RunConfig, conf_folder
from mapo_lightning.run.renamed import RENAMED
from mapo_lightning.types import MapoError
from mapo_lightning.waiting import counting


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and write it; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        composed = compose(words, RunConfig, conf_folder(), renamed=RENAMED)
        if composed.text is not None:
            sys.stdout.write((__doc__ or "") + "\n" + composed.text + "\n")
            return 0
        _measure(composed.config)
    except MapoError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _measure(cfg: RunConfig) -> None:
    # These import torch, which takes seconds: the words were checked without.
    from mapo_lightning.label_tools.quality_report import markdown, measure_clips
    from mapo_lightning.run.build import build_videos
    from mapo_lightning.run.stages import render_demo

    render_demo(cfg)
    with counting("quality", "window", show=cfg.callbacks.progress, stays=False) as report:
        clips = build_videos(cfg).clips("all")
        found = measure_clips(clips, cfg.callbacks.quality, timed=True, progress=report)
    folder = Path(cfg.run_dir or "runs/quality")
    folder.mkdir(parents=True, exist_ok=True)
    table = markdown([found])
    (folder / f"{cfg.vlm.kind}.md").write_text(table, encoding="utf-8")
    plain = _plain(vars(found)) | {"data": Path(cfg.data.root).name, "row": found.row()}
    text = json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / f"{cfg.vlm.kind}.json").write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(table)


def _plain(value: Any) -> Any:
    """Make JSON of it: named tuples become objects, NaN becomes null."""
    from mapo_lightning.label_tools.quality_report import Cost
    from mapo_lightning.semantics.agreement import Agreement
    from mapo_lightning.semantics.describer import Usage

    if isinstance(value, Agreement):
        value = value._asdict() | {"share": value.share}
    if isinstance(value, Cost | Usage):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): _plain(x) for key, x in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
