"""The fast step against the plain one: same weights, inputs and noise, same gradients."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measures import CONF, RESIDUAL, batch_of
from benchmarks.reference_step import ReferenceStep
from mapo_lightning.config.compose import compose
from mapo_lightning.models.rssm_world.decoder import CrossAttention
from mapo_lightning.run.build import build_finetune, build_pretrain
from mapo_lightning.run.config import RunConfig
from mapo_lightning.training.finetune import FinetuneModule
from mapo_lightning.training.pretrain import PretrainModule
from mapo_lightning.types import Batch

pytestmark = pytest.mark.slow
WORDS = ["env=dmc/walker_run", "finetune.batch_size=2", "finetune.chunk_length=8"]
WORDS += RESIDUAL.split()
ACTION = 3


def built(stage: str, method: str) -> tuple[PretrainModule | FinetuneModule, Batch]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    words = [f"method={method}", "pretrain.batch_size=2", "data.clip_length=8", *WORDS]
    cfg = compose(words, RunConfig, CONF).config
    if stage == "pretrain":
        return build_pretrain(cfg), batch_of(cfg, 4, 8, None)
    return build_finetune(cfg, ACTION, None)[0], batch_of(cfg, 4, 8, ACTION)


def losses(
    module: PretrainModule | FinetuneModule, batch: Batch, plain: bool
) -> dict[str, tuple[Tensor, list[torch.nn.Parameter]]]:
    """Name -> loss and the parameters that it trains."""
    world_model = module.world_model
    agent = module.agent if isinstance(module, FinetuneModule) else None
    torch.manual_seed(1)
    if plain:
        reference = ReferenceStep(world_model, agent, exact=True)
        total, post = reference.world_model_loss(batch)
        behaviour = reference.behaviour_losses(post) if agent else ()
    else:
        fit = world_model.loss(batch)
        total = fit.total
        behaviour = ()
        if agent:
            found = agent.losses(world_model, fit, batch).losses
            behaviour = found["actor"], found["critic"]
    trained = {"world_model": (total, list(world_model.parameters()))}
    if agent:
        trained["actor"] = behaviour[0], list(agent.actor.parameters())
        trained["critic"] = behaviour[1], list(agent.critic.parameters())
    return trained


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("method", ["mapo", "contextwm", "apv"])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_losses_and_gradients_agree_with_the_plain_step(
    stage: str, method: str, smooth: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With smooth units to 1e-5. A ReLU whose input rounds to either side of zero has no gradient
    to agree on: with ReLUs the losses agree as closely, the gradients as far as the kinks let them.
    """
    if smooth:
        monkeypatch.setattr(torch.nn.functional, "relu", soft)
    module, batch = built(stage, method)
    module.world_model.loss(batch)  # the codebook takes its first codes from a batch
    for part in module.world_model.modules():
        if isinstance(part, CrossAttention):
            # A fresh one averages all tokens: the batch norm behind it divides by next to nothing
            # and shows the rounding of the sums. Attend to some tokens more than to others.
            part.in_weight.data.mul_(6.0)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    results = []
    for plain in (False, True):
        module.load_state_dict(state)
        gradients = {}
        # The fused attention's exponential is good to 20 ulp only; its plain kernel is exact.
        with sdpa_kernel(SDPBackend.MATH):
            found = losses(module, batch, plain)
        for name, (loss, params) in found.items():
            grads = torch.autograd.grad(
                loss, params, retain_graph=name != "critic", allow_unused=True
            )
            gradients[name] = float(loss.detach()), grads
        results.append(gradients)
    fast, slow = results
    assert fast.keys() == slow.keys()
    for name in fast:
        assert fast[name][0] == pytest.approx(slow[name][0], rel=1e-5)
        check(fast[name][1], slow[name][1], 1e-5 if smooth else 1e-2)


def soft(x: Tensor, inplace: bool = False) -> Tensor:
    return torch.nn.functional.softplus(x)


def check(fast: Sequence[Tensor | None], slow: Sequence[Tensor | None], tolerance: float) -> None:
    """All gradients together, and each weight's, so that no small one hides behind a large one."""
    assert [a is None for a in fast] == [b is None for b in slow]
    pairs = [(a, b) for a, b in zip(fast, slow, strict=True) if a is not None and b is not None]
    error = torch.cat([(a - b).flatten() for a, b in pairs]).norm()
    scale = torch.cat([b.flatten() for _, b in pairs]).norm()
    assert float(error / scale) < tolerance
    for a, b in pairs:
        assert float((a - b).norm()) <= 10 * tolerance * float(b.norm()) + tolerance * float(scale)
