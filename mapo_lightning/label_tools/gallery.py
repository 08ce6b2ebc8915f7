"""Shows labels beside their frames: ``mapo-gallery`` writes one HTML page.

The page opens from disk, loads nothing from anywhere, and runs nothing but its own script. Labels
can be accepted, rejected and corrected in it; ``vlm.reviews=FILE`` makes training use what it
exports.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mapo_lightning.config.compose import load_yaml
from mapo_lightning.data.listing import SUFFIXES
from mapo_lightning.data.video_info import printable
from mapo_lightning.label_tools.page import Place, Sample, page
from mapo_lightning.ownership import own_text
from mapo_lightning.semantics.phrase import MAX_SOURCE, MAX_TEXT, clean_text
from mapo_lightning.semantics.reviews import read_reviews
from mapo_lightning.semantics.store import LabelStore, StoredLabel
from mapo_lightning.types import ConfigError, MapoError
from mapo_lightning.waiting import counting

_SOURCE = re.compile(r"(.+) frames (\d{1,9})\.\.(\d{1,9}) step (\d{1,9})")
_LISTED = re.compile(r"(.+) frames (\d{1,9}(?:, \d{1,9}){0,255})")  # unevenly spaced
_LONGEST = 256  # frames of a window; no longer window is shown
_MOST = 2000  # labels in one page: about 30 MB


def find_videos(roots: Iterable[Path]) -> list[Path]:
    """Return all video files of some folders and their subfolders."""
    found = [p for root in roots for p in root.rglob("*") if p.suffix.lower() in SUFFIXES]
    return sorted(path for path in found if path.is_file())


def draw(
    store: LabelStore,
    videos: Sequence[Path],
    count: int,
    seed: int = 0,
    status: str = "",
    describer: str = "",
) -> Sample:
    """Draw labels whose videos are available; the same ones for the same seed.

    Args:
        store: Where labels are kept.
        videos: Files to look for.
        count: Labels candidates, at most.
        seed: Of the draw.
        status: Only labels read this way; empty: all.
        describer: Only labels whose describer's name contains this.

    Raises:
        DescriberError: The store is damaged.
    """
    named: dict[str, list[Path]] = {}
    for path in videos:  # the store keeps cleaned names
        named.setdefault(clean_text(printable(path.name), MAX_SOURCE), []).append(path)
    counts: Counter[str] = Counter()
    elsewhere = 0
    candidates: list[tuple[bytes, tuple[str, StoredLabel, Place, list[Path]]]] = []
    for key, label in store.ordered(hidden=False):
        counts[label.status] += 1
        place = _place(label.source)
        if place is None or place.name not in named:
            elsewhere += 1
            continue
        if (status and label.status != status) or describer not in label.describer:
            continue
        rank = hashlib.blake2b(f"{seed} {key}".encode(), digest_size=8).digest()
        candidates.append((rank, (key, label, place, named[place.name])))
        if len(candidates) > 4 * count + 1000:
            candidates = heapq.nsmallest(count, candidates, key=lambda pair: pair[0])
    chosen = heapq.nsmallest(count, candidates, key=lambda pair: pair[0])
    labels = sorted((entry for _, entry in chosen), key=lambda entry: (entry[2], entry[0]))
    return Sample(labels, counts, elsewhere)


def _place(source: str) -> Place | None:
    if len(source) == MAX_TEXT:  # earlier versions cut it here, perhaps within a number
        return None
    if listed := _LISTED.fullmatch(source):
        frames = tuple(map(int, listed[2].split(", ")))
        return Place(listed[1], frames[0], frames[-1], 1, frames)
    found = _SOURCE.fullmatch(source)
    if found is None:
        return None
    place = Place(found[1], int(found[2]), int(found[3]), int(found[4]))
    sound = place.step > 0 and 0 <= place.last - place.first < _LONGEST * place.step
    return place if sound else None


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and print its path; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        store, roots = _where(args)
        if not 1 <= args.max_items <= _MOST:
            raise ConfigError(f"--max-items must lie in [1, {_MOST}], got {args.max_items}")
        reviews = read_reviews(args.reviews)
        videos = find_videos(roots)
        sample = draw(
            LabelStore(store, "gallery"),
            videos,
            args.max_items,
            args.seed,
            args.status,
            args.describer,
        )
        if not sample.labels:
            raise ConfigError(
                f"none of the {sample.counts.total()} labels in '{store}' that match is "
                f"about one of the {len(videos)} videos in {', '.join(map(repr, map(str, roots)))}:"
                " give --store and --videos"
            )
        out = Path(args.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        title = ", ".join(root.name for root in roots)
        with counting("gallery", "label", stays=False) as report:
            out.write_text(page(sample, title, reviews, report), "utf-8")
    except MapoError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    size = out.stat().st_size / 1e6
    sys.stdout.write(
        f"{len(sample.labels)} of {sample.counts.total()} labels: {out} ({size:.1f} MB)\n"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mapo-gallery",
        description="Write a page of labels beside their frames.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--run", help="folder of a run; default: the newest in runs/")
    parser.add_argument("--store", help="folder of the label store; default: that of the run")
    parser.add_argument(
        "--videos", action="append", help="folder of videos; may be repeated; default: the run's"
    )
    parser.add_argument("--out", default="runs/gallery.html", help="file to write")
    parser.add_argument("--max-items", type=int, default=200, help=f"labels shown, up to {_MOST}")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of labels")
    parser.add_argument(
        "--status", default="", choices=["", "slots", "prose", "null", "unreadable"],
        help="only labels read this way",
    )  # fmt: skip
    parser.add_argument("--describer", default="", help="only describers whose name has this text")
    parser.add_argument("--reviews", default="", help="file of reviews to start from")
    return parser


def _where(args: argparse.Namespace) -> tuple[Path, list[Path]]:
    """Folders of the label store and of the videos."""
    store, roots = args.store, args.videos
    if not store or not roots:
        run = Path(args.run) if args.run else _newest_run(Path("runs"))
        if own_text(run / "config.yaml") is None and (run / "config.yaml").is_file():
            raise ConfigError(
                f"'{run / 'config.yaml'}' was not saved by you on this machine, and a file that "
                "somebody else has made may not choose what is read: give --store and --videos"
            )
        cfg = load_yaml(run / "config.yaml")
        store = store or Path(_text(cfg, "work_dir", run)) / _text(cfg, "vlm.store", run)
        roots = roots or [_text(cfg, "data.root", run)]
    for folder in (store, *roots):
        if not Path(folder).is_dir():
            raise ConfigError(f"there is no folder '{folder}': give --store and --videos")
    return Path(store), [Path(root) for root in roots]


def _newest_run(runs: Path) -> Path:
    found = [path for path in runs.glob("*/config.yaml") if path.is_file()]
    if not found:
        raise ConfigError(f"there is no run in '{runs}': give --run, or --store and --videos")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def _text(cfg: dict[str, Any], key: str, run: Path) -> str:
    value: Any = cfg
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not value:
        raise ConfigError(f"'{run / 'config.yaml'}' names no {key}: give --store and --videos")
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
