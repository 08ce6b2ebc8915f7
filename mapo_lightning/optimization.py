"""What both Lightning modules share: named optimiser groups, clipped one by one, a light log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from mapo_lightning.types import ConfigError


@dataclass
class OptimizerConfig:
    """Adam as every system of the family uses it (facts 4, 5)."""

    eps: float = 1e-5
    """Added to the root of the second moment."""
    weight_decay: float = 1e-6
    """L2 penalty inside Adam, as in the PyTorch ports. Deviation: adam-l2. APV and DreamerV2 in
    TensorFlow shrink all weights by this factor instead, whatever the learning rate."""
    max_grad_norm: float = 100.0
    """Global norm to which the gradient of each group is clipped."""

    def __post_init__(self) -> None:
        if self.eps <= 0.0 or self.weight_decay < 0.0 or self.max_grad_norm <= 0.0:
            raise ConfigError("eps and max_grad_norm must be positive, weight_decay not negative")


def named_adam(
    groups: Mapping[str, tuple[Iterable[nn.Parameter], float]], cfg: OptimizerConfig
) -> torch.optim.Adam:
    """One fused Adam with a named group per part: name -> (parameters, learning rate)."""
    listed = [
        {"name": name, "params": list(params), "lr": lr} for name, (params, lr) in groups.items()
    ]
    return torch.optim.Adam(
        [group for group in listed if group["params"]],
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        fused=True,
    )


class TrainedModule(L.LightningModule):
    """LightningModule with per-group clipping, a cheap log and a card inside its checkpoints.

    Attributes:
        card: What a checkpoint tells about itself: plain strings and numbers (configuration, stage,
            widths, tracking run), so that it can be read with ``weights_only=True``.
        env_frames: Simulator frames seen so far, over all ranks: the x-axis of every curve of
            fine-tuning. None in pre-training, where the x-axis counts updates.
    """

    def __init__(self, optimizer: OptimizerConfig) -> None:
        super().__init__()
        self.optimizer_cfg = optimizer
        self.card: dict[str, Any] = {}
        self.env_frames: int | None = None

    @property
    def log_due(self) -> bool:
        """Whether this update is one that Lightning hands to the logger; the others log nothing.

        Collecting twenty metrics costs as much as a fifth of a tiny update.
        """
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return (self.trainer.global_step + 1) % every == 0

    def log_terms(self, prefix: str, terms: Mapping[str, Tensor]) -> None:
        """Log named scalars under ``prefix`` if this update is due."""
        if self.log_due:
            self.log_dict({f"{prefix}/{name}": value for name, value in terms.items()})
            if self.env_frames is not None:
                self.log("env_frames", float(self.env_frames))
                self.log("step", float(self.env_frames))  # Lightning takes it as the x-axis

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any
    ) -> None:
        """Clip the gradient of each named group to its own global norm."""
        norms: dict[str, Tensor] = {}
        for group in optimizer.param_groups:
            norms[group["name"]] = nn.utils.clip_grad_norm_(
                group["params"], self.optimizer_cfg.max_grad_norm, foreach=True
            )
        if self.log_due:
            self.log_dict({f"grad_norm/{name}": norm for name, norm in norms.items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the card and the counters into the checkpoint."""
        checkpoint["mapo"] = dict(self.card)
        if self.env_frames is not None:
            checkpoint["mapo"]["env_frames"] = self.env_frames

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the counters back when a run resumes."""
        if self.env_frames is not None:
            self.env_frames = int(checkpoint["mapo"]["env_frames"])
