"""Settings of `mapo-play`; free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from mapo_lightning.types import SEEDS, ConfigError, check_at_least

FASTEST = 60
"""Most moments a second."""
MOST_MOMENTS = 3000
"""Longest play: every moment keeps its dream, to come back to."""


@dataclass
class PlayConfig:
    """The page where a model's dream is played with."""

    port: int = 0
    """Port of the page on 127.0.0.1; 0 takes a free one."""
    fps: int = 20
    """Moments a second while the play runs, at most 60; the page changes it. A key is obeyed in the
    next moment, so few of them answer late."""
    watch: int = 5
    """Frames that the model watches before it dreams. In an environment nothing is done until
    then."""
    start: int = 0
    """Number of the first start: the reset seed of the environment, or the held-out clip."""
    clips: int = 16
    """Held-out clips that a pre-trained model can start from."""

    def __post_init__(self) -> None:
        check_at_least(self, fps=1, watch=1, clips=1)
        for name, high in (
            ("port", 65536),
            ("fps", FASTEST + 1),
            ("watch", MOST_MOMENTS),
            ("start", SEEDS),
        ):
            if not 0 <= (value := getattr(self, name)) < high:
                raise ConfigError(f"play.{name} must lie in [0, {high}), got {value}")
