"""Every method at ``size=paper`` against the published systems (facts 2.1, 2.5, 3, 4, 7.4).

Models are built on the ``meta`` device, which holds shapes and no numbers.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from mapo_lightning.config.compose import compose
from mapo_lightning.models.rssm_world.decoder import build_decoder
from mapo_lightning.models.rssm_world.encoder import build_encoder
from mapo_lightning.models.rssm_world.rssm import RSSM, NormedGRU
from mapo_lightning.models.rssm_world.settings import ContextConfig, ImageConfig, RSSMConfig
from mapo_lightning.run.build import build_finetune, build_pretrain
from mapo_lightning.run.config import RunConfig
from mapo_lightning.semantics.factory import semantic_dim

CONF = Path(__file__).parents[2] / "conf"
RESNET, HEAD = 1_562_112, 1_301_201
LOWER_NULL, LOWER_64 = 14_745_600, 14_759_936
UPPER, UPPER_CONCAT = 13_697_024, 16_842_752
DECODER, DECODER_CONTEXT = 7_519_227, 7_779_003

MAPO = {
    "encoder": RESNET,
    "context": RESNET,
    "lower": LOWER_64,
    "upper": UPPER_CONCAT,
    "decoder": DECODER_CONTEXT,
    "heads": 2 * HEAD,
}

# method, environment, dimensions of its action -> parts of the fine-tuning model
PUBLISHED = {
    ("mapo", "dmc/walker_run", 6): MAPO,
    ("mapo_no_cvq", "dmc/walker_run", 6): MAPO,
    ("mapo", "metaworld/door-open", 4): {"lower": LOWER_64, "upper": UPPER},
    ("contextwm", "metaworld/door-open", 4): {
        "encoder": RESNET,
        "context": RESNET,
        "source": 0,
        "lower": LOWER_NULL,
        "upper": UPPER,
        "decoder": DECODER_CONTEXT,
        "heads": 2 * HEAD,
    },
    ("apv", "dmc/quadruped_run", 12): {
        "encoder": RESNET,
        "source": 0,
        "lower": LOWER_NULL,
        "upper": UPPER_CONCAT,
        "decoder": DECODER,
        "heads": HEAD,
    },
    ("prelar", "metaworld/door-open", 4): {
        "encoder": RESNET,
        "source": 70_720,
        "lower": LOWER_64,
        "decoder": DECODER,
        "heads": 2 * HEAD,
    },
    ("dreamerv2", "dmc/walker_run", 6): {
        "encoder": 1_551_312,
        "decoder": 11_152_275,
        "heads": HEAD,
    },
}


def configured(*words: str) -> RunConfig:
    return compose(words, RunConfig, CONF).config


def counts(module: nn.Module) -> dict[str, int]:
    return {name: sum(p.numel() for p in m.parameters()) for name, m in module.named_children()}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "env", "action"), PUBLISHED)
def test_parts_have_the_published_parameter_counts(method: str, env: str, action: int) -> None:
    cfg = configured(f"method={method}", "size=paper", f"env={env}")
    with torch.device("meta"):
        module, _ = build_finetune(cfg, action, None)
    found = counts(module.world_model)
    published = PUBLISHED[method, env, action]
    assert {name: found[name] for name in published} == published
    agent = counts(module.agent)
    assert agent["critic"] == agent["target"] == HEAD
    assert agent["actor"] == HEAD + (2 * action - 1) * 401
    if action == 6:
        assert agent["actor"] == 1_305_612


def test_the_official_dreamerv2_has_its_counts() -> None:
    cfg = configured("method=dreamerv2", "size=dreamerv2_official", "env=dmc/walker_run")
    with torch.device("meta"):
        module, _ = build_finetune(cfg, 6, None)
    found = counts(module.world_model)
    assert (found["upper"], found["encoder"], found["decoder"]) == (1_247_248, 1_551_312, 9_886_611)
    assert module.world_model.feat_dim == 1224
    assert cfg.replay.capacity == 2_000_000


@pytest.mark.slow
def test_pre_training_models_have_no_more_than_what_they_hand_on_or_drop() -> None:
    for method, source in (("mapo", None), ("contextwm", 0), ("apv", 0), ("prelar", 4_841_360)):
        cfg = configured(f"method={method}", "size=paper")
        with torch.device("meta"):
            found = counts(build_pretrain(cfg).world_model)
        assert found["heads"] == 0
        assert "upper" not in found
        assert found["source"] == (64 * (semantic_dim(cfg.vlm) + 1) if source is None else source)


LATE = ["upper", "decoder", "heads"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "groups"),
    [
        ("contextwm", {"lower": ["encoder", "context", "lower"], "model": LATE}),
        ("mapo", {"lower": ["encoder", "context", "source", "lower"], "model": LATE}),
        ("prelar", {"lower": ["encoder", "lower"], "model": ["source", "decoder", "heads"]}),
        ("dreamerv2", {"model": ["encoder", *LATE]}),
    ],
)
def test_the_world_model_has_two_groups_with_learning_rates_and_clip_norms_of_their_own(
    method: str, groups: dict[str, list[str]]
) -> None:
    """Facts 2.5: "enc_model" and "model", each clipped to 100; Adam as in facts 4."""
    cfg = configured(f"method={method}", "env=metaworld/door-open", "size=tiny")
    module, _ = build_finetune(cfg, 4, None)
    made = module.configure_optimizers()
    optimizer = made["optimizer"] if isinstance(made, dict) else made
    held = {group["name"]: group for group in optimizer.param_groups}
    assert set(held) == {*groups, "actor", "critic"}
    for name, parts in groups.items():
        wanted = {
            id(p) for part in parts for p in module.world_model.get_submodule(part).parameters()
        }
        assert {id(p) for p in held[name]["params"]} == wanted
        assert (held[name]["eps"], held[name]["weight_decay"]) == (1e-5, 1e-6)
        assert held[name]["betas"] == (0.9, 0.999)
    for p in module.parameters():
        p.grad = torch.full_like(p, 1e3)
    module.__dict__["_trainer"] = SimpleNamespace(log_every_n_steps=50, global_step=0)
    module.configure_gradient_clipping(optimizer)
    norms = {
        name: float(torch.stack([p.grad.double().norm() for p in group["params"]]).norm())
        for name, group in held.items()
    }
    assert norms == pytest.approx(dict.fromkeys(held, 100.0), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "held"),
    [
        (["method=contextwm", "env=metaworld/door-open"], 100),
        (["method=prelar", "env=metaworld/door-open"], 100),
        (["method=prelar", "env=dmc/walker_run"], 100),
        (["method=contextwm", "env=dmc/walker_run"], 0),
    ],
)
def test_the_lower_learning_rate_is_zero_for_the_first_updates(words: list[str], held: int) -> None:
    """Facts 2.5: on Meta-World 100 updates at zero, then 3e-4; on DMC 3e-4 from the start."""
    cfg = configured(*words, "size=paper")
    with torch.device("meta"):
        module, _ = build_finetune(cfg, 4, None)
    made = module.configure_optimizers()
    if not held:
        assert not isinstance(made, dict)
        assert {g["name"]: g["lr"] for g in made.param_groups}["lower"] == 3e-4
        return
    scheduler, rates = made["lr_scheduler"]["scheduler"], []
    for _ in range(held + 2):
        rates.append({g["name"]: g["lr"] for g in made["optimizer"].param_groups})
        made["optimizer"].step()  # no gradients: nothing moves
        scheduler.step()
    assert [r["lower"] for r in rates] == [0.0] * held + [3e-4] * 2
    assert {r["model"] for r in rates} == {3e-4}
    assert {r["actor"] for r in rates} == {r["critic"] for r in rates} == {8e-5}


def test_gru_against_its_equations_in_float64() -> None:
    """Facts 2.2: norm eps 1e-3; order reset, candidate, update; update bias -1; a bias."""
    torch.manual_seed(0)
    cell = NormedGRU(3, 4)
    nn.init.normal_(cell.norm.weight)
    nn.init.normal_(cell.norm.bias)
    x, h = torch.randn(5, 3), torch.randn(5, 4)
    w = {name: p.detach().double() for name, p in cell.named_parameters()}
    p = torch.cat([x, h], 1).double() @ w["linear.weight"].T + w["linear.bias"]
    p = (p - p.mean(1, keepdim=True)) / (p.var(1, unbiased=False, keepdim=True) + 1e-3).sqrt()
    p = p * w["norm.weight"] + w["norm.bias"]
    r, c, u = p[:, :4], p[:, 4:8], p[:, 8:]
    u = 1 / (1 + (-(u - 1)).exp())
    c = torch.tanh(c / (1 + (-r).exp()))
    torch.testing.assert_close(
        cell(x, h).double(), u * c + (1 - u) * h.double(), rtol=1e-5, atol=1e-6
    )


def bound(weight: Tensor) -> float:
    return float(weight.detach().abs().max())


def test_initialisation_is_xavier_outside_and_torch_defaults_inside() -> None:
    """Facts 3.5: Xavier-uniform for layers made directly; defaults in stacks, attention and GRU."""
    torch.manual_seed(0)
    image = ImageConfig(channels=[16, 32, 64])
    rssm = RSSM(RSSMConfig(deter=64, hidden=64, stoch=8, classes=8), 6, 128)
    encoder = build_encoder(image)
    decoder = build_decoder(image, 128, ContextConfig(kind="features"))
    direct = [rssm.inp, rssm.prior[0], rssm.prior[2], rssm.posterior[0], rssm.posterior[2]]
    for layer in [*direct, encoder.convin, decoder.convin, decoder.convout]:
        fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(layer.weight)
        assert bound(layer.weight) == pytest.approx((6 / (fan_in + fan_out)) ** 0.5, rel=2e-2)
        assert bound(layer.bias) == 0.0
    conv = encoder.stages[1][0].residual[0]
    for weight in (conv.weight, rssm.cell.linear.weight, decoder.attention["8"].out.weight):
        fan_in, _ = nn.init._calculate_fan_in_and_fan_out(weight)
        assert bound(weight) == pytest.approx(fan_in**-0.5, rel=2e-2)
    assert bound(rssm.cell.linear.bias) > 0.0
    attention = decoder.attention["8"]
    assert bound(attention.in_weight) == pytest.approx((6 / (4 * 64)) ** 0.5, rel=2e-2)
    assert bound(attention.query_position) == bound(attention.key_position) == 0.0
