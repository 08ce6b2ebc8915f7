"""Stage 1: learn from videos what follows from what is being done (eq. 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mapo_lightning.models.interfaces import WorldModel
from mapo_lightning.training.base_module import TrainedModule, named_adam
from mapo_lightning.training.log_due import log_at
from mapo_lightning.training.settings import PhaseConfig
from mapo_lightning.types import Batch


class PretrainModule(TrainedModule):
    """World model of one phase, trained on clips and their semantic actions."""

    def __init__(self, world_model: WorldModel, cfg: PhaseConfig) -> None:
        super().__init__(cfg.optimizer)
        self.world_model, self.cfg = world_model, cfg

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """One evaluation of eq. (2) with its commitment term."""
        if self.cfg.swap_phrases:
            batch = batch | {key: batch[key].roll(1, 0) for key in ("semantic", "has_semantic")}
        fit = self.world_model.loss(batch)
        return fit.total, fit.log | {"loss": fit.total.detach()}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The same loss on held-out clips, sampled in the same way every time.

        Training's random numbers stay as they are: a run that resumes before a validation and one
        that resumes after it continue alike.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(batch_idx)
            fit = self.world_model.loss(batch)
        terms = fit.log | {"loss": fit.total}
        self.log_dict(
            {f"val/{name}": value for name, value in terms.items()},
            batch_size=batch["obs"].shape[0],
            sync_dist=True,
            logger=False,
        )

    def on_validation_end(self) -> None:
        """Hand the means to the loggers, at the updates made so far as all other curves.

        Lightning's own log would count one update less.
        """
        found = self.trainer.callback_metrics
        means = {name: value for name, value in found.items() if name.startswith("val/")}
        log_at(self.trainer, means, self.place(self.trainer.global_step))

    def configure_optimizers(self) -> Any:
        """Adam over all of the world model that learns, with the phase's learning rate."""
        learning = (p for p in self.world_model.parameters() if p.requires_grad)
        groups = {"world_model": (learning, self.cfg.lr)}
        optimizer = named_adam(groups, self.optimizer_cfg, self)
        if not self.cfg.warmup and self.cfg.schedule == "constant":
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.cfg.rate)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }
