"""Finds the usable videos of a data set, and lists the others with the reason."""

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from mapo_lightning.data.captions import add_captions, check_times
from mapo_lightning.data.examiner import Examiner
from mapo_lightning.data.human36m import list_human36m
from mapo_lightning.data.listing import (
    SUFFIXES,
    Entry,
    Listing,
    list_experts,
    list_folder,
    restrict,
)
from mapo_lightning.data.reader import locate, thin_out
from mapo_lightning.data.scan_cache import ScanCache
from mapo_lightning.data.settings import VideoDataConfig
from mapo_lightning.data.ssv2 import list_ssv2
from mapo_lightning.data.video_info import VideoFileError, VideoInfo, inaccessible, printable
from mapo_lightning.files import atomic_write
from mapo_lightning.types import ConfigError, VideoError

log = logging.getLogger(__name__)

LISTS: dict[str, Callable[[Path], Listing]] = {
    "demo": list_folder,
    "folder": list_folder,
    "ssv2": list_ssv2,
    "human36m": list_human36m,
    "metaworld_experts": list_experts,
}
"""Function that lists the videos of each kind of data set; a new kind adds its own."""

_SHOWN = 100  # names of missing and of unlisted videos that the report holds
_SAVE_SECONDS = 60.0  # an interrupted scan loses at most this much work


class VideoIndex(NamedTuple):
    """What a scan found."""

    videos: list[VideoInfo]
    """All that can be used, by path."""
    quarantined: list[tuple[Path, str]]
    """(path, "category: reason") of all others, by path."""
    train: list[VideoInfo]
    """Those to train on."""
    holdout: list[VideoInfo]
    """Those never trained on; empty if there is only one video, or ``holdout`` is 0."""


def scan_videos(cfg: VideoDataConfig, cache: Path, captions: str | None = None) -> VideoIndex:
    """Find the usable videos of a data set; each is decoded in full once, by its first scan.

    Args:
        cfg: Where to look and what to accept.
        cache: Folder for ``videos.json`` (the cache of results by content), ``quarantine.jsonl``
            (videos that this scan rejected) and ``report.json`` (its summary); made if missing.
        captions: See `list_videos`.

    Returns:
        The index; the same on every machine that sees the same files.

    Raises:
        ConfigError: No folder is given, or a class that the data set does not have; or the
            sentences about the videos are missing or wrong.
        VideoError: The folder is missing, is not laid out as `kind` says, or holds no usable
            video; names the reasons.
    """
    root = Path(cfg.root)
    listing, entries = list_videos(cfg, captions)
    examiner = Examiner(cfg.max_undecodable, cfg.limits)
    asked = [cfg.max_undecodable, *asdict(cfg.limits).values()]
    known = ScanCache(cache / "videos.json", asked, examiner.examine)
    results = _examine_all(entries, root, cfg, known, examiner)
    rejected = [found for found in results if isinstance(found, VideoFileError)]
    rows = [{"path": printable(e.path), "reason": e.reason, "detail": e.detail} for e in rejected]
    with atomic_write(cache / "quarantine.jsonl") as draft:
        draft.write_text("".join(json.dumps(row) + "\n" for row in rows))
    usable = [
        (entry, found)
        for entry, found in zip(entries, results, strict=True)
        if isinstance(found, VideoInfo)
    ]
    if not usable:
        raise VideoError(_nothing_left(root, rejected))
    if rejected:
        log.warning("%d of %d videos are quarantined: %s", len(rejected), len(entries), cache)
    quarantined = [(error.path, f"{error.reason}: {error.detail}") for error in rejected]
    index = VideoIndex([video for _, video in usable], quarantined, *_split(usable, cfg))
    _report(listing, len(entries), index, cfg, cache / "report.json")
    return index


def list_videos(cfg: VideoDataConfig, captions: str | None = None) -> tuple[Listing, list[Entry]]:
    """List a data set and choose from it, without opening a video or writing anything.

    Args:
        cfg: Where to look.
        captions: File of sentences about the videos; '': the data set's own; None: no sentences.

    Returns:
        All that it offers, and the videos that ``cfg`` keeps of it.

    Raises:
        ConfigError: No folder is given, or a class that the data set has not; or the sentences
            about the videos are missing or wrong.
        VideoError: The folder is missing, is not laid out as `kind` says, or offers no video.
    """
    root = Path(cfg.root)
    if not cfg.root or not root.is_dir():
        raise (VideoError if cfg.root else ConfigError)(
            f"data.root must be a folder with videos, got '{cfg.root}'"
        )
    listing = LISTS[cfg.kind](root)
    if captions is not None and listing.entries:
        listing.entries = add_captions(listing.entries, root, captions)
    entries = restrict(listing, cfg.classes, cfg.limit, cfg.seed, cfg.leave_out or ())
    if not entries:
        kinds = ", ".join(sorted(SUFFIXES))
        raise VideoError(f"no video found in '{root}' or its subfolders; looked for {kinds}")
    return listing, entries


def _examine_all(
    entries: Sequence[Entry],
    root: Path,
    cfg: VideoDataConfig,
    known: ScanCache,
    examiner: Examiner,
) -> list[VideoInfo | VideoFileError]:
    saved, results = time.monotonic(), []
    # An interrupted scan ends its children first: the threads of the pool wait for them.
    with ThreadPoolExecutor(max_workers=max(1, cfg.workers)) as pool, closing(examiner):
        for result in pool.map(lambda e: _examine(e, root.resolve(), cfg, known), entries):
            results.append(result)
            if time.monotonic() - saved > _SAVE_SECONDS:
                known.save()
                saved = time.monotonic()
                log.info("looked at %d of %d videos", len(results), len(entries))
    known.save()
    return results


def _examine(
    entry: Entry, root: Path, cfg: VideoDataConfig, known: ScanCache
) -> VideoInfo | VideoFileError:
    try:
        if not entry.path.resolve().is_relative_to(root):
            raise VideoFileError(entry.path, "outside", "it is a link out of the video folder")
        source = locate(entry.path, entry.numbers)
        info = known.examine(source)
        if source.numbers:
            info = info._replace(fps=entry.number_rate / source.numbers.step)
        info = info._replace(label=entry.label, captions=entry.captions)
        check_times(info)
        info = thin_out(info, cfg.rate, cfg.square)
        if info.frames < cfg.span:
            detail = f"it has {info.frames} frames, a clip needs {cfg.span}"
            raise VideoFileError(entry.path, "too_short", detail)
    except VideoFileError as error:
        return error
    except (OSError, MemoryError, RuntimeError) as error:  # RuntimeError: a circle of links
        return inaccessible(entry.path, error)
    return info


def _split(
    found: Sequence[tuple[Entry, VideoInfo]], cfg: VideoDataConfig
) -> tuple[list[VideoInfo], list[VideoInfo]]:
    """(train, holdout): by the data set's own lists, or by content."""
    if cfg.official_split and found[0][0].validation is not None:
        train = [video for entry, video in found if not entry.validation]
        if not train:
            raise VideoError(
                f"all {len(found)} usable videos belong to the validation list; to learn from them "
                "anyway, set data.official_split=false"
            )
        held_out = [video for entry, video in found if entry.validation]
        if not held_out:
            log.warning("no video of the validation list was found: nothing is held out")
        return train, held_out

    # Hold the lowest hashes out: copies stay together, new videos move few others.
    def rank(video: VideoInfo) -> str:
        return hashlib.blake2b(f"{cfg.seed} {video.fingerprint}".encode()).hexdigest()

    videos = [video for _, video in found]
    names = sorted({rank(video) for video in videos})
    count = min(max(1, round(cfg.holdout * len(names))), len(names) - 1) if cfg.holdout else 0
    held = set(names[:count])
    train = [video for video in videos if rank(video) not in held]
    return train, [video for video in videos if rank(video) in held]


def _report(
    listing: Listing, chosen: int, index: VideoIndex, cfg: VideoDataConfig, path: Path
) -> None:
    """Write the summary, and log it for data sets that come with lists."""
    present, classes = len(listing.entries), Counter(video.label for video in index.videos)
    found = {
        "kind": cfg.kind,
        "root": cfg.root,
        "listed": present + len(listing.missing),
        "present": present,
        "missing": len(listing.missing),
        "unlisted": len(listing.unlisted),
        "unreadable_folders": listing.unreadable,
        "left_out": present - chosen,
        "quarantined": Counter(why.partition(":")[0] for _, why in index.quarantined),
        "usable": len(index.videos),
        "frames": sum(video.frames for video in index.videos),
        "train": len(index.train),
        "holdout": len(index.holdout),
        "reading": _reading(index.videos),
        "classes": dict(sorted(classes.items())),
        "first_missing": listing.missing[:_SHOWN],
        "first_unlisted": [printable(name) for name in listing.unlisted[:_SHOWN]],
    }
    with atomic_write(path) as draft:
        draft.write_text(json.dumps(found, indent=1) + "\n")
    if listing.unreadable:
        shown = ", ".join(listing.unreadable[:3])
        count = len(listing.unreadable)
        log.warning("%d folders cannot be listed, their videos are missing: %s", count, shown)
    if cfg.kind in ("demo", "folder"):
        return
    log.info(
        "data=%s: %d videos listed, %d of them missing, %d found but in no list; %d left out by "
        "data.classes, data.leave_out and data.limit; %d classes (%s)",
        cfg.kind,
        found["listed"],
        found["missing"],
        found["unlisted"],
        found["left_out"],
        len(classes),
        path,
    )


def _reading(videos: Sequence[VideoInfo]) -> dict[str, Any]:
    """Which decoder reads how many videos, why not decord, and what that costs."""
    known = [video.access for video in videos if video.access]
    slow = [access for access in known if access.decoder == "pyav"]
    found: dict[str, Any] = {"decord": len(known) - len(slow), "pyav": len(slow)}
    if not slow:
        return found
    ours = 1000 * median(access.seconds for access in slow)
    others = [access.seconds_decord for access in slow if access.seconds_decord]
    found["pyav_ms_per_clip"] = round(ours, 1)
    found["decord_ms_per_clip"] = round(1000 * median(others), 1) if others else None
    found["why"] = {
        printable(video.path): video.access.why
        for video in videos
        if video.access and video.access.decoder == "pyav"
    }
    log.info(
        "%d of %d videos are read by PyAV, because decord's random access is not proved for them "
        "(first: %s); a clip from their middle takes %.0f ms there%s",
        len(slow),
        len(known),
        slow[0].why,
        ours,
        f", {found['decord_ms_per_clip']:.0f} ms with decord" if others else "",
    )
    return found


def _nothing_left(root: Path, rejected: Sequence[VideoFileError]) -> str:
    reasons = ", ".join(f"{n} {why}" for why, n in Counter(e.reason for e in rejected).items())
    return (
        f"none of the {len(rejected)} videos in '{root}' can be used: {reasons}. "
        f"The first: {rejected[0]}"
    )
