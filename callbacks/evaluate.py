"""Measures the agent: greedy episodes from a fixed list of reset seeds."""

from __future__ import annotations

from typing import Any

import lightning as L

from callbacks.recorder import recorder_of
from mapo_lightning.evaluation import Play, Score
from mapo_lightning.finetune import ActingPolicy, FinetuneModule


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
