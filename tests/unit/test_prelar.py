"""PreLAR's parts (facts 7.4): inferred actions, consistency in both presets, ablations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import image
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from mapo_lightning.config.compose import compose
from mapo_lightning.models.distributions import categorical_kl
from mapo_lightning.models.rssm_world.action_source import InverseAction, PaddedAction
from mapo_lightning.models.rssm_world.consistency import (
    LatentAction,
    consistency,
    gaussian_kl,
    order_loss,
)
from mapo_lightning.models.rssm_world.rssm import RSSM, RSSMState
from mapo_lightning.models.rssm_world.settings import ImageConfig, RSSMConfig, SourceConfig
from mapo_lightning.run.build import build_finetune, build_pretrain
from mapo_lightning.run.config import RunConfig
from mapo_lightning.training.checkpoint import load_pretrained
from mapo_lightning.types import Batch, ConfigError

CONF = Path(__file__).parents[2] / "conf"
SMALL = [image("published")]


def configured(*words: str) -> RunConfig:
    return compose([*words, *SMALL], RunConfig, CONF).config


def clips(batch: int = 4, steps: int = 5) -> Batch:
    first = torch.zeros(batch, steps, dtype=torch.bool)
    first[:, 0] = True
    obs = torch.randint(0, 256, (batch, steps, 64, 64, 3), dtype=torch.uint8)
    return {"obs": obs, "is_first": first}


def test_gaussian_kl_equals_torch_distributions_in_float64() -> None:
    p, q = (Normal(torch.randn(3, 5).double(), torch.rand(3, 5).double() + 0.1) for _ in "pq")
    expected = kl_divergence(p, q).sum(-1)
    torch.testing.assert_close(gaussian_kl(p.mean, p.stddev, q.mean, q.stddev), expected)


def test_inferred_actions_against_the_written_out_formulas() -> None:
    """std = 2·sigmoid(raw / 2), no floor; T - 1 actions, zero first; KL to N(0, 1.245²)."""
    torch.manual_seed(0)
    source = InverseAction(ImageConfig(channels=[4, 8, 16], layers=1), SourceConfig(width=6), 32)
    batch = clips()
    driven = source.eval()(batch)
    frames = batch["obs"].permute(0, 1, 4, 2, 3).float() / 255 - 0.5
    pairs = torch.cat([frames[:, :-1], frames[:, 1:]], dim=2).flatten(0, 1)
    raw = source.infer(source.encoder(pairs)).double().view(4, 4, 12)
    mean, std = raw[..., :6], 2 / (1 + torch.exp(-raw[..., 6:] / 2))
    assert driven.latent is not None
    torch.testing.assert_close(driven.latent.mean.double(), mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(driven.latent.std.double(), std, atol=1e-5, rtol=1e-4)
    assert bool((driven.action[:, 0] == 0).all())
    assert torch.equal(driven.action[:, 1:], driven.latent.sample)
    prior = Normal(
        torch.zeros_like(std), torch.full_like(std, 2 / (1 + torch.exp(torch.tensor(-0.5))))
    )
    expected = kl_divergence(Normal(mean, std), prior).sum(-1).mean().detach()
    rssm = RSSM(RSSMConfig(deter=6, hidden=7, stoch=4, classes=5), 6, 8)
    post, prior_logits = rssm.observe(driven.action, torch.randn(4, 5, 8), batch["is_first"])
    losses = source.losses(driven, rssm, post, prior_logits)
    assert set(losses) == set(source.terms)
    assert float(losses["latent_action_kl"].detach()) == pytest.approx(float(expected), rel=1e-4)
    still = InverseAction(
        ImageConfig(channels=[4, 8, 16], layers=1), SourceConfig(sampled=False), 32
    )
    found = still(batch).latent
    assert found is not None
    assert torch.equal(found.sample, found.mean)


def orders(state: list[float], action: list[float], smooth: bool) -> float:
    """The order loss, pair by pair, in Python's float64."""
    n, total = len(state), 0.0
    scale = sum(abs(a - b) for a in action for b in action) / n**2
    for i in range(n):
        for j in range(n):
            told = (state[i] > state[j]) - (state[i] < state[j])
            x = action[i] - action[j]
            said = (
                float(torch.tensor(x / scale, dtype=torch.float64).tanh())
                if smooth
                else (x > 0) - (x < 0)
            )
            total += (said - told) ** 2
    return total / n**2


def test_published_consistency_is_a_value_without_gradient() -> None:
    torch.manual_seed(0)
    state, action = torch.rand(9).double(), torch.rand(9).double().requires_grad_()
    loss = order_loss("published", state, action)
    assert float(loss.detach()) == pytest.approx(orders(state.tolist(), action.tolist(), False))
    loss.backward()
    assert action.grad is not None
    assert bool((action.grad == 0).all())


def test_fixed_consistency_has_a_gradient_that_repairs_the_order() -> None:
    torch.manual_seed(0)
    state, action = torch.rand(9).double(), torch.rand(9).double().requires_grad_()
    loss = order_loss("fixed", state, action)
    assert float(loss.detach()) == pytest.approx(orders(state.tolist(), action.tolist(), True))
    assert torch.autograd.gradcheck(lambda a: order_loss("fixed", state, a), (action,))
    moved = action.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([moved], lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        order_loss("fixed", state, moved).backward()
        optimizer.step()
    assert float(order_loss("published", state, moved.detach())) == 0.0
    assert torch.equal(moved.argsort(), state.argsort())


def test_fixed_consistency_ignores_scale_and_survives_equal_actions() -> None:
    state, action = torch.rand(9).double(), torch.rand(9).double().requires_grad_()
    loss = order_loss("fixed", state, action)
    torch.testing.assert_close(order_loss("fixed", state, 100 * action), loss)
    loss.backward()
    assert action.grad is not None
    assert float((action.grad * action.detach()).sum()) == pytest.approx(0.0, abs=1e-12)
    same = torch.zeros(9, requires_grad=True)
    order_loss("fixed", state.float(), same).backward()
    assert same.grad is not None
    assert bool(torch.isfinite(same.grad).all())


@pytest.mark.parametrize("kind", ["published", "fixed"])
def test_consistency_compares_what_another_clips_action_would_change(kind: str) -> None:
    torch.manual_seed(0)
    rssm = RSSM(RSSMConfig(deter=6, hidden=7, stoch=4, classes=5), 3, 8)
    batch = clips(4, 5)
    mean, std = torch.randn(4, 4, 3), torch.rand(4, 4, 3) + 0.5
    latent = LatentAction(mean, std, mean + std * torch.randn(4, 4, 3))
    action = torch.nn.functional.pad(latent.sample, (0, 0, 1, 0))
    post, prior = rssm.observe(action, torch.randn(4, 5, 8), batch["is_first"])
    torch.manual_seed(5)
    got = consistency(kind, latent, rssm, post, prior)  # type: ignore[arg-type]
    torch.manual_seed(5)
    order = torch.randperm(4)
    state, actions = [], []
    for b in range(4):
        for t in range(4):
            before = RSSMState(*(x[b : b + 1, t] for x in post))
            noise = torch.rand(1, 4)
            own, other = (
                rssm.imagine_step(before, latent.sample[i, t][None], noise).logits
                for i in (b, int(order[b]))
            )
            state.append(float(categorical_kl(own, other).detach()))
            a, z = (Normal(mean[i, t].double(), std[i, t].double()) for i in (b, int(order[b])))
            actions.append(float(kl_divergence(a, z).sum()))
    assert float(got.detach()) == pytest.approx(orders(state, actions, kind == "fixed"), abs=0.02)


def gradients(method: str, scale: float) -> dict[str, Tensor]:
    torch.manual_seed(0)
    module = build_pretrain(
        configured(f"method={method}", f"pretrain.objective.scales.consistency={scale}")
    )
    batch = clips()
    torch.manual_seed(1)
    module.world_model.loss(batch).total.backward()
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_the_published_preset_trains_as_if_the_term_were_not_there_and_the_fixed_one_does_not() -> (
    None
):
    with_it, without = gradients("prelar", 1.0), gradients("prelar", 0.0)
    assert all(torch.equal(g, without[name]) for name, g in with_it.items())
    with_it, without = gradients("prelar_fixed", 1.0), gradients("prelar_fixed", 0.0)
    moved = {name.split(".")[1] for name, g in with_it.items() if not torch.equal(g, without[name])}
    assert moved == {"source"}  # what the state changes by is only looked at
    assert all(bool(torch.isfinite(g).all()) for g in with_it.values())


@pytest.mark.slow
@pytest.mark.parametrize("of", ["prelar", "apv"])
def test_fine_tuning_takes_the_dynamics_over_and_drops_the_video_action_network(of: str) -> None:
    """Facts 7.4; from APV it is the naive variant, true actions in a slot that held zeros."""
    videos = build_pretrain(configured(f"method={of}"))
    stored = {"state_dict": videos.state_dict(), "mapo": {"method": of}}
    naive = ["world_model.source.kind=null", "world_model.source.width=50"] if of == "apv" else []
    cfg = configured("method=prelar", "env=toy", *naive)
    module, _ = build_finetune(cfg, 2, None)
    report = load_pretrained(module.world_model, stored, cfg.finetune.load)
    assert report.loaded == ("encoder", "lower", "decoder")
    assert module.world_model.upper is None
    if of == "prelar":
        assert "source" in report.ignored
        assert "source" in report.fresh
    else:
        assert isinstance(module.world_model.source, PaddedAction)
        driven = module.world_model.source({"action": torch.ones(1, 3, 2)}).action
        assert driven.sum(-1).tolist() == [[2.0, 2.0, 2.0]]
    assert torch.equal(module.world_model.lower.inp.weight, videos.world_model.lower.inp.weight)


def test_combinations_that_could_not_act_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"source\.kind is semantic; set it to inverse or null"):
        configured("method=prelar", "world_model.source.kind=semantic")
    with pytest.raises(
        ConfigError, match=r"12 numbers but world_model\.source\.width leaves room for 8"
    ):
        PaddedAction(12, 8)
    with pytest.raises(ConfigError, match=r"freeze names decodr, but .* decoder, "):
        build_finetune(configured("method=mapo", "env=toy", "finetune.freeze=[decodr]"), 2, None)


def test_frozen_parts_keep_their_weights() -> None:
    cfg = configured("method=apv", "env=toy", "finetune.freeze=[encoder,decoder]")
    module, _ = build_finetune(cfg, 2, None)
    kept = {
        n.split(".")[1]
        for n, p in module.world_model.named_parameters(prefix="w")
        if not p.requires_grad
    }
    assert kept == {"encoder", "decoder"}
