"""Stage 1: learn from videos what follows from what is being done (eq. 2)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mapo_lightning.models.objective import ObjectiveConfig
from mapo_lightning.models.world_model import WorldModel
from mapo_lightning.optimization import OptimizerConfig, TrainedModule, named_adam
from mapo_lightning.types import Batch, ConfigError


@dataclass
class PretrainConfig:
    """Pre-training on videos (facts 5, O27, O28)."""

    updates: int = 600_000
    """Optimiser updates: 600,000 for a first result, 1,200,000 for parity (O27)."""
    batch_size: int = 16
    """Clips per update and rank (O28)."""
    lr: float = 3e-4
    """Learning rate, constant (O28)."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Adam's other numbers."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Loss weights; the method's file names them."""
    validate_every: int = 5000
    """Updates between passes over the held-out clips."""

    def __post_init__(self) -> None:
        for name in ("updates", "batch_size", "validate_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.lr <= 0.0:
            raise ConfigError(f"lr must be positive, got {self.lr}")


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
        """The same loss on held-out clips."""
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
