"""Measures the agent: greedy episodes from a fixed list of reset seeds."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L

from callbacks.recorder import recorder_of
from mapo_lightning.stopping import Stopped, signals
from mapo_lightning.training.acting import greedy
from mapo_lightning.training.checkpoint import read_checkpoint
from mapo_lightning.training.evaluation import Evaluation, Play, Score
from mapo_lightning.training.finetune import FinetuneModule
from mapo_lightning.training.settings import EvaluateConfig

log = logging.getLogger(__name__)


class EvaluatePolicy(L.Callback):
    """Play greedy episodes now and then, and at the end.

    Args:
        play: Plays the episodes.
        baselines: Scores of policies that learn nothing, on the same reset seeds, by name.
        test: When, and from which reset seeds.
        about: What is played: task and method.
        fps: Frames per second of the filmed episode.
        best: Where the agent with the best mean return so far is kept; None: nowhere.
    """

    def __init__(
        self,
        play: Play,
        baselines: Mapping[str, Score],
        test: EvaluateConfig,
        about: Mapping[str, Any],
        fps: float,
        best: Path | None = None,
    ) -> None:
        self.play, self.baselines, self.test, self.about = play, baselines, test, about
        self.fps = fps
        self.best, self.best_return = best, -math.inf
        self.newest: Evaluation | None = None
        self._evaluated_at = -1  # on all ranks
        self._broken_off = False  # the last evaluation, by a signal

    def state_dict(self) -> dict[str, Any]:
        """Goes into the checkpoints."""
        return {"best_return": self.best_return, "broken_off": self._broken_off}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A resumed run must beat the agent that is kept, whatever checkpoint it resumes from."""
        self._broken_off = bool(state_dict.get("broken_off"))
        self.best_return = float(state_dict["best_return"])
        if self.best is not None:
            self.best_return = -math.inf  # what is not there has to be beaten by nobody
            if self.best.exists():
                kept = read_checkpoint(self.best, mapped=True)["callbacks"][self.state_key]
                self.best_return = float(kept["best_return"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make up for an evaluation that was broken off."""
        if self._broken_off:
            self._evaluate(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Evaluate on schedule."""
        step = trainer.global_step
        if step % self.test.every == 0 and step >= self.test.first:
            self._evaluate(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate the trained agent."""
        if trainer.global_step != self._evaluated_at:
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Play on the main process; where its agent is the best so far, all of them keep it."""
        self._evaluated_at = trainer.global_step
        better, self._broken_off = False, False
        if trainer.is_global_zero:
            try:
                with signals.interruptible():
                    better = self._play(trainer, pl_module)
            except Stopped as stopped:  # the run stops where the checkpoint is written
                self._broken_off = True
                log.info("the evaluation is broken off by %s", stopped.signal.name)
        if self.best is not None and trainer.strategy.broadcast(better):
            trainer.save_checkpoint(self.best)
            recorder = recorder_of(trainer)
            if recorder is not None:
                recorder.keep(trainer, self.best)

    def _play(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        """Play and record the episodes; tells whether no agent was better before."""
        assert isinstance(pl_module, FinetuneModule)
        assert pl_module.env_frames is not None
        episodes, films = self.play(greedy(pl_module), 1)
        about = {"env_frames": pl_module.env_frames, "updates": trainer.global_step}
        about = {**self.about, **about}
        self.newest = Evaluation(Score(tuple(episodes)), self.baselines, self.test.seeds, about)
        recorder = recorder_of(trainer)
        if recorder is not None:
            recorder.log_metrics(trainer, self.newest.metrics(), pl_module.env_frames)
            if films:
                recorder.log_video(trainer, "episode", films[0], self.fps, pl_module.env_frames)
        # Also where a mean is not a number: one agent is always kept.
        better = not self.newest.score.mean <= self.best_return
        if better:
            self.best_return = self.newest.score.mean
        return better
