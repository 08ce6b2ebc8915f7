"""The world model's own terms, recomputed from its states in float64 (facts 2.3, 3.5, 4, 4.1)."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from networks import NETWORKS, image
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from mapo_lightning.config.compose import compose
from mapo_lightning.models.distributions import one_hot_sample
from mapo_lightning.models.rssm_world.context import NO_CONTEXT
from mapo_lightning.run.build import build_finetune
from mapo_lightning.run.config import RunConfig
from mapo_lightning.types import Batch

CONF = Path(__file__).parents[2] / "conf"
WORDS = ["world_model.bonus.neighbours=4"]


def experience(side: int, action: int = 3, shape: tuple[int, int] = (2, 7)) -> Batch:
    first = torch.zeros(shape, dtype=torch.bool)
    first[:, 0] = True
    return {
        "obs": torch.randint(0, 256, (*shape, side, side, 3), dtype=torch.uint8),
        "is_first": first,
        "action": torch.rand(*shape, action) * 2 - 1,
        "reward": torch.randn(shape),
        "is_terminal": torch.zeros(shape, dtype=torch.bool),
    }


@pytest.mark.slow
@pytest.mark.parametrize("networks", NETWORKS)
@pytest.mark.parametrize("method", ["apv", "prelar", "dreamerv2"])
def test_terms_of_the_loss_against_their_formulas_in_float64(method: str, networks: str) -> None:
    torch.manual_seed(0)
    extra = (
        []
        if method == "dreamerv2"
        else ["world_model.aux_reward=true", "finetune.objective.scales.aux_reward=0.5"]
    )
    words = [f"method={method}", "env=dmc/walker_run", "finetune.objective.kl=0.3", *WORDS, *extra]
    words.append(image(networks, method))
    cfg = compose(words, RunConfig, CONF).config
    model = build_finetune(cfg, 3, None)[0].world_model
    side = cfg.env.size
    batch, bonus = experience(side), copy.deepcopy(model.bonus)
    fit = model.loss(batch)
    feat = fit.belief.feat.detach()
    terms: dict[str, Tensor] = {}

    mean = model.decoder(feat.flatten(0, 1), NO_CONTEXT.maps).double().view(2, 7, 3, side, side)
    truth = batch["obs"].permute(0, 1, 4, 2, 3).double() / 255 - 0.5
    terms["image"] = (
        sum(0.5 * (truth[b, t] - mean[b, t]).pow(2).sum() for b in range(2) for t in range(7)) / 14
    )

    heads, reward = model.heads.double(), batch["reward"].double()
    target = reward
    if bonus is not None:
        lower = fit.belief.lower.feat if method == "apv" else model.float().follow(batch).embed
        heads = model.heads.double()
        target = reward[:, :3] + 0.1 * bonus(lower.detach()).double()  # T - 4 windows; beta on DMC
        terms["aux_reward"] = (
            0.5 * (heads["aux_reward"](feat.double())[..., 0] - reward).pow(2).mean()
        )
    said = heads["reward"](feat.double())[:, : target.shape[1], 0]
    terms["reward"] = 0.5 * (said - target).pow(2).mean()
    for name, value in terms.items():
        assert float(fit.log[name]) == pytest.approx(float(value.detach()), rel=1e-4), name

    weights = cfg.finetune.objective.scales
    total = sum(
        weights[n] * (0.3 if n.startswith("kl") else 1.0) * float(fit.log[n]) for n in weights
    )
    assert float(fit.total.detach()) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("free", [0.0, 1.0, 50.0])
def test_kl_terms_are_balanced_and_averaged_before_the_free_nats(free: float) -> None:
    torch.manual_seed(0)
    words = ["method=apv", "env=dmc/walker_run", f"finetune.objective.free_nats={free}", *WORDS]
    cfg = compose([*words, image("tiny")], RunConfig, CONF).config
    model = build_finetune(cfg, 3, None)[0].world_model
    batch = experience(cfg.env.size)
    torch.manual_seed(3)
    log = model.loss(batch).log
    torch.manual_seed(3)
    for name, (post, prior) in model.follow(batch).prior.items():
        p, q = (Categorical(logits=x.detach().double()) for x in (post.logits, prior))
        per_step = kl_divergence(p, q).sum(-1)  # over the categoricals
        value = max(float(per_step.mean()), free)
        assert float(log[f"kl_{name}"]) == pytest.approx(0.2 * value + 0.8 * value, rel=1e-4)


def test_straight_through_samples_in_float64() -> None:
    """sample + probs - sg(probs): the value is one-hot, the gradient that of the softmax."""
    torch.manual_seed(0)
    logits, weight = torch.randn(5, 6, requires_grad=True), torch.randn(5, 6)
    sample = one_hot_sample(logits, torch.rand(5))
    assert torch.equal(sample.detach().round().sum(-1), torch.ones(5))
    (sample * weight).sum().backward()
    p = logits.detach().double().softmax(-1)
    w = weight.double()
    expected = p * (w - (p * w).sum(-1, keepdim=True))
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), expected, rtol=1e-4, atol=1e-6)
