"""Stage 2: learn the robot's own dynamics on top, and a policy inside the dream (eq. 3, 4, 5)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mapo_lightning.models.agents.planner import Planner
from mapo_lightning.models.blocks import mean_over_ranks
from mapo_lightning.models.interfaces import Agent, ClipsAlong, Fit, WorldModel
from mapo_lightning.training.base_module import TrainedModule, named_adam
from mapo_lightning.training.log_due import Place
from mapo_lightning.training.settings import FinetuneConfig
from mapo_lightning.types import Batch, ConfigError


class FinetuneModule(TrainedModule):
    """World model and agent, trained together on replayed and imagined experience.

    One optimiser with a named group per part and one step per batch: DDP reduces every gradient
    once, and ``trainer.global_step`` counts batches.

    Deviation: one-backward. The actor dreams in the model as it was before this batch's update,
    as in DreamerV3; DreamerV2 updates the model first.

    Args:
        world_model: Learns what follows from what is done.
        agent: Learns to act.
        cfg: The training.
        planner: Acts in place of the agent where its settings say so; no part of the training.

    Raises:
        ConfigError: ``finetune.freeze`` names a part that the world model does not have, or a
            group of parameters has no learning rate.
    """

    world_model: WorldModel
    agent: Agent

    def __init__(
        self,
        world_model: WorldModel,
        agent: Agent,
        cfg: FinetuneConfig,
        planner: Planner | None = None,
    ) -> None:
        super().__init__(cfg.optimizer)
        self.world_model, self.agent, self.cfg = world_model, agent, cfg
        self.planner = planner
        self.env_frames = 0
        if isinstance(world_model, ClipsAlong):
            self.clipped_along = world_model.clipped_along()
        parts = world_model.parts()
        if unknown := sorted(set(cfg.freeze) - set(parts)):
            raise ConfigError(
                f"finetune.freeze names {', '.join(unknown)}, but this world model has only "
                f"{', '.join(sorted(parts))}"
            )
        for name in cfg.freeze:
            parts[name].requires_grad_(False)
        groups = {**world_model.groups(), **agent.groups()}
        if not any(p.requires_grad for group in groups.values() for p in group):
            raise ConfigError(
                f"finetune.freeze={','.join(cfg.freeze)} leaves nothing to learn: the agent "
                f"{type(agent).__name__} has no parameters that this optimiser moves"
            )
        if cfg.agent_updates > 1 and not agent.groups():
            raise ConfigError(
                f"finetune.agent_updates={cfg.agent_updates} repeats the updates of the agent's "
                f"parameters, but {type(agent).__name__} has none that this optimiser moves: set "
                "it back to 1"
            )
        if unrated := sorted({*world_model.groups(), *agent.groups()} - set(cfg.rates)):
            raise ConfigError(
                f"there is no learning rate for the parameters of {', '.join(unrated)}; "
                f"finetune has rates for {', '.join(cfg.rates)}"
            )

    def place(self, updates: int) -> Place:
        """As in every training; but the updates before the agent acts count on their own.

        They are made on the prefill alone, at one number of frames.
        """
        if updates <= self.cfg.initial_updates:
            return Place("initial/", updates)
        return super().place(updates)

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. (3) on the replayed chunk, eq. (4) and (5) on dreams that start in all its states."""
        fit, fitted = self._fit(batch)
        for number in range(self.cfg.agent_updates - 1):
            norms = self._update_agent(fit, batch)
            self._scalars |= {f"{key} of agent update {number + 1}": x for key, x in norms.items()}
        behaviour = self.agent.losses(self.world_model, fit, batch)
        total = fitted
        for loss in behaviour.losses.values():
            total = total + loss
        return total, fit.log | behaviour.log | {"world_model": fit.total}

    def _fit(self, batch: Batch) -> tuple[Fit, Tensor]:
        """The world model's fit, without its graph, and its total, which brings the gradients.

        They are computed before the agent dreams, so that what the images left behind for the
        backward is gone before what the dreams leave is made. Several processes keep that memory:
        DDP sends gradients while the backward of the others goes on.
        """
        fit = self.world_model.loss(batch)
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        fitted = differentiated(fit.total, self.world_model.parameters()) if alone else fit.total
        return Fit(fit.total.detach(), fit.log, fit.belief.detach()), fitted

    def _update_agent(self, fit: Fit, batch: Batch) -> dict[str, Tensor]:
        """One update of the agent alone, with its groups of the shared optimiser.

        Returns the norms of its gradients.

        It happens inside this batch's forward. So gradients are computed without the hooks by which
        DDP waits for one backward per batch, and are averaged here.
        """
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        losses = self.agent.losses(self.world_model, fit, batch).losses
        # Lightning clears the gradients of the update before only after this forward.
        optimizer.zero_grad()
        names = set(self.agent.groups())
        groups = [group for group in optimizer.param_groups if group["name"] in names]
        parameters = [p for group in groups for p in group["params"]]
        with torch.autocast(parameters[0].device.type, enabled=False):
            gradients = torch.autograd.grad(torch.stack([*losses.values()]).sum(), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = mean_over_ranks(gradient)
        norms = self._clip(groups)
        optimizer.step()  # the others have no gradient now and stay as they are
        for parameter in parameters:
            parameter.grad = None
        return norms

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Let the agent do what it does between updates."""
        # Not at the batch's end: checkpoints are written there before it, and a resumed run would
        # go on without.
        made = self.trainer.global_step
        if made:
            self.agent.after_update(made)

    def configure_optimizers(self) -> Any:
        """Adam with a group per part; some may wait until the fresh parts have settled."""
        groups = {**self.world_model.groups(), **self.agent.groups()}
        rates, holds = self.cfg.rates, {"lower": self.cfg.hold_lower, "actor": self.cfg.hold_actor}
        optimizer = named_adam(
            {name: (params, rates[name]) for name, params in groups.items()},
            self.optimizer_cfg,
            self,
        )
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


class _Differentiated(torch.autograd.Function):
    """A scalar whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, known: Sequence[Tensor], *_parameters: Tensor) -> Tensor:
        ctx.known = known
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        known, ctx.known = ctx.known, None
        torch._foreach_mul_(known, grad)
        return None, None, *known


def differentiated(loss: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """``loss`` with its gradients computed now; the backward of what comes of it hands them on.

    Parameters get them in that backward, like any others, so that what waits for it (DDP) works as
    ever; but hooks on a parameter's gradient run in both. The graph that led to ``loss`` is freed
    here. The result can be used in one backward only. Where nothing learns, it has no gradients.
    """
    wanted = [p for p in parameters if p.requires_grad]
    if not wanted or not loss.requires_grad:
        return loss.detach()
    device = loss.device.type
    # on the meta device, where costs are counted, there is no autocast to switch off
    has_autocast = torch.amp.is_autocast_available(device)
    with torch.autocast(device, enabled=False) if has_autocast else nullcontext():
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
    used = [(p, g) for p, g in zip(wanted, found, strict=True) if g is not None]
    known: Tensor = _Differentiated.apply(  # type: ignore[no-untyped-call]
        loss.detach(), [g for _, g in used], *(p for p, _ in used)
    )
    return known


def _waiting(wait: int, update: int) -> float:
    """Factor of a learning rate that is zero for the first ``wait`` updates."""
    return float(update >= wait)
