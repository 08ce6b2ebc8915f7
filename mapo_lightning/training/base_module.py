"""What both Lightning modules share: named optimiser groups, clipped one by one, a light log."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from mapo_lightning.training.cuda_graph import Captured, Recorder
from mapo_lightning.training.finite import (
    TOTAL,
    FiniteWatch,
    broken_weights,
    refuse_broken_weights,
)
from mapo_lightning.training.log_due import Place, log_due, log_now
from mapo_lightning.training.settings import OptimizerConfig
from mapo_lightning.types import Batch, DivergedError


def named_adam(
    groups: Mapping[str, tuple[Iterable[nn.Parameter], float]],
    cfg: OptimizerConfig,
    model: nn.Module,
) -> torch.optim.Adam:
    """One fused Adam with a named group per part: name -> (parameters, learning rate).

    With ``cfg.decoupled``, the parameters of a part that do not decay follow in a second group of
    the same name.

    Args:
        groups: The parts.
        cfg: Adam's numbers.
        model: Module that holds them all.
    """
    listed = [
        {"name": name, "params": list(params), "lr": lr} for name, (params, lr) in groups.items()
    ]
    kind: type[torch.optim.Adam] = torch.optim.Adam
    if cfg.decoupled:
        kind = torch.optim.AdamW
        listed = [part for group in listed for part in _by_decay(group, cfg.weight_decay, model)]
    return kind(
        [group for group in listed if group["params"]],
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        fused=True,
    )


def _by_decay(group: dict[str, Any], decay: float, model: nn.Module) -> list[dict[str, Any]]:
    """Split a group: weights of products and convolutions decay, all else does not."""
    products = (m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    decaying = {id(m.weight) for m in products}
    shares = [p for p in group["params"] if id(p) in decaying]
    others = [p for p in group["params"] if id(p) not in decaying]
    return [group | {"params": shares}, group | {"params": others, "weight_decay": 0.0}]


class TrainedModule(L.LightningModule):
    """LightningModule with per-group clipping, a cheap log and metadata inside its checkpoints.

    Attributes:
        metadata: What a checkpoint tells about itself: plain strings and numbers (configuration,
            stage, widths, tracking run), so that it can be read with ``weights_only=True``.
        env_frames: Simulator frames seen so far, over all ranks: the x-axis of every curve of
            fine-tuning. None in pre-training, where the x-axis counts updates.
        curve: Where the scalars of this update go; see `place`.
        clipped_along: Name of a group -> parameters that it does not have, but whose gradients
            count, and shrink, when its own are clipped.
    """

    def __init__(self, optimizer: OptimizerConfig) -> None:
        super().__init__()
        self.optimizer_cfg = optimizer
        self.metadata: dict[str, Any] = {}
        self.env_frames: int | None = None
        self.curve = Place("", 0)
        self.captured: Captured | None = None
        self.clipped_along: Mapping[str, list[nn.Parameter]] = {}
        self._watch = FiniteWatch()
        self._scalars: dict[str, Tensor] = {}  # of the update under way, until they are watched

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar to back-propagate, and detached scalars to log, of one batch."""
        raise NotImplementedError

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """One update; Lightning does the rest of it unless it is captured."""
        due = self.log_due  # of this update: the captured one counts before it is logged
        self.curve = self.place(self.trainer.global_step + 1)
        if self.captured is None:
            total, terms = self.losses(batch)
            found = _named("train", terms)
            self._scalars |= found | {TOTAL: total}
        else:
            total, found = None, self._replayed(batch, self.captured)
        if due:
            if self.env_frames is not None:
                found["env_frames"] = torch.tensor(float(self.env_frames))
            log_now(self, found)
        return total

    def place(self, updates: int) -> Place:
        """Where in the curves stands what is found out after so many updates.

        The x-axis counts updates, the newest included, or the simulator frames seen so far. A curve
        has one of the two: what happens while no frame is added has an axis of updates, and a name
        of its own.
        """
        return Place("", updates if self.env_frames is None else self.env_frames)

    def _replayed(self, batch: Batch, captured: Captured) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.step(closure=lambda: found.update(captured(batch)))
        schedule = self.lr_schedulers()
        if isinstance(schedule, torch.optim.lr_scheduler.LRScheduler):
            schedule.step()
        return found

    def capture(self, recorder: Recorder) -> None:
        """Replay a recording of losses, backward and clipping in all updates but the first few."""
        self.automatic_optimization = False
        self.captured = Captured(self._captured_gradients, recorder)

    def gradients(self, batch: Batch, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Losses, backward and clipping; returns what there is to log, by full name.

        In a recording the gradients are new tensors of the graph, whose memory every replay fills
        again. Adam, outside, reads them there: nothing else may set them to None.
        """
        optimizer.zero_grad(set_to_none=True)
        total, terms = self.losses(batch)
        with torch.autocast(total.device.type, enabled=False):
            total.backward()  # type: ignore[no-untyped-call]
        found = _named("train", terms)
        self._scalars |= found | {TOTAL: total}
        norms = self._clip(optimizer.param_groups)
        self._watch_update(norms)
        return found | norms

    def _captured_gradients(self, batch: Batch) -> dict[str, Tensor]:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        return self.gradients(batch, optimizer)

    @property
    def log_due(self) -> bool:
        """Whether this update is one that Lightning hands to the logger; the others log nothing.

        Collecting twenty metrics costs as much as a fifth of a tiny update.
        """
        return log_due(self.trainer, counted=False)

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any
    ) -> None:
        """Clip the gradient of each named group to its own global norm."""
        norms = self._clip(optimizer.param_groups)
        self._watch_update(norms)
        if self.log_due:
            log_now(self, norms)

    def _clip(self, groups: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
        together: dict[str, list[nn.Parameter]] = {}
        for group in groups:
            together.setdefault(group["name"], []).extend(group["params"])
        for name, others in self.clipped_along.items():
            together[name] = together.get(name, []) + others
        # To clip at an infinite norm measures it and leaves it as it is.
        limit, norms = self.optimizer_cfg.max_grad_norm or math.inf, dict[str, Tensor]()
        for name, params in together.items():
            # Torch measures no gradients at all as a zero on the CPU, wherever the weights are.
            norm = nn.utils.clip_grad_norm_(params, limit, foreach=True)
            norms[name] = norm.to(params[0].device)
        return _named("grad_norm", norms)

    def _watch_update(self, norms: dict[str, Tensor]) -> None:
        self._watch.add(self._scalars | norms)
        self._scalars = {}

    def check_finite(self) -> None:
        """See on all ranks whether the updates so far had finite losses and gradients.

        Raises:
            DivergedError: They had not.
        """
        self._watch.check()

    def on_train_start(self) -> None:
        """Count updates from here."""
        self._watch.begun = self.trainer.global_step

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop a training that makes no sense any more, where the host waits for values anyway."""
        if log_due(self.trainer):
            self.check_finite()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the metadata and the counters into the checkpoint.

        Raises:
            DivergedError: The weights are worth nothing; the checkpoint before is kept.
        """
        self.check_finite()
        name = broken_weights(checkpoint["state_dict"])
        if name is not None:
            raise DivergedError(
                f"training diverged: '{name}' holds infinite numbers or NaN after update "
                f"{self.trainer.global_step}. The checkpoints so far hold finite weights, and "
                "resume= goes on from the last of them; take a smaller learning rate"
            )
        checkpoint["mapo"] = dict(self.metadata)
        if self.env_frames is not None:
            checkpoint["mapo"]["env_frames"] = self.env_frames

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the counters back when a run resumes.

        Raises:
            CheckpointError: The weights are no finite numbers.
        """
        refuse_broken_weights(checkpoint["state_dict"], "the checkpoint that resume= names")
        if self.env_frames is not None:
            self.env_frames = int(checkpoint["mapo"]["env_frames"])
        # Lightning counts captured updates and others in two places, and begins at zero in the one
        # that the run before did not use.
        loop = checkpoint["loops"]["fit_loop"]
        automatic = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
        manual = loop["epoch_loop.manual_optimization.optim_step_progress"]
        for kind in ("total", "current"):
            made = max(automatic[kind], manual[kind], key=lambda count: count["completed"])
            automatic[kind], manual[kind] = dict(made), dict(made)


def _named(group: str, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{group}/{name}": term for name, term in terms.items()}
