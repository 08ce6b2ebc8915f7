"""Gradients, Adam with and without decoupled weight decay, clipping by name, rates over a phase."""

from __future__ import annotations

import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mapo_lightning.config.compose import compose
from mapo_lightning.models.interfaces import AgentLoss
from mapo_lightning.run.build import build_finetune
from mapo_lightning.run.config import RunConfig
from mapo_lightning.run.step_check import batch_of
from mapo_lightning.training.base_module import TrainedModule, named_adam
from mapo_lightning.training.finetune import FinetuneModule, differentiated
from mapo_lightning.training.settings import OptimizerConfig, PhaseConfig
from mapo_lightning.types import Batch, ConfigError

CONF = Path(__file__).parents[2] / "conf"


class Words(nn.Module):
    """One of each kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(3, 2), nn.Linear(2, 3)
        self.norm, self.conv = nn.LayerNorm(2), nn.Conv2d(1, 1, 1)
        self.codes = nn.Parameter(torch.ones(2, 2))


def test_only_weights_of_products_and_convolutions_decay() -> None:
    model = Words()
    cfg = OptimizerConfig(weight_decay=0.01, decoupled=True)
    optimizer = named_adam({"all": (model.parameters(), 0.5)}, cfg, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    names = {id(p): n for n, p in model.named_parameters()}
    found = {g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in optimizer.param_groups}
    assert found[0.01] == {"head.weight", "conv.weight"}
    assert len(found[0.0]) == 6
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # without a gradient only decay moves: by rate times decay
    for name, p in model.named_parameters():
        share = 1 - 0.5 * 0.01 if name in found[0.01] else 1.0
        torch.testing.assert_close(p.detach(), before[name] * share)


def test_without_it_decay_is_a_part_of_the_gradient() -> None:
    model = nn.Linear(1, 1)
    optimizer = named_adam({"a": (model.parameters(), 0.1)}, OptimizerConfig(), model)
    assert type(optimizer) is torch.optim.Adam
    assert [g["name"] for g in optimizer.param_groups] == ["a"]


class Clipped(TrainedModule):
    def __init__(self, norm: float) -> None:
        super().__init__(OptimizerConfig(max_grad_norm=norm))
        self.one, self.two, self.codes = (nn.Parameter(torch.zeros(1)) for _ in range(3))
        for p, grad in ((self.one, 3.0), (self.two, 4.0), (self.codes, 12.0)):
            p.grad = torch.tensor([grad])

    def clip(self) -> dict[str, float]:
        # Two groups of one name, as decoupled weight decay makes them.
        groups: list[dict[str, Any]] = [
            {"name": "lower", "params": [p]} for p in (self.one, self.two)
        ]
        return {name: float(norm) for name, norm in self._clip(groups).items()}


def grads(*parameters: nn.Parameter) -> list[Tensor | None]:
    return [p.grad for p in parameters]


def test_groups_of_one_name_are_clipped_together() -> None:
    module = Clipped(1.0)
    assert module.clip() == {"grad_norm/lower": 5.0}
    assert [float(g) for g in grads(module.one, module.two) if g is not None] == pytest.approx(
        [0.6, 0.8], rel=1e-5
    )
    assert float(module.codes.grad or 0) == 12.0


def test_what_is_clipped_along_counts_and_shrinks() -> None:
    module = Clipped(1.0)
    module.clipped_along = {"lower": [module.codes]}
    assert module.clip() == {"grad_norm/lower": 13.0}
    assert float(module.codes.grad or 0) == pytest.approx(12 / 13, rel=1e-5)


def test_a_norm_of_zero_clips_nothing() -> None:
    module = Clipped(0.0)
    assert module.clip() == {"grad_norm/lower": 5.0}
    assert float(module.two.grad or 0) == 4.0
    with pytest.raises(ConfigError, match="max_grad_norm must be finite and not negative, got -1"):
        OptimizerConfig(max_grad_norm=-1.0)


def test_rates_rise_and_fall() -> None:
    cfg = PhaseConfig(updates=110, warmup=10, schedule="cosine")
    assert [cfg.rate(n) for n in (0, 5, 10)] == [0.0, 0.5, 1.0]
    assert cfg.rate(60) == pytest.approx(0.5)
    assert cfg.rate(35) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert cfg.rate(110) == pytest.approx(0.0)
    assert cfg.rate(500) == pytest.approx(0.0)
    assert PhaseConfig(warmup=2).rate(10**9) == 1.0
    assert PhaseConfig().rate(0) == 1.0


def finetuning(*words: str) -> tuple[FinetuneModule, Batch]:
    cfg = compose([*words], RunConfig, CONF).config
    torch.manual_seed(0)
    return build_finetune(cfg, 3, None)[0], batch_of(cfg, 2, 8, 3)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


PUBLISHED = ["mapo", "contextwm", "apv", "prelar", "dreamerv2", "ivideogpt"]


@pytest.mark.parametrize("method", PUBLISHED)
def test_two_backwards_give_the_gradients_of_one(method: str) -> None:
    """The world model's come first, so that memory is free when the agent dreams."""
    perceptual = ["token_world.lpips=false"] if method == "ivideogpt" else []
    (module, batch), (plain, _) = (finetuning(f"method={method}", *perceptual) for _ in range(2))
    torch.manual_seed(1)
    total, terms = module.losses(batch)
    total.backward()
    torch.manual_seed(1)
    fit = plain.world_model.loss(batch)
    losses = plain.agent.losses(plain.world_model, fit, batch).losses
    together = fit.total + sum(losses.values())
    together.backward()
    torch.testing.assert_close(total, together)
    torch.testing.assert_close(terms["world_model"], fit.total.detach(), rtol=0.0, atol=0.0)
    assert gradients(module).keys() == gradients(plain).keys()
    torch.testing.assert_close(gradients(module), gradients(plain), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("updates", [1, 2])
def test_what_the_images_left_is_gone_before_the_agent_dreams(
    updates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, batch = finetuning("method=mapo", f"finetune.agent_updates={updates}")
    optimizer = module.configure_optimizers()["optimizer"]
    monkeypatch.setattr(module, "optimizers", lambda **_: optimizer)
    kept: list[weakref.ref[Box]] = []
    alive: list[int] = []

    class Box:
        """What autograd keeps of a tensor."""

        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            kept.append(weakref.ref(self))

    learn = module.agent.losses

    def losses(*args: Any) -> AgentLoss:
        alive.append(sum(ref() is not None for ref in kept))
        return learn(*args)

    monkeypatch.setattr(module.agent, "losses", losses)
    with torch.autograd.graph.saved_tensors_hooks(Box, lambda box: box.tensor):
        module.losses(batch)
    assert len(kept) > 50
    assert alive[0] == 0
    assert len(alive) == updates


def test_known_gradients_are_scaled_and_leave_others_alone() -> None:
    a, b, idle = (torch.tensor(x, requires_grad=True) for x in (2.0, 3.0, 5.0))
    fixed = torch.tensor(7.0)
    seen: list[Tensor] = []
    a.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    loss = differentiated(a * a * b, [a, b, idle, fixed])
    assert (a.grad, b.grad) == (None, None)
    (2.0 * loss + a).backward()
    assert (loss.item(), a.grad, b.grad, idle.grad) == (12.0, 25.0, 8.0, None)
    assert seen == [25.0]
