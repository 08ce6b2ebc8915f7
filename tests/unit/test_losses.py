"""Every loss against an independent few-line computation, in float64 where the code allows it."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import truncnorm
from torch import Tensor
from torch.distributions import Categorical, Normal, kl_divergence

from mapo_lightning.models.agents.dreamer import DreamerAgent
from mapo_lightning.models.agents.settings import AgentConfig
from mapo_lightning.models.distributions import (
    TruncatedNormal,
    balanced_kl,
    categorical_kl,
    one_hot_sample,
)
from mapo_lightning.models.interfaces import Belief, Dream, DreamPolicy, Fit
from mapo_lightning.models.objective import weigh
from mapo_lightning.models.returns import lambda_returns, step_weights
from mapo_lightning.models.rssm_world.belief import DreamtBelief
from mapo_lightning.models.rssm_world.heads import Heads
from mapo_lightning.models.rssm_world.world_model import RSSMWorldModel
from mapo_lightning.models.settings import ObjectiveConfig
from mapo_lightning.types import ConfigError
from tests.contract.test_world_models import experience, rssm_world


def test_categorical_kl_equals_torch_distributions() -> None:
    p, q = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    expected = kl_divergence(Categorical(logits=p), Categorical(logits=q)).sum(-1)
    torch.testing.assert_close(categorical_kl(p, q), expected)
    assert float(categorical_kl(p, p).abs().max()) < 1e-6


@pytest.mark.parametrize("free", [0.0, 0.5, 100.0])
def test_balanced_kl_averages_before_the_maximum(free: float) -> None:
    post = torch.randn(2, 3, 4, 5, requires_grad=True)
    prior = torch.randn(2, 3, 4, 5, requires_grad=True)
    loss = balanced_kl(post, prior, 0.8, free)
    mean = float(categorical_kl(post, prior).mean().detach())
    assert float(loss.detach()) == pytest.approx(max(mean, free), rel=1e-5)
    loss.backward()
    assert post.grad is not None
    assert prior.grad is not None
    if free == 100.0:
        assert float(post.grad.abs().max()) == 0.0
    else:
        # The prior's share of the gradient is the balance, the posterior's the rest.
        post2, prior2 = (x.detach().clone().requires_grad_() for x in (post, prior))
        categorical_kl(post2, prior2).mean().backward()
        assert post2.grad is not None
        assert prior2.grad is not None
        torch.testing.assert_close(prior.grad, 0.8 * prior2.grad)
        torch.testing.assert_close(post.grad, 0.2 * post2.grad)


def test_the_mean_action_is_that_of_the_cut_normal() -> None:
    mean = torch.tensor([0.9, -0.3, 0.0, -0.999], dtype=torch.float64)
    std = torch.tensor([0.5, 1.7, 0.1, 2.1], dtype=torch.float64)
    low, high = ((edge - mean) / std for edge in (-1.0, 1.0))
    expected = truncnorm.mean(low, high, loc=mean, scale=std)
    found = TruncatedNormal(mean, std).expectation()
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-6, abs=1e-12)


def test_one_hot_samples_follow_the_probabilities_and_pass_their_gradient() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0], requires_grad=True)
    noise = (torch.arange(10_000) + 0.5) / 10_000  # every quantile once
    sample = one_hot_sample(logits.expand(10_000, 4), noise)
    torch.testing.assert_close(sample.mean(0), logits.softmax(0), atol=2e-4, rtol=0.0)
    assert set(sample.unique().tolist()) == {0.0, 1.0}
    weight = torch.randn(4)
    (one_hot_sample(logits[None], torch.tensor([0.3])) * weight).sum().backward()
    expected = torch.autograd.grad((logits.softmax(0) * weight).sum(), logits)[0]
    torch.testing.assert_close(logits.grad, expected)


def test_one_hot_sample_has_one_class_at_the_edges_of_the_noise() -> None:
    logits = torch.randn(2, 32)
    for noise in (0.0, 1.0 - 2**-24):
        assert one_hot_sample(logits, torch.full((2,), noise)).sum(-1).tolist() == [1.0, 1.0]


def test_truncated_normal_moments_and_entropy_by_integration() -> None:
    raw = torch.tensor([[0.3, -1.2, 0.5, -2.0]])
    policy = TruncatedNormal.from_raw(raw)
    mean, std = raw[0, :2].tanh(), 2 * torch.sigmoid(raw[0, 2:] / 2) + 0.1
    grid = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    entropy = 0.0
    for m, s in zip(mean.double(), std.double(), strict=True):
        density = Normal(m, s).log_prob(grid).exp()
        density = density / torch.trapezoid(density, grid)
        entropy -= float(torch.trapezoid(torch.xlogy(density, density), grid))
        noise = ((torch.arange(200_000) + 0.5) / 200_000)[:, None].expand(-1, 2)
    assert float(policy.entropy()) == pytest.approx(entropy, abs=1e-4)
    samples = TruncatedNormal(policy.mean.expand(200_000, 2), policy.std.expand(200_000, 2)).sample(
        noise
    )
    assert float(samples.abs().max()) < 1.0
    density = Normal(mean[0].double(), std[0].double()).log_prob(grid).exp()
    first_moment = torch.trapezoid(density * grid, grid) / torch.trapezoid(density, grid)
    assert float(samples[:, 0].mean()) == pytest.approx(float(first_moment), abs=1e-3)


def test_truncated_normal_sample_is_reparameterised() -> None:
    raw = torch.randn(1, 4, requires_grad=True)
    TruncatedNormal.from_raw(raw).sample(torch.full((1, 2), 0.7)).sum().backward()
    assert raw.grad is not None
    assert bool((raw.grad != 0).all())


def test_lambda_returns_against_the_recursion_in_float64() -> None:
    g = torch.Generator().manual_seed(0)
    reward, value, discount = (torch.rand(6, 3, generator=g, dtype=torch.float64) for _ in "rvd")
    bootstrap = torch.rand(3, generator=g, dtype=torch.float64)
    got = lambda_returns(reward, value, discount, bootstrap, 0.95)
    target, values = bootstrap, [*value, bootstrap]
    for i in reversed(range(6)):
        target = reward[i] + discount[i] * (0.05 * values[i + 1] + 0.95 * target)
        torch.testing.assert_close(got[i], target)


def test_lambda_outside_the_unit_interval_is_refused() -> None:
    x = torch.zeros(2, 1)
    with pytest.raises(ValueError, match=r"lam must lie in \[0, 1\], got 1.5"):
        lambda_returns(x, x, x, x[0], 1.5)


def test_step_weights_are_the_product_of_discounts() -> None:
    weights = step_weights(torch.full((4, 1), 0.9, dtype=torch.float64))
    assert weights.flatten().tolist() == pytest.approx([1, 0.9, 0.81, 0.729])


class LineWorld(RSSMWorldModel):
    """A world in one dimension: the state moves by the action, the reward is the state."""

    def __init__(self, feat: int = 1) -> None:
        torch.nn.Module.__init__(self)
        self.feat_dim = feat

    def imagine_with_gradients(self, start: Belief, policy: DreamPolicy, steps: int) -> Dream:
        feats = [start.feat]
        for _ in range(steps):
            feats.append(feats[-1] + policy(feats[-1]))
        feat = torch.stack(feats)
        return Dream(feat, feat.squeeze(-1), feat.squeeze(-1).sigmoid())  # ends in the negative


def test_actor_and_critic_losses_against_the_written_out_formulas() -> None:
    """Facts 4: weights w_0..w_{H-2}, targets V_1..V_{H-1}, entropies of s_0..s_{H-2}.

    The probability to go on differs from state to state, so that none can be left out.
    """
    torch.manual_seed(0)
    cfg = AgentConfig(horizon=4, discount=0.9, lam=0.8, entropy=0.01)
    agent = DreamerAgent(cfg, LineWorld(), action_dim=1, layers=1, units=8)
    with torch.no_grad():
        for p in agent.target.parameters():
            p.add_(0.1)  # the slow critic must be told from the fast one
    start = torch.randn(3, 1)
    torch.manual_seed(7)
    fit = Fit(torch.zeros(()), {}, DreamtBelief(start[:, None]))
    loss = agent.losses(LineWorld(), fit, {}).losses
    torch.manual_seed(7)
    feats, entropies = [start], []
    for _ in range(4):
        policy = agent.policy(feats[-1].detach())  # the state is data to the actor
        entropies.append(policy.entropy())
        feats.append(feats[-1] + policy.sample(torch.rand(3, 1)))
    slow = [agent.target(f)[:, 0] for f in feats]
    reward = [f[:, 0] for f in feats]
    on = [0.9 / (1 + (-r).exp()) for r in reward]
    target = slow[4]
    targets: list[Tensor] = []
    for i in reversed(range(4)):
        target = reward[i] + on[i] * (0.2 * slow[i + 1] + 0.8 * target)
        targets.insert(0, target)
    alive = [torch.ones(3), on[0], on[0] * on[1], on[0] * on[1] * on[2]]
    alive = [weight.detach() for weight in alive]
    gain = [alive[i] * (targets[i + 1] + 0.01 * entropies[i]) for i in range(3)]
    assert float(loss["actor"].detach()) == pytest.approx(
        -float(torch.stack(gain).mean().detach()), rel=1e-5
    )
    error = [alive[i] * 0.5 * (agent.critic(feats[i])[:, 0] - targets[i]) ** 2 for i in range(4)]
    assert float(loss["critic"].detach()) == pytest.approx(
        float(torch.stack(error).mean().detach()), rel=1e-5
    )
    actor = list(agent.actor.parameters())
    expected = torch.autograd.grad(-torch.stack(gain).mean(), actor)
    loss["actor"].backward()
    assert all(p.grad is None for p in agent.critic.parameters())
    for p, grad in zip(actor, expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


@pytest.mark.parametrize("mean", [-1.0, 0.0, 1.0])
def test_samples_and_modes_at_the_edges_stay_inside_and_finite(mean: float) -> None:
    """Noise of exactly 0 or 1 would otherwise be an infinite quantile."""
    policy = TruncatedNormal(torch.full((2, 1), mean), torch.full((2, 1), 5.0))
    low, high = policy.sample(torch.tensor([[0.0], [1.0]])).flatten().tolist()
    assert -1.0 < low < -0.999
    assert 0.999 < high < 1.0
    assert policy.mode().flatten().tolist() == pytest.approx([mean * (1 - 1e-6)] * 2, abs=1e-7)


def test_lambda_may_be_either_end_and_nothing_beyond() -> None:
    one = torch.ones(2, 1)
    assert lambda_returns(one, one, one, one[0], 0.0).flatten().tolist() == [2.0, 2.0]
    assert lambda_returns(one, one, one, one[0], 1.0).flatten().tolist() == [3.0, 2.0]
    for lam in (-0.01, 1.01):
        with pytest.raises(ValueError, match="lam must lie in"):
            lambda_returns(one, one, one, one[0], lam)


def test_the_agent_logs_what_the_curves_are_called() -> None:
    agent = DreamerAgent(AgentConfig(horizon=3), LineWorld(), action_dim=1, layers=1, units=4)
    fit = Fit(torch.zeros(()), {}, DreamtBelief(torch.zeros(2, 1, 1)))
    found = agent.losses(LineWorld(), fit, {})
    assert set(found.losses) == {"actor", "critic"}
    shown = {"actor", "critic", "entropy", "imagined_return", "imagined_reward", "value"}
    assert set(found.log) == shown
    assert not any(value.requires_grad for value in found.log.values())


def test_the_discount_head_learns_where_episodes_go_on_and_dreams_use_it() -> None:
    torch.manual_seed(0)
    heads = Heads(["reward", "discount"], feat=2, units=8, layers=1)
    feat = torch.randn(40, 5, 2)
    ends = feat[..., 0] > 0.5
    batch = {"reward": torch.zeros(40, 5), "is_terminal": ends}
    p = heads.read("discount", feat).sigmoid()
    expected = -torch.where(ends, (1 - p).log(), p.log()).mean()
    assert float(heads.terms(batch, feat, None)["discount"]) == pytest.approx(float(expected))
    scale = ["finetune.objective.scales.discount=1.0"]
    world = rssm_world("mapo", "tiny", "world_model.discount_head=true", *scale)
    assert isinstance(world, RSSMWorldModel)
    start = world.observe(experience(world)).at(6).detach()
    for raw, likely in ((3.0, 1 / (1 + math.exp(-3.0))), (-3.0, 1 / (1 + math.exp(3.0)))):
        last = world.heads["discount"][-1]
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.constant_(last.bias, raw)
        dream = world.imagine(start, lambda _, b: torch.zeros(2, 3), 3)
        assert dream.discount.flatten().tolist() == pytest.approx([likely] * 8)


def test_the_slow_critic_is_a_hard_copy() -> None:
    agent = DreamerAgent(AgentConfig(target_every=10), LineWorld(2), 1, layers=1, units=4)
    with torch.no_grad():
        next(agent.critic.parameters()).add_(1.0)
    agent.after_update(9)
    assert not torch.equal(next(agent.target.parameters()), next(agent.critic.parameters()))
    agent.after_update(10)
    for slow, fast in zip(agent.target.parameters(), agent.critic.parameters(), strict=True):
        assert torch.equal(slow, fast)
        assert not slow.requires_grad


def test_loss_terms_and_scales_must_have_the_same_names() -> None:
    terms = {"image": torch.tensor(2.0), "kl_lower": torch.tensor(3.0)}
    total, log = weigh(terms, {"image": 0.5, "kl_lower": 0.0})
    assert float(total) == 1.0
    assert log["kl_lower"] == 3.0
    with pytest.raises(ConfigError, match=r"without a scale: \['kl_lower'\].*\['kl_lowr'\]"):
        weigh(terms, {"image": 1.0, "kl_lowr": 1.0})
    with pytest.raises(ConfigError, match=r"without a scale: \['kl_lower'\]"):
        weigh(terms, {"image": 1.0})
    with pytest.raises(ConfigError, match=r"scales without a term: \['reward'\]"):
        weigh(terms, {"image": 1.0, "kl_lower": 1.0, "reward": 1.0})


def test_uniform_policy_entropy_is_below_that_of_the_uniform_distribution() -> None:
    policy = TruncatedNormal(torch.zeros(1, 1), torch.full((1, 1), 50.0))
    assert float(policy.entropy()) == pytest.approx(math.log(2.0), abs=1e-3)


def test_common_factors_multiply_the_terms_that_they_name() -> None:
    names = ["image", "kl_lower", "kl_upper", "reward", "aux_reward", "latent_action_kl"]
    objective = ObjectiveConfig(dict.fromkeys(names, 2.0), kl=0.1, reward=50.0)
    factors = {"kl_lower": 0.1, "kl_upper": 0.1, "reward": 50.0, "aux_reward": 50.0}
    assert objective.weights == {name: 2.0 * factors.get(name, 1.0) for name in names}
    with pytest.raises(ConfigError, match="reward must not be negative, got -1"):
        ObjectiveConfig(reward=-1.0)
