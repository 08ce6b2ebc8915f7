"""A whole step of every method on the meta device, where nothing is computed.

A constant that is made on the CPU, or a moment at which the host reads a value, fails there: this
stands in for a GPU.
"""

from __future__ import annotations

import pytest
import torch
from networks import NETWORKS, RSSM_METHODS, TOKEN_METHODS, backbone

from mapo_lightning.run.build import build_finetune, build_pretrain
from tests.unit.test_methods import configured, small, synthetic

pytestmark = pytest.mark.slow


def started(module: torch.nn.Module) -> None:
    """Codebooks read one flag per process on the host before their first update: skip that."""
    for part in module.modules():
        if hasattr(part, "_must_start"):
            part._must_start = False


@pytest.mark.parametrize("networks", NETWORKS)
@pytest.mark.parametrize("recurrence", ["fused", "plain", "transformer"])
@pytest.mark.parametrize("method", RSSM_METHODS)
def test_a_fine_tuning_step_stays_on_its_device(
    method: str, recurrence: str, networks: str
) -> None:
    words = [f"world_model.recurrence={recurrence}"]
    if recurrence == "transformer":
        words = backbone("transformer", method)
    cfg = small(method, networks, *words, "env=toy")
    batch = {key: value.to("meta") for key, value in synthetic(cfg, 2).items()}
    module = build_finetune(cfg, 2, None)[0].to("meta")
    started(module)
    total, terms = module.losses(batch)
    total.backward()
    assert {total.device.type, *(term.device.type for term in terms.values())} == {"meta"}
    trained = [p for p in module.parameters() if p.requires_grad]
    assert {p.grad.device.type for p in trained if p.grad is not None} == {"meta"}


@pytest.mark.parametrize("networks", NETWORKS)
@pytest.mark.parametrize("method", [m for m in RSSM_METHODS if m != "dreamerv2"])
def test_a_pre_training_step_stays_on_its_device(method: str, networks: str) -> None:
    cfg = small(method, networks, "env=toy")
    batch = {key: value.to("meta") for key, value in synthetic(cfg, 2).items()}
    module = build_pretrain(cfg).to("meta")
    started(module)
    total, _ = module.losses(batch)
    total.backward()
    assert total.device.type == "meta"


@pytest.mark.parametrize("method", TOKEN_METHODS)
def test_updates_of_a_token_world_stay_on_their_device(method: str) -> None:
    """The agent is left out: what it draws from, it looks up on the host."""
    cfg = configured(f"method={method}", "env=toy")
    batch = {key: value.to("meta") for key, value in synthetic(cfg, 2, steps=12).items()}
    worlds = [build_pretrain(cfg, phase).world_model for phase in cfg.pretraining]
    for world in [*worlds, build_finetune(cfg, 2, None)[0].world_model]:
        assert isinstance(world, torch.nn.Module)
        fit = world.to("meta").loss(batch)
        fit.total.backward()
        assert {fit.total.device.type, *(x.device.type for x in fit.log.values())} == {"meta"}


def test_groups_without_gradients_have_norms_on_their_device() -> None:
    """As of frozen parts; a norm on the CPU cannot be counted beside the others."""
    cfg = small("mapo", NETWORKS[0], "env=toy")
    module = build_finetune(cfg, 2, None)[0].to("meta")
    groups = {**module.world_model.groups(), **module.agent.groups()}
    norms = module._clip([{"params": params, "name": name} for name, params in groups.items()])
    assert norms.keys() == {f"grad_norm/{name}" for name in groups}
    assert {norm.device.type for norm in norms.values()} == {"meta"}
