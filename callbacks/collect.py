"""Feeds the replay: random behaviour before learning, the agent's own after each update."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch

from mapo_lightning.envs.collector import Collector
from mapo_lightning.envs.episodes import RandomPolicy
from mapo_lightning.training.acting import ActingPolicy, acting
from mapo_lightning.training.finetune import FinetuneModule
from mapo_lightning.training.log_due import log_due, log_now
from mapo_lightning.training.ranks import of_all_ranks
from mapo_lightning.types import CheckpointError
from mapo_lightning.waiting import counting, waiting


class CollectExperience(L.Callback):
    """Play at random before training, then ``train_every`` agent steps after each update.

    The prefill belongs in ``on_fit_start``: the first batch is drawn before ``on_train_start``.

    A checkpoint gets an entry ``collection``: for every rank the index of its replay, its episodes
    in progress, what the agent believes there, and the steps it owes. The experience itself stays
    in the replay's folder.

    Args:
        collector: Plays and writes; every rank has its own environments and replay.
        action_repeat: Simulator frames per agent step.
        seed: Of the random prefill.
        progress: Show a bar of the prefill.
    """

    def __init__(
        self, collector: Collector, action_repeat: int, seed: int, progress: bool = False
    ) -> None:
        self.collector, self.action_repeat = collector, action_repeat
        self.seed, self.progress = seed, progress
        self.policy: ActingPolicy | None = None
        self.seconds = 0.0
        self._owed = 0
        self._resumed: dict[str, Any] | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Play at random until the prefill is there and at least one episode is complete."""
        assert isinstance(pl_module, FinetuneModule)
        self.policy = acting(pl_module, explore=True)
        if self._resumed is not None:
            self.policy.restore(self._resumed["policy"])
            return
        share = -(-pl_module.cfg.prefill // trainer.world_size)
        random = RandomPolicy(
            self.collector.replay.spec.action_dim, self.seed, pl_module.cfg.prefill_hold
        )
        taken, replay = 0, self.collector.replay

        def missing() -> str:
            episode = "" if replay.episodes else ", and for the first episode to end"
            return f"random experience: {taken} of {share} agent steps{episode}"

        show = self.progress and trainer.is_global_zero
        with waiting(missing), counting("random experience", "step", show=show) as report:
            while taken < share or not replay.episodes:
                taken += self.collector.collect(random, self.collector.envs.num_envs)
                report(taken, max(share, taken), "" if replay.episodes else "first episode")
        self._count(trainer, pl_module, taken)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Gather what every rank needs to go on; called on all of them."""
        assert self.policy is not None
        own = self.collector.state()
        checkpoint["collection"] = of_all_ranks(
            own | {"owed": self._owed, "policy": self.policy.state()}
        )

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the experience back; comes before ``on_fit_start``."""
        ranks = checkpoint.get("collection", [])
        if len(ranks) != trainer.world_size:
            raise CheckpointError(
                f"this checkpoint holds the experience of {len(ranks)} processes and the run has "
                f"{trainer.world_size}: resume with as many processes as it was trained with"
            )
        self._resumed = ranks[trainer.global_rank]
        self.collector.restore(self._resumed)
        self._owed = self._resumed["owed"]

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
            # The next update runs while the environments' processes simulate and draw the last
            # step: replay lacks it for that long, and the policy that took it was the newest.
            exact = torch.are_deterministic_algorithms_enabled()
            ahead = pl_module.cfg.collect_ahead and not exact
            taken = self.collector.collect(self.policy, self._owed, ahead)
            self._owed -= taken
            self._count(trainer, pl_module, taken)
        self.seconds += time.perf_counter() - started
        if log_due(trainer):
            log_now(pl_module, self._figures())

    def _figures(self) -> dict[str, float]:
        """What there is to say since the last time."""
        finished, labels = self.collector.finished, self.collector.live_labeler
        figures = {
            "labels/skipped": float(labels.skipped),
            "labels/waiting": float(labels.waiting),
        }
        if self.collector.spare is not None:
            figures["collect/env_deaths"] = float(self.collector.spare[1].count)
        if finished:
            figures["collect/return"] = sum(e.score for e in finished) / len(finished)
            figures["collect/agent_steps"] = sum(e.agent_steps for e in finished) / len(finished)
            finished.clear()
        return figures

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the step that is still being simulated."""
        self.collector.settle()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Wait for labels under way, and close the environments' processes."""
        self.collector.close()

    def _count(self, trainer: L.Trainer, module: FinetuneModule, taken: int) -> None:
        """Add simulator frames of all ranks, as if each took as many.

        They do but for the prefill, which lasts until a first episode has ended, and for resets,
        which take no frame.
        """
        assert module.env_frames is not None
        module.env_frames += taken * self.action_repeat * trainer.world_size
