"""What a describer is: anything that says, in words, what happens in a few frames."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mapo_lightning.types import ConfigError, Frames


class Reply(NamedTuple):
    """What a describer says about one clip."""

    text: str
    """The answer as it was given; read by `phrase.parse_reply`."""
    hidden: NDArray[np.float16] | None = None
    """Mean hidden state of the answer, (hidden_dim,), where the backend exposes it."""


@runtime_checkable
class Describer(Protocol):
    """Anything that can say what happens between the first and the last of a few frames."""

    name: str
    """Identity of model, weights, prompt and thresholds; part of every label's key."""
    in_worker: bool
    """True if it may run inside a DataLoader worker (CPU or HTTP), False if it needs the GPU."""

    def describe(self, clips: Sequence[Frames]) -> list[Reply]:
        """Describe each clip on its own.

        Args:
            clips: Windows of RGB frames, each (T, H, W, 3) uint8 with T >= 1, oldest first.

        Returns:
            One reply per clip, in order. A reply must not depend on the other clips.
        """
        ...


class NullDescriber:
    """Sees nothing: the ablation without semantic actions, and the smallest real describer."""

    name = "none-v1"
    in_worker = True

    def describe(self, clips: Sequence[Frames]) -> list[Reply]:
        """Answer ``null`` to every clip."""
        return [Reply("null") for _ in clips]


@dataclass
class VlmConfig:
    """Who describes which frames, and where its answers are kept (O1, O2, O5-O7, O10)."""

    kind: Literal["flow", "none"] = "flow"
    """flow: optical flow, no weights and no network. none: nobody is asked, all labels null."""
    window: int = 4
    """Frames in one window shown to the describer."""
    stride: int = 4
    """Frames from one window of a video to the next; a label is held until the next one."""
    offset: int = 0
    """Frames between a window's last frame and the frame it labels: 0 counts the frame itself,
    1 ends the window one frame earlier, so that a label never shows what is to be predicted."""
    frame_size: int = 128
    """Short side of the video frames shown to the describer, in pixels."""
    env_every: int = 4
    """Agent steps from one question about an environment to the next."""
    env_frame_size: int | None = None
    """Side of the environment frames shown to the describer, in pixels; null: the 64 px image."""
    store: str = "labels"
    """Folder of the label store; a relative path lies inside the run's work folder."""
    flow_min_percent: float = 0.7
    """Smallest motion over one window that counts, in percent of the frame width."""
    env_late: bool | None = None
    """While collecting, act on the newest answer there is, and complete replay when an entry's own
    answer arrives. null: yes, but no for flow and none and where trainer.deterministic is on."""
    env_queue: int = 64
    """Windows of environments that may wait for a late answer at once. Where the queue is full, a
    window is skipped as null and counted in labels/skipped: no environment waits."""
    env_drain: float = 30.0
    """Seconds that the end of fine-tuning waits for answers under way; the rest stay null."""
    marks: str = ""
    """File of accepted and rejected labels, from the gallery; rejected ones count as null."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: A value is out of range.
        """
        least_of = {"window": 2, "stride": 1, "offset": 0, "env_every": 1, "env_queue": 1}
        for field, least in least_of.items():
            if getattr(self, field) < least:
                raise ConfigError(f"{field} must be at least {least}, got {getattr(self, field)}")
        for field in ("frame_size", "env_frame_size"):
            size = getattr(self, field)
            if size is not None and not 16 <= size <= 2048:
                raise ConfigError(f"{field} must lie in [16, 2048] pixels, got {size}")
        if not 0.0 < self.flow_min_percent <= 50.0:
            raise ConfigError(
                f"flow_min_percent must lie in (0, 50] percent, got {self.flow_min_percent}"
            )
        if not 0.0 <= self.env_drain <= 3600.0:
            raise ConfigError(f"env_drain must lie in [0, 3600] seconds, got {self.env_drain}")
        if not self.store:
            raise ConfigError("store must name a folder, got an empty text")
