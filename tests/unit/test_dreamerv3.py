"""What DreamerV3 changes: each switch against its written-out formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, Normal, kl_divergence

from mapo_lightning.models.agents.dreamer import ActorInDream, DreamerAgent, ReturnRange
from mapo_lightning.models.agents.settings import AgentConfig
from mapo_lightning.models.blocks import mlp
from mapo_lightning.models.distributions import TruncatedNormal
from mapo_lightning.models.interfaces import Fit
from mapo_lightning.models.rssm_world.belief import DreamtBelief
from mapo_lightning.models.rssm_world.fused.rssm import FusedRSSM
from mapo_lightning.models.rssm_world.heads import Heads
from mapo_lightning.models.rssm_world.rssm import RSSM
from mapo_lightning.models.rssm_world.settings import RSSMConfig, WorldModelConfig
from mapo_lightning.models.scalar_outputs import BINS, TwoHot
from mapo_lightning.types import ConfigError
from tests.contract.test_world_models import ACTIONS, rssm_world
from tests.contract.throwaways import CopyLastFrame
from tests.unit.test_losses import LineWorld
from tests.unit.test_recurrence import assert_equal_in_float32, loss_of

CFG = RSSMConfig(deter=6, hidden=7, stoch=4, classes=5)
VALUES = [math.copysign(math.expm1(abs(x)), x) for x in torch.linspace(-20, 20, BINS).tolist()]


@pytest.mark.parametrize("target", [-3.7, -0.02, 0.0, 0.4, 1.0, 517.0, 1e5])
def test_a_two_hot_target_is_the_mixture_whose_mean_it_is(target: float) -> None:
    above = next(i for i, value in enumerate(VALUES) if value > target)
    low, high = VALUES[above - 1], VALUES[above]
    share = (target - low) / (high - low)
    raw = torch.randn(BINS, generator=torch.Generator().manual_seed(0))
    log = raw.double().log_softmax(0)
    expected = -(1 - share) * float(log[above - 1]) - share * float(log[above])
    assert float(TwoHot().error(raw, torch.tensor(target))) == pytest.approx(expected, rel=1e-4)
    ideal = torch.full((BINS,), -1e4)
    ideal[above - 1], ideal[above] = math.log(max(1 - share, 1e-30)), math.log(max(share, 1e-30))
    assert float(TwoHot().read(ideal)) == pytest.approx(target, rel=1e-4, abs=1e-6)


def test_two_hot_outputs_begin_at_exactly_zero_and_learn_a_number() -> None:
    torch.manual_seed(0)
    heads = Heads(["reward", "discount"], 3, 16, 1, style="rms_silu", rewards="twohot")
    feat = torch.randn(64, 1, 3)
    assert torch.equal(heads.read("reward", feat), torch.zeros(64, 1))
    assert heads["discount"][-1].out_features == 1
    wanted = 40.0 * feat[..., 0].sign()
    batch = {"reward": wanted, "is_terminal": torch.zeros(64, 1, dtype=torch.bool)}
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        heads.terms(batch, feat, None)["reward"].backward()
        optimizer.step()
    error = (heads.read("reward", feat) - wanted).abs().median()
    assert float(error.detach()) < 4.0


def test_targets_beyond_the_last_value_count_as_the_last_value() -> None:
    raw = torch.randn(BINS)
    last = TwoHot().error(raw, torch.tensor(VALUES[-1]))
    assert torch.equal(TwoHot().error(raw, torch.tensor(1e12)), last)
    assert bool(TwoHot().error(raw, torch.tensor(-1e12)).isfinite())


def test_the_density_of_a_cut_normal_integrates_to_one_and_is_the_normals_inside() -> None:
    policy = TruncatedNormal(torch.tensor([[0.9]]), torch.tensor([[0.7]]))
    grid = torch.linspace(-1, 1, 20_001)
    density = torch.stack([policy.log_prob(x.view(1, 1))[0].exp() for x in grid[::100]])
    assert float(torch.trapezoid(density, grid[::100])) == pytest.approx(1.0, abs=1e-3)
    two = torch.tensor([[0.1], [-0.6]])
    ratio = policy.log_prob(two[:1]) - policy.log_prob(two[1:])
    normal = Normal(0.9, 0.7).log_prob(two)
    assert float(ratio) == pytest.approx(float(normal[0] - normal[1]), rel=1e-5)


def test_mixed_categoricals_keep_a_floor_and_their_kl_is_that_of_the_mixture() -> None:
    torch.manual_seed(0)
    model = RSSM(CFG, 3, 8, unimix=0.1)
    post, prior = 30.0 * torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    probs = [0.9 * x.double().softmax(-1) + 0.1 / 5 for x in (post, prior)]
    assert float(probs[0].min()) == pytest.approx(0.02, rel=1e-3)
    expected = kl_divergence(*(Categorical(probs=p) for p in probs)).sum(-1).mean()
    # Both halves of the balanced KL have this value.
    assert float(model.kl(post, prior, 0.0)) == pytest.approx(float(expected), rel=1e-4)


def test_the_fused_recurrence_mixes_as_the_plain_one_does() -> None:
    first = torch.zeros(2, 6, dtype=torch.bool)
    first[:, 0] = True
    noise, found = torch.rand(2, 6, 4), []
    torch.manual_seed(0)
    fused, plain = FusedRSSM(CFG, 3, 8, unimix=0.3), RSSM(CFG, 3, 8, unimix=0.3)
    plain.load_state_dict(fused.state_dict())
    assert not torch.equal(
        RSSM(CFG, 3, 8)
        .observe(torch.ones(2, 6, 3), torch.ones(2, 6, 8), first, None, noise)[0]
        .feat,
        fused.observe(torch.ones(2, 6, 3), torch.ones(2, 6, 8), first, None, noise)[0].feat,
    )
    for model in (fused, plain):
        torch.manual_seed(2)
        action, embed = torch.randn(2, 6, 3).requires_grad_(), torch.randn(2, 6, 8).requires_grad_()
        post, prior = model.observe(action, embed, first, None, noise)
        loss = loss_of(post, prior)
        grads = torch.autograd.grad(loss, [action, embed, *model.parameters()])
        found.append([*post, prior, loss, *grads])
    for one, other in zip(*found, strict=True):
        assert_equal_in_float32(one, other)


def test_a_dream_with_normed_networks_is_differentiated_as_the_plain_one() -> None:
    found = []
    torch.manual_seed(0)
    fused, plain = FusedRSSM(CFG, 3, 8, unimix=0.2), RSSM(CFG, 3, 8, unimix=0.2)
    plain.load_state_dict(fused.state_dict())
    for model in (fused, plain):
        torch.manual_seed(2)
        policy = ActorInDream(mlp(CFG.feat, 9, 2, 6, "rms_silu"), torch.rand(4, 5, 3))
        model.requires_grad_(False)
        torch.manual_seed(3)
        dream = model.imagine(DreamtBelief(torch.randn(5, CFG.feat)), policy, 4)
        loss = (dream.tanh() * torch.randn(dream.shape)).sum() + policy.policies.entropy().sum()
        found.append([dream, loss, *torch.autograd.grad(loss, list(policy.network.parameters()))])
    for one, other in zip(*found, strict=True):
        assert_equal_in_float32(one, other)


def test_returns_are_divided_by_a_moving_range_of_at_least_one() -> None:
    spread = ReturnRange(momentum=0.5)
    returns = torch.linspace(0.0, 100.0, 101).view(101, 1)
    assert float(spread(returns)) == pytest.approx(45.0)
    assert float(spread(returns)) == pytest.approx(67.5)
    spread.eval()
    assert float(spread(1e6 * returns)) == pytest.approx(67.5)
    again = ReturnRange()
    again.load_state_dict(spread.state_dict())
    assert float(again.average) == pytest.approx(67.5)
    assert float(ReturnRange()(returns / 1000)) == 1.0


def fit_of(start: torch.Tensor) -> Fit:
    return Fit(torch.zeros(()), {}, DreamtBelief(start[:, None]))


def test_the_actor_by_likelihood_against_the_written_out_formula() -> None:
    """Advantage V_{i+1} - v(s_i), as data, times ln p of the action that was taken in s_i."""
    torch.manual_seed(0)
    cfg = AgentConfig(
        horizon=3, discount=0.9, lam=0.8, entropy=0.01, gradient="reinforce", bootstrap="fast",
        slow_weight=0.5, normalise="percentile",
    )  # fmt: skip
    world = LineWorld()
    world.imagine = lambda start, policy, steps: _walk(start, policy, steps)  # type: ignore
    agent = DreamerAgent(cfg, world, action_dim=1, layers=1, units=8)
    with torch.no_grad():
        for p in agent.target.parameters():
            p.add_(0.1)
    start = 40.0 * torch.randn(5, 1)  # returns that differ by more than 1
    torch.manual_seed(7)
    loss = agent.losses(world, fit_of(start), {}).losses
    torch.manual_seed(7)
    noise = torch.rand(3, 5, 1)
    feats, actions = [start], []
    for i in range(3):
        actions.append(agent.policy(feats[-1]).sample(noise[i]).detach())
        feats.append(feats[-1] + actions[-1])
    fast, slow = ([net(f)[:, 0].detach() for f in feats] for net in (agent.critic, agent.target))
    reward = [f[:, 0] for f in feats]
    on = [0.9 / (1 + (-r).exp()) for r in reward]
    target, targets = fast[3], []
    for i in reversed(range(3)):
        target = reward[i] + on[i] * (0.2 * fast[i + 1] + 0.8 * target)
        targets.insert(0, target)
    alive = [torch.ones(5), on[0], on[0] * on[1]]
    flat = torch.cat(targets)
    spread = max(1.0, 0.01 * float(flat.quantile(0.95) - flat.quantile(0.05)))
    gains = []
    for i in range(2):
        policy = agent.policy(feats[i])
        gain = (targets[i + 1] - fast[i]) * policy.log_prob(actions[i]) / spread
        gains.append(alive[i] * (gain + 0.01 * policy.entropy()))
    expected = -torch.stack(gains).mean()
    assert float(loss["actor"].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    errors = []
    for i in range(3):
        value = agent.critic(feats[i])[:, 0]
        held = 0.5 * 0.5 * (value - slow[i]) ** 2
        errors.append(alive[i] * (0.5 * (value - targets[i]) ** 2 + held))
    assert float(loss["critic"].detach()) == pytest.approx(
        float(torch.stack(errors).mean().detach()), rel=1e-5
    )
    actor = list(agent.actor.parameters())
    found = torch.autograd.grad(loss["actor"], actor)
    torch.testing.assert_close(found, torch.autograd.grad(expected, actor))


def _walk(start, policy, steps):  # type: ignore[no-untyped-def]
    from mapo_lightning.models.interfaces import Dream

    with torch.no_grad():
        feats, actions = [start.feat], []
        for i in range(steps):
            actions.append(policy(i, DreamtBelief(feats[-1])))
            feats.append(feats[-1] + actions[-1])
        feat = torch.stack(feats)
        on = feat.squeeze(-1).sigmoid()
        return Dream(feat, feat.squeeze(-1), on, torch.stack(actions))


def test_the_slow_critic_follows_in_small_steps() -> None:
    agent = DreamerAgent(AgentConfig(target_every=2, target_rate=0.25), LineWorld(2), 1, 1, 4)
    slow, fast = next(agent.target.parameters()), next(agent.critic.parameters())
    before = slow.clone()
    with torch.no_grad():
        fast.add_(1.0)
    agent.after_update(1)
    assert torch.equal(slow, before)
    agent.after_update(2)
    torch.testing.assert_close(slow, before + 0.25)


def test_an_actor_by_likelihood_needs_no_gradients_through_the_dream() -> None:
    world = CopyLastFrame()
    with pytest.raises(ConfigError, match=r"CopyLastFrame does not give; set agent.gradient=rein"):
        DreamerAgent(AgentConfig(), world, ACTIONS, 1, 4)
    DreamerAgent(AgentConfig(gradient="reinforce"), world, ACTIONS, 1, 4)


def test_dreamerv3s_words_build_its_parts() -> None:
    words = ["world_model.unimix=0.01", "world_model.rewards=twohot"]
    world = rssm_world("mapo", "tiny", *words, "world_model.head_style=rms_silu")
    assert world.lower.unimix == world.upper.unimix == 0.01  # type: ignore[union-attr]
    assert world.heads["reward"][-1].out_features == BINS  # type: ignore[union-attr,index]
    assert any(isinstance(m, torch.nn.RMSNorm) for m in world.heads.modules())  # type: ignore


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"target_rate": 0.0}, r"target_rate must lie in \(0, 1\], got 0.0"),
        ({"slow_weight": -1.0}, "slow_weight must not be negative"),
    ],
)
def test_numbers_out_of_range_are_refused(words: dict[str, float], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        AgentConfig(**words)  # type: ignore[arg-type]


def test_a_share_of_one_would_leave_nothing_to_learn() -> None:
    with pytest.raises(ConfigError, match=r"unimix must lie in \[0, 1\), got 1.0"):
        WorldModelConfig(unimix=1.0)
