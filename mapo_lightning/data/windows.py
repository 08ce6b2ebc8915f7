"""Which videos of a data set can be used, and which are kept aside."""

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Optional

from mapo_lightning.data.footage import locate, thin_out
from mapo_lightning.data.human36m import list_human36m
from mapo_lightning.data.listing import SUFFIXES, Entry, Listing, list_folder, restrict
from mapo_lightning.data.remembered import Remembered, write_whole
from mapo_lightning.data.source import VideoFileError, VideoInfo
from mapo_lightning.data.ssv2 import list_ssv2
from mapo_lightning.types import POSITIONS, ConfigError, VideoError

log = logging.getLogger(__name__)

LISTS: dict[str, Callable[[Path], Listing]] = {
    "demo": list_folder,
    "folder": list_folder,
    "ssv2": list_ssv2,
    "human36m": list_human36m,
}
"""What lists the videos of each kind of data set: the plug that a new one fills."""

_SHOWN = 100  # names of missing and of unlisted videos that the report holds
_SAVE_SECONDS = 60.0  # a scan that is interrupted loses at most so much


@dataclass
class VideoDataConfig:
    """Which videos are watched, and how clips are cut from them (O28, O29)."""

    kind: Literal["demo", "folder", "ssv2", "human36m"] = "demo"
    """demo: videos rendered from simulators on this machine. folder: your own, from `root`. ssv2,
    human36m: Something-Something V2 and Human3.6M, as they are handed out; see docs/data.md."""
    root: str = ""
    """Folder of the videos, searched with all its subfolders; empty only with kind=demo."""
    classes: list[str] = field(default_factory=list)
    """Classes to use, by the data set's own names; empty uses all. ssv2 and human36m only."""
    limit: Optional[int] = None  # noqa: UP045 (read by OmegaConf)
    """Use at most so many videos, drawn by name and `seed`; null uses all."""
    official_split: bool = True
    """Train on the data set's training list and hold its validation list out, where it has them;
    false: learn from both and hold `holdout` of all videos out."""
    clip_length: int = POSITIONS
    """Frames T of one clip."""
    frame_stride: int = 1
    """Frames of the video from one frame of a clip to the next."""
    rate: Optional[float] = None  # noqa: UP045
    """Thin the frames of a video out to about so many per second first, Hz; null: as filmed."""
    square: bool = False
    """Cut the square in the middle out first; false squashes the whole picture to a square."""
    image_size: int = 64
    """Height and width of a clip's frames, in pixels; the aspect ratio is not kept."""
    holdout: float = 0.1
    """Share of the videos never trained on, in [0, 0.5]; at least one if there are two. Not used
    with a split that comes with the data set."""
    max_undecodable: float = 0.1
    """Share of lost frames above which a video is rejected, in [0, 1]."""
    workers: int = 2
    """Processes that decode clips, and threads that scan the folder; 0 decodes in the main one."""
    seed: int = 0
    """Which videos are held out; independent of the seed of the run."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: A value is out of range.
        """
        if not 2 <= self.clip_length <= POSITIONS:
            raise ConfigError(
                f"clip_length must lie in [2, {POSITIONS}] frames, got {self.clip_length}"
            )
        if not 1 <= self.frame_stride <= 100:
            raise ConfigError(f"frame_stride must lie in [1, 100], got {self.frame_stride}")
        if not 8 <= self.image_size <= 1024:
            raise ConfigError(f"image_size must lie in [8, 1024] pixels, got {self.image_size}")
        if not 0.0 <= self.holdout <= 0.5:
            raise ConfigError(f"holdout must lie in [0, 0.5], got {self.holdout}")
        if not 0.0 <= self.max_undecodable <= 1.0:
            raise ConfigError(f"max_undecodable must lie in [0, 1], got {self.max_undecodable}")
        if not 0 <= self.workers <= 256:
            raise ConfigError(f"workers must lie in [0, 256], got {self.workers}")
        if self.rate is not None and not 0.0 < self.rate <= 1000.0:
            raise ConfigError(f"rate must lie in (0, 1000] frames per second, got {self.rate}")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit must be at least 1 video, got {self.limit}")

    @property
    def span(self) -> int:
        """Frames of the video that one clip reaches over."""
        return (self.clip_length - 1) * self.frame_stride + 1


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


def scan_videos(cfg: VideoDataConfig, cache: Path) -> VideoIndex:
    """Find the usable videos of a data set; every one is decoded once in full, ever.

    Args:
        cfg: Where to look and what to accept.
        cache: Folder for ``videos.json``, the remembered results by content,
            ``quarantine.jsonl``, the rejected videos of this scan, and ``report.json``, what it
            found; made if missing.

    Returns:
        The index; the same on every machine that sees the same files.

    Raises:
        ConfigError: No folder is given, or a class that the data set has not.
        VideoError: The folder is missing, is not laid out as `kind` says, or holds no usable
            video; names the reasons.
    """
    root = Path(cfg.root)
    if not cfg.root or not root.is_dir():
        raise (VideoError if cfg.root else ConfigError)(
            f"data.root must be a folder with videos, got '{cfg.root}'"
        )
    listing = LISTS[cfg.kind](root)
    entries = restrict(listing, cfg.classes, cfg.limit, cfg.seed)
    known = Remembered(cache / "videos.json", cfg.max_undecodable)
    results = _examine_all(entries, root, cfg, known)
    rejected = [found for found in results if isinstance(found, VideoFileError)]
    rows = [{"path": str(e.path), "reason": e.reason, "detail": e.detail} for e in rejected]
    write_whole(cache / "quarantine.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
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


def _examine_all(
    entries: Sequence[Entry], root: Path, cfg: VideoDataConfig, known: Remembered
) -> list[VideoInfo | VideoFileError]:
    saved, results = time.monotonic(), []
    with ThreadPoolExecutor(max_workers=max(1, cfg.workers)) as pool:
        for result in pool.map(lambda e: _examine(e, root.resolve(), cfg, known), entries):
            results.append(result)
            if time.monotonic() - saved > _SAVE_SECONDS:
                known.save()
                saved = time.monotonic()
                log.info("looked at %d of %d videos", len(results), len(entries))
    known.save()
    return results


def _examine(
    entry: Entry, root: Path, cfg: VideoDataConfig, known: Remembered
) -> VideoInfo | VideoFileError:
    try:
        if not entry.path.resolve().is_relative_to(root):
            raise VideoFileError(entry.path, "outside", "it is a link out of the video folder")
        footage = locate(entry.path, entry.numbers)
        info = known.examine(footage)
        if footage.numbers:
            info = info._replace(fps=entry.number_rate / footage.numbers.step)
        info = thin_out(info._replace(label=entry.label), cfg.rate, cfg.square)
        if info.frames < cfg.span:
            detail = f"it has {info.frames} frames, a clip needs {cfg.span}"
            raise VideoFileError(entry.path, "too_short", detail)
    except VideoFileError as error:
        return error
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
                "all the same say data.official_split=false"
            )
        held_out = [video for entry, video in found if entry.validation]
        if not held_out:
            log.warning("no video of the validation list is there: nothing is held out")
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
    """Write down what was found, and log it where it may surprise."""
    present, classes = len(listing.entries), Counter(video.label for video in index.videos)
    found = {
        "kind": cfg.kind,
        "root": cfg.root,
        "listed": present + len(listing.missing),
        "present": present,
        "missing": len(listing.missing),
        "unlisted": len(listing.unlisted),
        "left_out": present - chosen,
        "quarantined": Counter(why.partition(":")[0] for _, why in index.quarantined),
        "usable": len(index.videos),
        "frames": sum(video.frames for video in index.videos),
        "train": len(index.train),
        "holdout": len(index.holdout),
        "classes": dict(sorted(classes.items())),
        "first_missing": listing.missing[:_SHOWN],
        "first_unlisted": listing.unlisted[:_SHOWN],
    }
    write_whole(path, json.dumps(found, indent=1) + "\n")
    if cfg.kind in ("demo", "folder"):
        return
    log.info(
        "data=%s: %d videos listed, %d of them missing, %d there but in no list; %d left out by "
        "data.classes and data.limit; %d classes (%s)",
        cfg.kind,
        found["listed"],
        found["missing"],
        found["unlisted"],
        found["left_out"],
        len(classes),
        path,
    )


def _nothing_left(root: Path, rejected: Sequence[VideoFileError]) -> str:
    if not rejected:
        kinds = ", ".join(sorted(SUFFIXES))
        return f"no video found in '{root}' or its subfolders; looked for {kinds}"
    reasons = ", ".join(f"{n} {why}" for why, n in Counter(e.reason for e in rejected).items())
    return (
        f"none of the {len(rejected)} videos in '{root}' can be used: {reasons}. "
        f"The first: {rejected[0]}"
    )
