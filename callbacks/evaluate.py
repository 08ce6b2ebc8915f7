"""Measures the agent: greedy episodes from a fixed list of reset seeds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np

from callbacks.recorder import recorder_of
from mapo_lightning.envs.collector import Episode, Policy, RandomPolicy, StillPolicy
from mapo_lightning.finetune import ActingPolicy, FinetuneModule
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


class EvaluatePolicy(L.Callback):
    """Play greedy episodes now and then, and at the end.

    Args:
        play: Plays the episodes.
        floors: Scores of policies that learn nothing, on the same reset seeds, by name.
        every: Updates between evaluations; one more is made at the end.
        fps: Frames per second of the filmed episode.
    """

    def __init__(self, play: Play, floors: dict[str, Score], every: int, fps: int) -> None:
        self.play, self.floors, self.every, self.fps = play, floors, every, fps
        self.score: Score | None = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Evaluate on schedule."""
        if trainer.global_step % self.every == 0:
            self._evaluate(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate the trained agent."""
        if self.score is None or trainer.global_step % self.every:
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, FinetuneModule)
        world_model, agent = pl_module.world_model, pl_module.agent
        episodes, films = self.play(lambda: ActingPolicy(world_model, agent, explore=False), 1)
        self.score = Score(tuple(episodes))
        recorder = recorder_of(trainer)
        if recorder is None or trainer.logger is None:
            return
        assert pl_module.env_frames is not None
        metrics = self.score.metrics()
        metrics |= {f"eval/return_{name}": score.mean for name, score in self.floors.items()}
        trainer.logger.log_metrics(metrics, pl_module.env_frames)
        if films:
            recorder.log_video(trainer, "episode", films[0], self.fps, pl_module.env_frames)
