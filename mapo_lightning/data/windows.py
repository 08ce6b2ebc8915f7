"""Which videos of a folder can be used, and which are kept aside."""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

from mapo_lightning.data.video import (
    Reason,
    VideoFileError,
    VideoInfo,
    check_video,
    fingerprint,
    probe_video,
)
from mapo_lightning.types import POSITIONS, ConfigError, VideoError

log = logging.getLogger(__name__)

SUFFIXES = frozenset({".mp4", ".mkv", ".webm", ".avi", ".m4v", ".mov"})
"""File names that count as videos, lower case."""

_CACHE_VERSION = 1


@dataclass
class VideoDataConfig:
    """Which videos are watched, and how clips are cut from them (O28, O29)."""

    kind: Literal["demo", "folder"] = "demo"
    """demo: videos rendered from simulators on this machine. folder: your own, from `root`."""
    root: str = ""
    """Folder of the videos, searched with all its subfolders; empty only with kind=demo."""
    clip_length: int = POSITIONS
    """Frames T of one clip."""
    frame_stride: int = 1
    """Frames of the video from one frame of a clip to the next."""
    image_size: int = 64
    """Height and width of a clip's frames, in pixels; the aspect ratio is not kept."""
    holdout: float = 0.1
    """Share of the videos never trained on, in [0, 0.5]; at least one if there are two."""
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
    """Find the usable videos of a folder; every file is decoded once in full, ever.

    Args:
        cfg: Where to look and what to accept.
        cache: Folder for ``videos.json``, the remembered results by content, and
            ``quarantine.jsonl``, the rejected files of this scan; made if missing.

    Returns:
        The index; the same on every machine that sees the same files.

    Raises:
        ConfigError: No folder is given.
        VideoError: The folder is missing, or holds no usable video; names the reasons.
    """
    root = Path(cfg.root)
    if not cfg.root or not root.is_dir():
        raise (VideoError if cfg.root else ConfigError)(
            f"data.root must be a folder with videos, got '{cfg.root}'"
        )
    paths = sorted(p for p in _walk(root) if p.suffix.lower() in SUFFIXES)
    known = _load(cache / "videos.json", cfg)
    with ThreadPoolExecutor(max_workers=max(1, cfg.workers)) as pool:
        results = list(pool.map(lambda path: _examine(path, root, cfg, known), paths))
    videos = [found for found in results if isinstance(found, VideoInfo)]
    rejected = [found for found in results if isinstance(found, VideoFileError)]
    _save(cache, cfg, known, rejected)
    if not videos:
        raise VideoError(_nothing_left(root, paths, rejected))
    if rejected:
        log.warning("%d of %d videos are quarantined: %s", len(rejected), len(paths), cache)
    train, holdout = _split(videos, cfg)
    quarantined = [(error.path, f"{error.reason}: {error.detail}") for error in rejected]
    return VideoIndex(videos, quarantined, train, holdout)


def _walk(root: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(root):  # does not follow links to folders
        names[:] = [name for name in names if not name.startswith(".")]
        yield from (Path(folder) / name for name in files if not name.startswith("."))


def _examine(
    path: Path, root: Path, cfg: VideoDataConfig, known: dict[str, dict[str, Any]]
) -> VideoInfo | VideoFileError:
    try:
        if not path.resolve().is_relative_to(root.resolve()):
            raise VideoFileError(path, "outside", "it is a link out of the video folder")
        name = fingerprint(path)
        if name not in known:
            known[name] = _facts(path, cfg)
        facts = known[name]
        if facts["reason"]:
            raise VideoFileError(path, facts["reason"], facts["detail"])
        info = VideoInfo(path, name, facts["frames"], facts["width"], facts["height"], facts["fps"])
        if info.frames < cfg.span:
            detail = f"it has {info.frames} frames, a clip needs {cfg.span}"
            raise VideoFileError(path, "too_short", detail)
    except VideoFileError as error:
        return error
    return info


def _facts(path: Path, cfg: VideoDataConfig) -> dict[str, Any]:
    """What is remembered about a file's content."""
    try:
        info = probe_video(path)
        check_video(info, cfg.max_undecodable)
    except VideoFileError as error:
        return {"reason": error.reason, "detail": error.detail}
    facts = info._asdict()
    del facts["path"], facts["fingerprint"]
    return facts | {"reason": None}


def _load(path: Path, cfg: VideoDataConfig) -> dict[str, dict[str, Any]]:
    """Remembered facts by fingerprint; none if the file is from elsewhere or unreadable."""
    try:
        stored = json.loads(path.read_text())
        if stored["version"] != [_CACHE_VERSION, cfg.max_undecodable]:
            return {}
        videos = cast(dict[str, dict[str, Any]], stored["videos"])
        return {name: facts for name, facts in videos.items() if _is_sane(facts)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("the scan cache '%s' is unreadable (%s): scanning anew", path, error)
        return {}


def _is_sane(facts: dict[str, Any]) -> bool:
    if facts["reason"] is not None:
        return facts["reason"] in get_args(Reason) and isinstance(facts["detail"], str)
    numbers = [facts[name] for name in ("frames", "width", "height", "fps")]
    return all(isinstance(n, int | float) and n >= 0 for n in numbers)


def _save(
    cache: Path,
    cfg: VideoDataConfig,
    known: dict[str, dict[str, Any]],
    rejected: list[VideoFileError],
) -> None:
    version = [_CACHE_VERSION, cfg.max_undecodable]
    text = json.dumps({"version": version, "videos": known}, indent=0, sort_keys=True)
    rows = [{"path": str(e.path), "reason": e.reason, "detail": e.detail} for e in rejected]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    cache.mkdir(parents=True, exist_ok=True)
    for name, content in (("videos.json", text), ("quarantine.jsonl", lines)):
        unfinished = cache / f".{name}.{os.getpid()}.tmp"
        unfinished.write_text(content)
        unfinished.replace(cache / name)


def _split(
    videos: list[VideoInfo], cfg: VideoDataConfig
) -> tuple[list[VideoInfo], list[VideoInfo]]:
    """Hold the lowest hashes out: copies stay together, new videos move few others."""

    def rank(video: VideoInfo) -> str:
        return hashlib.blake2b(f"{cfg.seed} {video.fingerprint}".encode()).hexdigest()

    names = sorted({rank(video) for video in videos})
    count = min(max(1, round(cfg.holdout * len(names))), len(names) - 1) if cfg.holdout else 0
    held = set(names[:count])
    train = [video for video in videos if rank(video) not in held]
    return train, [video for video in videos if rank(video) in held]


def _nothing_left(root: Path, paths: list[Path], rejected: list[VideoFileError]) -> str:
    if not paths:
        kinds = ", ".join(sorted(SUFFIXES))
        return f"no video found in '{root}' or its subfolders; looked for {kinds}"
    reasons = ", ".join(f"{n} {why}" for why, n in Counter(e.reason for e in rejected).items())
    return (
        f"none of the {len(paths)} videos in '{root}' can be used: {reasons}. "
        f"The first: {rejected[0]}"
    )
