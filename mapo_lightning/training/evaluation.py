"""What a policy is worth: statistics over episodes from a fixed list of reset seeds (O33).

Returns of a handful of episodes are skewed and have outliers, so next to the mean stands the
interquartile mean with a bootstrap interval. Source: Agarwal et al., arXiv:2108.13264.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from mapo_lightning.data.video import FILM_HEIGHT, write_mp4
from mapo_lightning.envs.episodes import Episode, Policy, RandomPolicy, StillPolicy
from mapo_lightning.files import atomic_write
from mapo_lightning.tracking import artifacts
from mapo_lightning.tracking.logger import RunLogger, is_main_process
from mapo_lightning.training.told import student
from mapo_lightning.types import Frames

log = logging.getLogger(__name__)

CONFIDENCE = 0.95
_RESAMPLES = 2000
_CUT = 0.25  # share of the episodes that the interquartile mean leaves out at each end
HELD = 4  # agent steps for which the second random policy holds an action: it moves heavy limbs

PolicyOf = Callable[[int], Policy]
"""Makes a policy without memory for a batch of episodes; its randomness comes from the seed."""

Play = Callable[[PolicyOf, int], tuple[list[Episode], list[Frames]]]
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
    def error(self) -> float | None:
        """Standard error of the mean; None for a single episode."""
        count = len(self.episodes)
        return self.spread / float(np.sqrt(count - 1)) if count > 1 else None

    @property
    def iqm(self) -> float:
        """Interquartile mean: of the middle half of the returns."""
        return float(stats.trim_mean([e.score for e in self.episodes], _CUT))

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """Percentile bootstrap interval of the interquartile mean, always from the same draws.

        It covers the episodes of this one agent, not other training seeds. None for one episode.
        """
        if len(self.episodes) < 2:
            return None
        found = stats.bootstrap(
            (np.array([e.score for e in self.episodes]),),
            lambda returns, axis: stats.trim_mean(returns, _CUT, axis=axis),
            confidence_level=CONFIDENCE,
            n_resamples=_RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        return float(found.low), float(found.high)

    @property
    def success(self) -> float | None:
        """Share of successful episodes, None where the suite does not say."""
        told = [e.success for e in self.episodes if e.success is not None]
        return float(np.mean(told)) if told else None

    def figures(self) -> dict[str, float]:
        """Every statistic that is defined for these episodes, by name."""
        low, high = self.interval or (None, None)
        values = {
            "return": self.mean,
            "return_std": self.spread,
            "return_se": self.error,
            "return_iqm": self.iqm,
            "return_iqm_low": low,
            "return_iqm_high": high,
            "success": self.success,
        }
        return {name: value for name, value in values.items() if value is not None}

    def metrics(self) -> dict[str, float]:
        """What the tracker is told."""
        return {f"eval/{name}": value for name, value in self.figures().items()}


@dataclass(frozen=True)
class Evaluation:
    """An agent's test episodes, and on the same seeds those of policies that learn nothing.

    Attributes:
        score: Of the agent.
        baselines: Name -> score of a policy that learns nothing.
        seeds: Reset seed of every episode.
        about: What was played: method, task, checkpoint, environment frames and the like.
        dream: What was found about the agent's dreams, by name.
    """

    score: Score
    baselines: Mapping[str, Score]
    seeds: tuple[int, ...]
    about: Mapping[str, Any]
    dream: Mapping[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """What the tracker is told: the agent's statistics and the baselines' means."""
        means = {f"eval/return_{name}": score.mean for name, score in self.baselines.items()}
        dream = {f"dream/{name}": value for name, value in self.dream.items()}
        return self.score.metrics() | means | dream

    def lines(self) -> Iterator[str]:
        """The summary for people: one line per policy."""
        yield "{task} after {env_frames:,} frames, ".format(**self.about) + (
            f"{len(self.seeds)} episodes from reset seeds {self.seeds[0]}..{self.seeds[-1]}:"
        )
        player = " ".join(self.about[key] for key in ("method", "plan") if key in self.about)
        for name, score in {**self.baselines, player: self.score}.items():
            line = f"  {name:<12} return {score.mean:8.1f}"
            if score.error is not None and score.interval is not None:
                line += f" ± {score.error:.1f} (standard error), interquartile mean {score.iqm:.1f}"
                line += " [{:.1f}, {:.1f}]".format(*score.interval)
            yield line + ("" if score.success is None else f", success {score.success:.0%}")
        if self.baselines and len(self.seeds) > 1:
            yield self._compared(player)

    def _compared(self, player: str) -> str:
        """How sure the agent's mean is, and how far above that of the best baseline."""
        _, low, high = student([episode.score for episode in self.score.episodes])
        name, best = max(self.baselines.items(), key=lambda item: item[1].mean)
        line = f"  {player}: mean in [{low:.1f}, {high:.1f}] (95 %, Student's t over episodes); "
        if low > 0 and best.mean > 0:
            return line + f"its lower end is {low / best.mean:.1f} times the mean of {name}"
        return line + f"the best policy that learns nothing, {name}, has {best.mean:.1f}"

    def tree(self) -> dict[str, Any]:
        """Everything as plain dicts: what was played, and each policy's statistics and episodes."""
        policies = {name: self._entry(score) for name, score in self.baselines.items()}
        policies["agent"] = self._entry(self.score)
        dream = {"dream": dict(self.dream)} if self.dream else {}
        return {**self.about, "confidence": CONFIDENCE, "policies": policies, **dream}

    def save(self, path: Path) -> None:
        """Write `tree` as JSON."""
        with atomic_write(path) as draft:
            draft.write_text(json.dumps(self.tree(), indent=1) + "\n", encoding="utf-8")

    def save_films(self, folder: Path, films: Sequence[Frames], fps: float) -> None:
        """Write one enlarged video per filmed episode, as ``seed_1000.mp4``."""
        for seed, film_THWC in zip(self.seeds, films, strict=False):
            write_mp4(folder / f"seed_{seed}.mp4", film_THWC, fps, FILM_HEIGHT)

    def record(self, logger: object, films: Sequence[Frames], fps: float) -> None:
        """Put statistics, episodes and videos into an MLflow run of their own, and end it."""
        if not isinstance(logger, RunLogger):
            return
        frames = int(self.about["env_frames"])
        logger.log_metrics(self.metrics(), frames)
        artifacts.log_dict(logger, self.tree(), "evaluation.json")
        for seed, film_THWC in zip(self.seeds, films, strict=False):
            artifacts.log_video(logger, film_THWC, f"seed_{seed}", frames, fps)
        logger.finalize()

    def _entry(self, score: Score) -> dict[str, Any]:
        played = [
            {"seed": seed, "return": e.score, "agent_steps": e.agent_steps, "success": e.success}
            for seed, e in zip(self.seeds, score.episodes, strict=True)
        ]
        return {**score.figures(), "episodes": played}


def baseline_scores(play: Play, action_dim: int) -> dict[str, Score]:
    """What policies that learn nothing score on the evaluation's episodes; empty off rank 0."""
    if not is_main_process():
        return {}
    log.info("playing the test episodes with policies that learn nothing")
    policies: dict[str, PolicyOf] = {
        "random": lambda seed: RandomPolicy(action_dim, seed),
        "random_held": lambda seed: RandomPolicy(action_dim, seed, hold=HELD),
        "still": lambda seed: StillPolicy(action_dim),
    }
    return {name: Score(tuple(play(policy_of, 0)[0])) for name, policy_of in policies.items()}
