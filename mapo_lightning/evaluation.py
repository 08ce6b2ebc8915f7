"""What a policy is worth: statistics over episodes from a fixed list of reset seeds (O33)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from mapo_lightning.envs.collector import Episode, Policy, RandomPolicy, StillPolicy
from mapo_lightning.tracking import is_main_process
from mapo_lightning.types import Frames

log = logging.getLogger(__name__)

Play = Callable[[Callable[[], Policy], int], tuple[list[Episode], list[Frames]]]
"""Plays the evaluation's episodes with a policy and films the given number of them."""


@dataclass(frozen=True)
class Score:
    """Returns of one policy over the evaluation's episodes."""

    episodes: tuple[Episode, ...]

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(np.mean([e.score for e in self.episodes]))

    @property
    def spread(self) -> float:
        """Standard deviation over episodes."""
        return float(np.std([e.score for e in self.episodes]))

    @property
    def success(self) -> float | None:
        """Share of successful episodes, None where the suite does not say."""
        told = [e.success for e in self.episodes if e.success is not None]
        return float(np.mean(told)) if told else None

    def metrics(self, suffix: str = "") -> dict[str, float]:
        """What the tracker is told."""
        values = {f"eval/return{suffix}": self.mean, f"eval/return_std{suffix}": self.spread}
        if self.success is not None:
            values[f"eval/success{suffix}"] = self.success
        return values


def floors(play: Play, action_dim: int, seed: int) -> dict[str, Score]:
    """What policies that learn nothing score on the evaluation's episodes; empty off rank 0."""
    if not is_main_process():
        return {}
    log.info("playing the test episodes at random and without acting")
    at_random, _ = play(lambda: RandomPolicy(action_dim, seed), 0)
    still, _ = play(lambda: StillPolicy(action_dim), 0)
    return {"random": Score(tuple(at_random)), "still": Score(tuple(still))}


def table(scores: Mapping[str, Score]) -> Iterator[str]:
    """Lines for people: one per policy."""
    for name, score in scores.items():
        success = "" if score.success is None else f", success {score.success:.0%}"
        yield f"  {name:<12} return {score.mean:8.1f} ± {score.spread:.1f}{success}"
