"""Stage 2: learn the robot's own dynamics on top, and a policy inside the dream (eq. 3, 4, 5)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mapo_lightning.models.agents.dreamer import DreamerAgent
from mapo_lightning.models.rssm_world.world_model import WorldModel
from mapo_lightning.training.base_module import TrainedModule, named_adam
from mapo_lightning.training.settings import FinetuneConfig
from mapo_lightning.types import Batch, ConfigError


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
