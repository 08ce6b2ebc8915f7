"""Settings of the agents; free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mapo_lightning.types import ConfigError


@dataclass
class AgentConfig:
    """Behaviour learning (facts 4)."""

    kind: Literal["dreamer"] = "dreamer"
    """DreamerV2's actor-critic, which learns inside the dream only."""
    horizon: int = 15
    """Number of imagined steps from every replayed state."""
    discount: float = 0.99
    """γ per agent step."""
    lam: float = 0.95
    """λ of the critic's target."""
    entropy: float = 1e-4
    """Weight η of the policy's entropy in eq. (5), per nat."""
    explore_noise: float = 0.0
    """Standard deviation of normal noise added to actions while collecting, in units of the action
    range [-1, 1]; the published systems rely on the policy's own samples."""
    greedy: Literal["mode", "mean"] = "mode"
    """Action in evaluation: the policy's mode, as published, or its mean. The mode of a policy that
    is still wide often lies at the edge of the range."""
    target_every: int = 100
    """Updates between hard copies of the critic into the slow critic."""

    def __post_init__(self) -> None:
        if self.horizon < 2:
            raise ConfigError(f"horizon must be at least 2, got {self.horizon}")
        for name in ("discount", "lam"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("entropy", "explore_noise"):
            if getattr(self, name) < 0.0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.target_every < 1:
            raise ConfigError(f"target_every must be at least 1, got {self.target_every}")
