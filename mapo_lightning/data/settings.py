"""Settings of videos, of labelling all of them, and of replay; free of torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, Optional

from mapo_lightning.types import POSITIONS, ConfigError


@dataclass
class LimitsConfig:
    """What one video may cost to examine; one that needs more is set aside as ``too_large``."""

    pixels: int = 8192 * 4320
    """Pixels of one frame, or of one image of a folder of images."""
    frames: int = 1_000_000
    """Frames of one video: 9 hours at 30 per second."""
    hours: float = 24.0
    """Length of one video, hours."""
    cpu_seconds: float = 1800.0
    """CPU time that examining one video may take, seconds: all of it is decoded once or twice."""
    memory_mb: int = 2048
    """Address space of each process that examines videos, megabytes."""

    def __post_init__(self) -> None:
        for name, least in (("pixels", 1), ("frames", 1), ("cpu_seconds", 1), ("memory_mb", 1024)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"limits.{name} must be at least {least}, got {getattr(self, name)}"
                )
        if not self.hours > 0:
            raise ConfigError(f"limits.hours must be positive, got {self.hours}")


@dataclass
class VideoDataConfig:
    """Which videos to learn from, and how clips are cut from them (O28, O29)."""

    kind: Literal["demo", "folder", "ssv2", "human36m", "metaworld_experts"] = "demo"
    """demo: videos rendered from simulators on this machine. folder: your own, from `root`. ssv2,
    human36m: Something-Something V2 and Human3.6M, as distributed. metaworld_experts: the experts
    of Meta-World's 50 tasks, filmed on this machine. See docs/data.md."""
    root: str = ""
    """Folder of the videos, searched with all its subfolders; empty only with kind=demo."""
    classes: list[str] = field(default_factory=list)
    """Classes to use, by the data set's own names; empty uses all. Not with demo and folder."""
    leave_out: Optional[list[str]] = None  # noqa: UP045 (read by OmegaConf)
    """Classes never to use. null: none; with metaworld_experts the task of ``env=``, so that
    fine-tuning meets a task that no video has shown."""
    limit: Optional[int] = None  # noqa: UP045 (read by OmegaConf)
    """Use at most this many videos, drawn by name and `seed`; null uses all."""
    official_split: bool = True
    """Train on the data set's training list and hold its validation list out, if it has them;
    false: learn from both, and hold out the share `holdout` of all videos."""
    clip_length: int = POSITIONS
    """Frames T of one clip."""
    frame_stride: int = 1
    """Frames of the video from one frame of a clip to the next."""
    rate: Optional[float] = None  # noqa: UP045
    """First reduce a video to about this many frames per second, Hz; null: as recorded. Where its
    own rate is uneven, it is met exactly, and frames that are shown for long are repeated."""
    square: bool = False
    """First crop the square in the middle; false squashes the whole picture to a square."""
    image_size: int = 64
    """Height and width of a clip's frames, in pixels; the aspect ratio is not kept."""
    holdout: float = 0.1
    """Share of the videos never trained on, in [0, 0.5]; at least one if there are two. Not used
    with the data set's own split."""
    max_undecodable: float = 0.1
    """Share of lost frames above which a video is rejected, in [0, 1]."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """What one video may cost."""
    cache: Literal["memory", "decoded"] = "memory"
    """Where decoded frames are kept at the networks' size. memory: by each worker, if all of them
    fit `cache_mb`. decoded: in files in ``work_dir``, 12 kB for a frame of 64 pixels, which all
    workers, ranks and later runs share; each video is decoded once, as a whole."""
    cache_mb: int = 256
    """With cache=memory: memory, in megabytes, in which each worker may keep all frames of all
    videos, so that each video is decoded once; a set that needs more is not kept. 0: never."""
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
        if self.cache_mb < 0:
            raise ConfigError(f"cache_mb must not be negative, got {self.cache_mb}")
        if not 0 <= self.workers <= 256:
            raise ConfigError(f"workers must lie in [0, 256], got {self.workers}")
        if self.rate is not None and not 0.0 < self.rate <= 1000.0:
            raise ConfigError(f"rate must lie in (0, 1000] frames per second, got {self.rate}")
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, got {self.seed}")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit must be at least 1 video, got {self.limit}")

    @property
    def span(self) -> int:
        """Frames of the video that one clip reaches over."""
        return (self.clip_length - 1) * self.frame_stride + 1


@dataclass
class LabelConfig:
    """What stage=label does: it labels every window of all videos."""

    shard: str = "0/1"
    """Which part of the corpus, as i/n with i from 0: for jobs on several machines. Processes
    started by torchrun divide a part among themselves."""
    dry: bool = False
    """Only count the windows and those without a label, and estimate the time they would take."""
    probe: int = 16
    """Windows that dry=true labels to measure the rate; their answers are kept. 0: none."""

    def __post_init__(self) -> None:
        if self.probe < 0:
            raise ConfigError(f"probe must not be negative, got {self.probe}")
        self.part()

    def part(self) -> tuple[int, int]:
        """The shard as (number, count)."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", self.shard)
        if not match or not int(match[1]) < int(match[2]):
            raise ConfigError(f"shard must be i/n with i from 0 to n-1, got '{self.shard}'")
        return int(match[1]), int(match[2])


@dataclass
class ReplayConfig:
    """How much experience is kept, and how chunks are drawn from it."""

    capacity: int = 1_000_000
    """Agent steps kept by each rank; the oldest whole episodes are evicted first. On disk a step
    takes 12.3 kB for 64x64 pixels, and 2 bytes per number of an embedded phrase."""
    prioritize_ends: bool = False
    """Draw the last chunk of an episode more often (facts 6.2; published for Meta-World)."""

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ConfigError(f"capacity must be at least 1 agent step, got {self.capacity}")
