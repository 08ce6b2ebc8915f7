"""Stage 1: learn from videos what follows from what is being done (eq. 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from mapo_lightning.models.interfaces import WorldModel
from mapo_lightning.training.base_module import TrainedModule, named_adam
from mapo_lightning.training.settings import PretrainConfig
from mapo_lightning.types import Batch


class PretrainModule(TrainedModule):
    """World model without upper dynamics, trained on clips and their semantic actions."""

    def __init__(self, world_model: WorldModel, cfg: PretrainConfig) -> None:
        super().__init__(cfg.optimizer)
        self.world_model, self.cfg = world_model, cfg

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """One evaluation of eq. (2) with its commitment term."""
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
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over the whole world model."""
        return named_adam(
            {"world_model": (self.world_model.parameters(), self.cfg.lr)}, self.optimizer_cfg
        )
