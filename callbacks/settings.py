"""Settings of the callbacks; free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mapo_lightning.types import ConfigError, check_at_least


@dataclass
class CallbacksConfig:
    """What happens around training."""

    codebook: bool = True
    """Move the codebook after each update; must be off for methods without one."""
    rollout_every: int = 5000
    """Updates between imagination rollouts; one more is made at the end."""
    checkpoint_every: int = 5000
    """Updates between checkpoints; one more is made at the end."""
    checkpoints: Literal["newest", "all"] = "newest"
    """Which of them are kept beside last.ckpt. all: to judge how a run went (mapo-dreams). Older
    ones can be evaluated, but not resumed: their experience may be gone."""
    phrases: int = 24
    """Windows in the table of phrases that is recorded at the end of pre-training."""
    gallery: int = 200
    """Windows in the page of labels that is recorded at the end of pre-training; 0: no page."""
    quality: int = 48
    """Windows by which the labels are judged at the end of pre-training; each costs four more
    queries to the describer. 0: not at all."""
    told: int = 48
    """Held-out clips that are dreamt with and without their phrases at the end of pre-training, to
    see whether the phrases lead the dream. 0: none."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        for name in ("phrases", "gallery", "quality", "told"):
            if not 0 <= getattr(self, name) <= 2000:
                raise ConfigError(f"{name} must lie in [0, 2000], got {getattr(self, name)}")
        check_at_least(self, rollout_every=1, checkpoint_every=1)
