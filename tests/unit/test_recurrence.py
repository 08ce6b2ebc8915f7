"""The fused recurrence against the plain one, which is its specification."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mapo_lightning.models.agents.dreamer import ActorInDream
from mapo_lightning.models.blocks import mlp
from mapo_lightning.models.rssm_world.fused.policy import NetworkPolicy, RecordedMLP
from mapo_lightning.models.rssm_world.fused.rssm import FusedRSSM
from mapo_lightning.models.rssm_world.rssm import RSSM, RSSMState
from mapo_lightning.models.rssm_world.settings import RSSMConfig

CFG = RSSMConfig(deter=6, hidden=7, stoch=4, classes=5)


def both() -> tuple[FusedRSSM, RSSM]:
    """The same weights in both recurrences."""
    torch.manual_seed(0)
    fused, plain = FusedRSSM(CFG, 3, 8), RSSM(CFG, 3, 8)
    plain.load_state_dict(fused.state_dict())
    return fused, plain


def loss_of(state: RSSMState, prior: Tensor) -> Tensor:
    """Touches every output, each entry with its own weight."""
    torch.manual_seed(1)
    parts = (*state, prior)
    return torch.stack([(x.tanh() * torch.randn(x.shape)).sum() for x in parts]).sum()


def actor() -> ActorInDream:
    torch.manual_seed(2)
    return ActorInDream(mlp(CFG.feat, 9, 2, 6), torch.rand(4, 5, 3))


def assert_equal_in_float32(found: Tensor, expected: Tensor) -> None:
    """Within a millionth of the largest entry: sums of both signs cannot keep their own digits."""
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-6 * scale)


def test_following_and_its_gradients_are_those_of_the_plain_recurrence() -> None:
    first = torch.zeros(2, 6, dtype=torch.bool)
    first[0, 0] = True  # the second sequence goes on from its start, the first one forgets it
    first[1, 3] = True
    noise, found = torch.rand(2, 6, 4), []
    for model in both():
        torch.manual_seed(2)
        given = [torch.randn(2, 6, 3), torch.randn(2, 6, 8), torch.randn(2, 6), torch.rand(2, 4, 5)]
        action, embed, deter, stoch = (x.requires_grad_() for x in given)
        post, prior = model.observe(action, embed, first, RSSMState.of(deter, stoch, stoch), noise)
        loss = loss_of(post, prior)
        grads = torch.autograd.grad(loss, [*given, *model.parameters()])
        found.append([*post, prior, loss, *grads])
    for fused, plain in zip(*found, strict=True):
        assert_equal_in_float32(fused, plain)
    assert all(bool((x != 0).any()) for x in found[0])


@pytest.mark.parametrize("encoded", [False, True])
def test_a_dream_and_its_gradients_are_those_of_the_plain_recurrence(encoded: bool) -> None:
    encode = mlp(3, 4, 1, 3).requires_grad_(False) if encoded else None
    found = []
    for model in both():
        policy = actor()
        assert isinstance(policy, NetworkPolicy)
        model.requires_grad_(False)
        start = model.initial(5, torch.zeros(1))
        torch.manual_seed(3)
        dream = model.imagine(start, policy, 4, encode)
        weight = torch.randn(dream.shape)
        loss = (dream.tanh() * weight).sum() + policy.policies.entropy().sum()
        found.append([dream, loss, *torch.autograd.grad(loss, list(policy.network.parameters()))])
    for fused, plain in zip(*found, strict=True):
        assert_equal_in_float32(fused, plain)


def test_a_dream_without_gradients_is_the_same_dream() -> None:
    actions, found = torch.randn(4, 5, 3), []
    for model in both():
        given = iter(actions)
        torch.manual_seed(3)
        with torch.no_grad():
            start = model.initial(5, torch.zeros(1))
            found.append(model.imagine(start, lambda _, given=given: next(given), 4))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_gradients_through_a_policy_that_is_no_network_take_the_plain_recurrence() -> None:
    fused, _ = both()
    gain = torch.ones(3, requires_grad=True)
    start = fused.initial(2, torch.zeros(1))
    dream = fused.imagine(start, lambda feat: gain * feat[:, :3].detach() + gain, 3)
    (grad,) = torch.autograd.grad(dream.square().sum(), gain)
    assert bool((grad != 0).any())


@pytest.mark.parametrize("layers", [1, 3])
def test_gradients_of_a_recorded_network_are_those_of_autograd(layers: int) -> None:
    torch.manual_seed(0)
    network, x = mlp(5, 6, layers, 2), torch.randn(3, 4, 5)
    record = RecordedMLP(network)
    for one in x:
        assert not record(one).requires_grad
    out, expected = record.outputs(), network(x)
    torch.testing.assert_close(out, expected)
    weight, params = torch.randn_like(out), list(network.parameters())
    fast = torch.autograd.grad((out * weight).sum(), params)
    slow = torch.autograd.grad((expected * weight).sum(), params)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_products_run_in_bfloat16_under_autocast_and_states_stay_float32() -> None:
    fused, plain = both()
    action, embed, noise = torch.randn(2, 6, 3), torch.randn(2, 6, 8), torch.rand(2, 6, 4)
    first = torch.zeros(2, 6, dtype=torch.bool)
    exact, _ = fused.observe(action, embed, first, noise_BTS=noise)
    found = []
    for model in (fused, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed, prior = model.observe(action, embed, first, noise_BTS=noise)
            loss = loss_of(mixed, prior.float())
        assert {x.dtype for x in mixed} == {torch.float32}
        torch.testing.assert_close(mixed.deter[:, 0], exact.deter[:, 0], rtol=0.1, atol=0.05)
        assert not torch.equal(mixed.deter, exact.deter)
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    alike(*found)


def test_gradients_of_a_dream_in_bfloat16_are_those_of_the_plain_recurrence() -> None:
    found = []
    for model in both():
        policy = actor()
        model.requires_grad_(False)
        start = model.initial(5, torch.zeros(1))
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            dream = model.imagine(start, policy, 4)
        weight = torch.randn(dream.shape)
        loss = (dream.tanh() * weight).sum()
        found.append(torch.autograd.grad(loss, list(policy.network.parameters())))
    alike(*found)


def alike(fast: Sequence[Tensor], slow: Sequence[Tensor]) -> None:
    """Float32, and up to bfloat16's rounding the same direction and length."""
    for a, b in zip(fast, slow, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert float(b.norm()) > 0.0
        assert float(torch.cosine_similarity(a.flatten(), b.flatten(), 0)) > 0.99
        assert float(a.norm() / b.norm()) == pytest.approx(1.0, abs=0.05)
