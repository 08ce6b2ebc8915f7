"""Feeds the replay: random behaviour before learning, the agent's own after each update."""

from __future__ import annotations

import time
from typing import Any

import lightning as L

from mapo_lightning.envs.collector import Collector, RandomPolicy
from mapo_lightning.finetune import ActingPolicy, FinetuneModule


class CollectExperience(L.Callback):
    """Play at random before training, then ``train_every`` agent steps after each update.

    The prefill belongs into ``on_fit_start``: the first batch is drawn before ``on_train_start``.

    Args:
        collector: Plays and writes; every rank has its own environments and replay.
        action_repeat: Simulator frames per agent step.
        seed: Of the random prefill.
    """

    def __init__(self, collector: Collector, action_repeat: int, seed: int) -> None:
        self.collector, self.action_repeat = collector, action_repeat
        self.seed = seed
        self.policy: ActingPolicy | None = None
        self.seconds = 0.0
        self._owed = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Play at random until the prefill is there and at least one chunk can be drawn."""
        assert isinstance(pl_module, FinetuneModule)
        self.policy = ActingPolicy(pl_module.world_model, pl_module.agent, explore=True)
        share = -(-pl_module.cfg.prefill // trainer.world_size)
        random = RandomPolicy(
            self.collector.replay.spec.action_dim, self.seed, pl_module.cfg.prefill_hold
        )
        taken = 0
        while taken < share or not self.collector.replay.can_sample(pl_module.cfg.chunk_length):
            taken += self.collector.collect(random, self.collector.envs.num_envs)
        self._count(trainer, pl_module, taken)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Act with the newest policy."""
        assert isinstance(pl_module, FinetuneModule)
        assert self.policy is not None
        if trainer.global_step <= pl_module.cfg.initial_updates:
            return
        started = time.perf_counter()
        self._owed += pl_module.cfg.train_every
        if self._owed >= self.collector.envs.num_envs:
            taken = self.collector.collect(self.policy, self._owed)
            self._owed -= taken
            self._count(trainer, pl_module, taken)
        self.seconds += time.perf_counter() - started
        finished, tracker = self.collector.finished, self.collector.tracker
        due = trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if due:
            pl_module.log("labels/skipped", float(tracker.skipped))
            pl_module.log("labels/waiting", float(tracker.waiting))
        if finished and due:
            pl_module.log("collect/return", sum(e.score for e in finished) / len(finished))
            pl_module.log(
                "collect/agent_steps", sum(e.agent_steps for e in finished) / len(finished)
            )
            finished.clear()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Wait for labels under way, and close the environments' processes."""
        self.collector.close()

    def _count(self, trainer: L.Trainer, module: FinetuneModule, taken: int) -> None:
        """Add simulator frames of all ranks; each takes the same number."""
        assert module.env_frames is not None
        module.env_frames += taken * self.action_repeat * trainer.world_size
