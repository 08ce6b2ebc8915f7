"""The backward written by hand against autograd on the same steps."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from mapo_lightning.models.blocks import Recorded, mlp
from mapo_lightning.models.distributions import one_hot_sample
from mapo_lightning.models.rssm_world.rssm import RSSM, RSSMState
from mapo_lightning.models.rssm_world.settings import RSSMConfig


def rssm() -> RSSM:
    torch.manual_seed(0)
    return RSSM(RSSMConfig(deter=6, hidden=7, stoch=4, classes=5), 3, 8)


def loss_of(state: RSSMState, prior: Tensor) -> Tensor:
    """Touches every output, each entry with its own weight."""
    torch.manual_seed(1)
    parts = (*state, prior)
    return torch.stack([(x.tanh() * torch.randn(x.shape)).sum() for x in parts]).sum()


def autograd_observe(
    model: RSSM, action: Tensor, embed: Tensor, first: Tensor, start: RSSMState, noise: Tensor
) -> tuple[RSSMState, Tensor]:
    state, states, priors = start, [], []
    for t in range(action.shape[1]):
        keep = (~first[:, t]).float()[:, None]
        z, h = state.stoch.flatten(1) * keep, state.deter * keep
        x = nn.functional.elu(model.inp(torch.cat([z, action[:, t] * keep], 1)))
        h = model.cell(x, h)
        priors.append(model.prior(h).view(-1, 4, 5))
        logits = model.posterior(torch.cat([h, embed[:, t]], 1)).view(-1, 4, 5)
        state = RSSMState.of(h, one_hot_sample(logits, noise[:, t]), logits)
        states.append(state)
    return RSSMState(*(torch.stack(x, 1) for x in zip(*states, strict=True))), torch.stack(
        priors, 1
    )


def autograd_imagine(model: RSSM, start: RSSMState, actions: Tensor) -> Tensor:
    """Features of a dream step by step, with the random numbers that `imagine` draws."""
    torch.manual_seed(3)
    noise, state, found = torch.rand(4, 5, 4), start, [start.feat]
    for action, uniform in zip(actions, noise, strict=True):
        state = model.imagine_step(state, action, uniform)
        found.append(state.feat)
    return torch.stack(found)


def test_gradients_of_following_are_those_of_autograd() -> None:
    model = rssm()
    first = torch.zeros(2, 6, dtype=torch.bool)
    first[:, 0] = True
    first[1, 3] = True
    noise = torch.rand(2, 6, 4)
    found = []
    for observe in (model.observe, lambda a, e, f, s, n: autograd_observe(model, a, e, f, s, n)):
        torch.manual_seed(2)
        given = [torch.randn(2, 6, 3), torch.randn(2, 6, 8), torch.randn(2, 6), torch.rand(2, 4, 5)]
        action, embed, deter, stoch = (x.requires_grad_() for x in given)
        # The second sequence goes on from its start, the first one forgets it.
        first[1, 0] = False
        post, prior = observe(action, embed, first, RSSMState.of(deter, stoch, stoch), noise)
        loss = loss_of(post, prior)
        found.append([loss, *torch.autograd.grad(loss, [*given, *model.parameters()])])
    assert len(found[0]) == 5 + len(list(model.parameters()))
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)
    assert all(bool((x != 0).any()) for x in found[0])


def test_gradients_of_a_dream_reach_the_actions_as_autograd_says() -> None:
    model = rssm().requires_grad_(False)
    start = model.initial(5, torch.zeros(1))
    actions = torch.randn(4, 5, 3, requires_grad=True)
    torch.manual_seed(3)
    dream = model.imagine(start.feat, lambda i, _: actions[i], 4, replay=lambda: actions)
    slow = autograd_imagine(model, start, actions)
    torch.testing.assert_close(dream, slow, rtol=1e-5, atol=1e-6)
    weight = torch.randn(dream.shape)
    (fast,) = torch.autograd.grad((dream.tanh() * weight).sum(), actions)
    (expected,) = torch.autograd.grad((slow.tanh() * weight).sum(), actions)
    assert bool((fast[:-1] != 0).any(dim=-1).all())
    torch.testing.assert_close(fast, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layers", [1, 3])
def test_gradients_of_a_recorded_network_are_those_of_autograd(layers: int) -> None:
    torch.manual_seed(0)
    network, x = mlp(5, 6, layers, 2), torch.randn(3, 4, 5)
    record = Recorded(network)
    for one in x:
        assert not record(one).requires_grad
    out, expected = record.replay(), network(x)
    torch.testing.assert_close(out, expected)
    weight, params = torch.randn_like(out), list(network.parameters())
    fast = torch.autograd.grad((out * weight).sum(), params)
    slow = torch.autograd.grad((expected * weight).sum(), params)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_products_run_in_bfloat16_under_autocast_and_states_stay_float32() -> None:
    model = rssm()
    action, embed, noise = torch.randn(2, 6, 3), torch.randn(2, 6, 8), torch.rand(2, 6, 4)
    first = torch.zeros(2, 6, dtype=torch.bool)
    exact, _ = model.observe(action, embed, first, noise_BTS=noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, prior = model.observe(action, embed, first, noise_BTS=noise)
        loss = loss_of(mixed, prior.float())
    assert {x.dtype for x in mixed} == {torch.float32}
    torch.testing.assert_close(mixed.deter[:, 0], exact.deter[:, 0], rtol=0.1, atol=0.05)
    assert not torch.equal(mixed.deter, exact.deter)
    fast = torch.autograd.grad(loss, list(model.parameters()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        start = model.initial(2, action)
        slow_post, slow_prior = autograd_observe(model, action, embed, first, start, noise)
        slow_loss = loss_of(slow_post, slow_prior.float())
    alike(fast, torch.autograd.grad(slow_loss, list(model.parameters())))


def test_gradients_of_a_dream_in_bfloat16_are_those_of_autograd() -> None:
    model = rssm().requires_grad_(False)
    start = model.initial(5, torch.zeros(1))
    actions = torch.randn(4, 5, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(3)
        dream = model.imagine(start.feat, lambda i, _: actions[i], 4, replay=lambda: actions)
        slow = autograd_imagine(model, start, actions)
    weight = torch.randn(dream.shape)
    fast = torch.autograd.grad((dream.tanh() * weight).sum(), actions)
    alike(fast, torch.autograd.grad((slow.tanh() * weight).sum(), actions))


def alike(fast: Sequence[Tensor], slow: Sequence[Tensor]) -> None:
    """Float32, and up to bfloat16's rounding the same direction and length."""
    for a, b in zip(fast, slow, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert float(b.norm()) > 0.0
        assert float(torch.cosine_similarity(a.flatten(), b.flatten(), 0)) > 0.99
        assert float(a.norm() / b.norm()) == pytest.approx(1.0, abs=0.05)
