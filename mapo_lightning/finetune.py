"""Stage 2: learn the robot's own dynamics on top, and a policy inside the dream (eq. 3, 4, 5)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mapo_lightning.models.actor_critic import DreamerAgent
from mapo_lightning.models.belief import Belief
from mapo_lightning.models.objective import ObjectiveConfig
from mapo_lightning.models.world_model import WorldModel
from mapo_lightning.optimization import OptimizerConfig, TrainedModule, named_adam
from mapo_lightning.types import Batch, ConfigError


@dataclass
class FinetuneConfig:
    """Learning in an environment (facts 6.1; the suites' numbers stand in conf/env/)."""

    agent_steps: int = 502_000
    """Agent steps in all, prefill included; times the action repeat gives frames (O30)."""
    prefill: int = 1000
    """Agent steps of uniformly random behaviour before learning starts."""
    prefill_hold: int = 1
    """Agent steps for which each random action of the prefill is held; 1 as published. Sustained
    actions show what single ones, which cancel out, do not."""
    initial_updates: int = 100
    """Updates on the prefill before the agent acts."""
    train_every: int = 5
    """Agent steps between updates."""
    collect_ahead: bool = True
    """The environments simulate and draw a step while the next update runs, which hides all of it
    if ``env.num_envs`` is at least ``train_every``. Replay gets that step one update later; the
    order of everything stays fixed. Off with ``trainer.deterministic``."""
    batch_size: int = 16
    """Replayed chunks per update and rank."""
    chunk_length: int = 50
    """Length T of a replayed chunk."""
    lr_model: float = 3e-4
    """Learning rate of upper dynamics, decoder and heads."""
    lr_lower: float = 3e-4
    """Learning rate of encoder, context and lower dynamics."""
    hold_lower: int = 0
    """First updates in which the lower learning rate is zero: 100 on Meta-World (facts 2.5)."""
    hold_actor: int = 0
    """First updates in which the actor's learning rate is zero: an actor that trusts a model which
    has seen nothing yet saturates. 0 as published, with its low learning rate."""
    lr_actor: float = 8e-5
    """Learning rate of the actor."""
    lr_critic: float = 8e-5
    """Learning rate of the critic."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Adam's other numbers."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Loss weights; the method's file names them, the environment's sets free nats."""
    load: list[str] = field(
        default_factory=lambda: ["encoder", "context", "source", "lower", "decoder"]
    )
    """Parts taken over from pre-training (O23); PreLAR drops its source."""
    freeze: list[str] = field(default_factory=list)
    """Parts of the world model whose weights stay as they are, such as encoder and decoder; the
    published systems train them all (O23). Batch norm goes on following its inputs."""

    def __post_init__(self) -> None:
        for name in ("agent_steps", "prefill", "prefill_hold", "train_every", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.chunk_length < 2:
            raise ConfigError(f"chunk_length must be at least 2, got {self.chunk_length}")
        for name in ("initial_updates", "hold_lower", "hold_actor"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("lr_model", "lr_lower", "lr_actor", "lr_critic"):
            if getattr(self, name) <= 0.0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.prefill >= self.agent_steps:
            raise ConfigError(
                f"prefill must be below agent_steps, got {self.prefill} of {self.agent_steps}"
            )

    def updates(self, ranks: int) -> int:
        """Optimiser updates of the whole run when ``ranks`` processes collect together."""
        return self.initial_updates + (self.agent_steps - self.prefill) // (
            self.train_every * ranks
        )


class FinetuneModule(TrainedModule):
    """World model and actor-critic, trained together on replayed and imagined experience.

    One optimiser with a named group per part and one backward per batch: DDP reduces every gradient
    once, and ``trainer.global_step`` counts batches.

    Deviation: one-backward. The actor dreams in the model as it was before this batch's update,
    as in DreamerV3; DreamerV2 updates the model first.
    """

    def __init__(self, world_model: WorldModel, agent: DreamerAgent, cfg: FinetuneConfig) -> None:
        super().__init__(cfg.optimizer)
        self.world_model, self.agent, self.cfg = world_model, agent, cfg
        self.env_frames = 0
        parts = {name for name, part in world_model.named_children() if part is not None}
        if unknown := sorted(set(cfg.freeze) - parts):
            raise ConfigError(
                f"finetune.freeze names {', '.join(unknown)}, but this world model has only "
                f"{', '.join(sorted(parts))}"
            )
        for name in cfg.freeze:
            world_model.get_submodule(name).requires_grad_(False)

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. (3) on the replayed chunk, eq. (4) and (5) on dreams that start in all its states."""
        fit = self.world_model.loss(batch)
        start_NF = fit.belief.control.feat.flatten(0, 1).detach()
        behaviour = self.agent.losses(self.world_model, start_NF)
        terms = fit.log | behaviour.log | {"world_model": fit.total.detach()}
        return fit.total + behaviour.actor + behaviour.critic, terms

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Refresh the slow critic on schedule."""
        # Not at the batch's end: checkpoints are written there before it, and a resumed run would
        # go on without.
        made = self.trainer.global_step
        if made and made % self.agent.cfg.target_every == 0:
            self.agent.update_target()

    def configure_optimizers(self) -> Any:
        """Adam with four groups; the lower group may wait until the fresh parts have settled."""
        lower, model = _halves(self.world_model)
        cfg = self.cfg
        optimizer = named_adam(
            {
                "lower": (lower, cfg.lr_lower),
                "model": (model, cfg.lr_model),
                "actor": (self.agent.actor.parameters(), cfg.lr_actor),
                "critic": (self.agent.critic.parameters(), cfg.lr_critic),
            },
            self.optimizer_cfg,
        )
        holds = {"lower": cfg.hold_lower, "actor": cfg.hold_actor}
        if not any(holds.values()):
            return optimizer
        waits = [holds.get(group["name"], 0) for group in optimizer.param_groups]
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, [partial(_waiting, wait) for wait in waits]
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def _waiting(wait: int, update: int) -> float:
    """Factor of a learning rate that is zero for the first ``wait`` updates."""
    return float(update >= wait)


def _halves(world_model: WorldModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters of encoder, context and lower dynamics; and those of everything else.

    Without lower dynamics there is one group for all, as in DreamerV2 (facts 7.1).
    """
    early = {"encoder", "context", "source", "lower"} if world_model.lower is not None else set()
    if world_model.upper is None:
        early -= {"source"}  # PreLAR's action encoder is fresh in fine-tuning (facts 2.5)
    lower: list[nn.Parameter] = []
    model: list[nn.Parameter] = []
    for name, parameter in world_model.named_parameters():
        (lower if name.split(".")[0] in early else model).append(parameter)
    return lower, model


class ActingPolicy:
    """The agent in an environment: keeps a belief per environment and acts on it.

    Both posteriors are sampled, in evaluation too; only the action is the mode there (facts 2.4).

    Args:
        world_model: Trained model; used in evaluation mode, whatever mode it is in.
        agent: Trained agent.
        explore: Sample actions; otherwise take the policy's mode.
    """

    def __init__(self, world_model: WorldModel, agent: DreamerAgent, explore: bool) -> None:
        self.world_model, self.agent, self.explore = world_model, agent, explore
        # All that differs between the modes of the parts in use; `eval()` visits every module.
        self.norms = [m for m in world_model.encoder.modules() if isinstance(m, nn.BatchNorm2d)]
        self.belief: Belief | None = None
        self.action: Tensor | None = None

    @torch.no_grad()
    def __call__(self, step: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Take one step of N environments.

        Args:
            step: ``obs`` (N, H, W, 3) uint8, ``is_first`` (N,) bool, ``semantic`` (N, V) float32,
                ``has_semantic`` (N,) bool, ``position`` (N,) int64.

        Returns:
            Actions (N, A) in [-1, 1].
        """
        device = next(self.agent.parameters()).device
        batch = {key: torch.from_numpy(x).to(device)[:, None] for key, x in step.items()}
        if self.action is None:
            envs = batch["obs"].shape[0]
            self.action = torch.zeros(envs, self.agent.action_dim, device=device)
        batch["action"] = self.action[:, None]
        training = [norm.training for norm in self.norms]
        for norm in self.norms:
            norm.training = False
        self.belief = self.world_model.observe(batch, self.belief).belief.at(0)
        for norm, was_training in zip(self.norms, training, strict=True):
            norm.training = was_training
        self.action = self.agent.act(self.belief.control.feat, self.explore)
        acted: NDArray[np.float32] = self.action.float().cpu().numpy()
        return acted
