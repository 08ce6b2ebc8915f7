"""Planning in a world that is known: a point on a line that each action pushes.

Shapes: N environments, P sequences, I steps, A action.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mapo_lightning.models.agents.planner import Planner
from mapo_lightning.models.agents.settings import PlanConfig
from mapo_lightning.models.interfaces import AgentLoss, Belief, Dream, Fit, Policy, WorldModel
from mapo_lightning.training.acting import ActingPolicy, acting
from mapo_lightning.training.checkpoint import read_checkpoint, write_checkpoint
from mapo_lightning.training.finetune import FinetuneModule
from mapo_lightning.training.settings import FinetuneConfig
from mapo_lightning.types import Batch, ConfigError

PUSH, COST, DISCOUNT = 0.5, 0.2, 0.9


class Place(NamedTuple):
    """Where the point is, (..., 1)."""

    feat: Tensor

    def at(self, t: int) -> Place:
        return Place(self.feat[:, t])

    def flatten(self) -> Place:
        return Place(self.feat.flatten(0, 1))

    def repeat(self, times: int) -> Place:
        return Place(self.feat.repeat_interleave(times, 0))

    def detach(self) -> Place:
        return self


class Line(nn.Module):
    """x' = x + PUSH a. The reward is -x'^2 - COST a^2, or what is given in its place."""

    feat_dim = 1

    def __init__(
        self,
        reward: Callable[[Tensor, Tensor], Tensor] = lambda x, a: -(x**2) - COST * a**2,
        uncertainty: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.reward, self.uncertainty = reward, uncertainty
        self.dreams: list[tuple[int, int]] = []  # rows and steps of each
        self.nothing = nn.Parameter(torch.zeros(()))

    def observe(self, batch: Batch, start: Belief | None = None) -> Place:
        return Place(batch["obs"][..., 0, 0, :1].float() / 255.0)

    def loss(self, batch: Batch) -> Fit:
        raise NotImplementedError

    @torch.no_grad()
    def imagine(self, start: Belief, policy: Policy, steps: int) -> Dream:
        x = [start.feat]
        actions, rewards = [], [torch.full((len(x[0]),), -99.0)]  # the first is not to be read
        for i in range(steps):
            actions.append(policy(i, Place(x[-1])))
            x.append(x[-1] + PUSH * actions[-1])
            rewards.append(self.reward(x[-1], actions[-1]).squeeze(-1))
        reward, feat = torch.stack(rewards), torch.stack(x)
        self.dreams.append((len(start.feat), steps))
        unsure = None if self.uncertainty is None else self.uncertainty(feat).squeeze(-1)
        action = torch.stack(actions)
        return Dream(feat, reward, torch.ones_like(reward), action, uncertainty=unsure)

    def open_loop(self, batch: Batch, seen: int) -> Tensor:
        raise NotImplementedError

    def parts(self) -> Mapping[str, nn.Module]:
        return {}

    def groups(self) -> Mapping[str, list[nn.Parameter]]:
        return {"model": [self.nothing]}

    def evaluating(self) -> AbstractContextManager[None]:
        return nullcontext()


class Pusher(nn.Module):
    """Greedy, it pushes by ``action``; while exploring, by ``other``."""

    action_dim = 1

    def __init__(self, action: float = 0.0, other: float = 0.0) -> None:
        super().__init__()
        self.action, self.other = action, other

    def act(self, belief: Belief, explore: bool) -> Tensor:
        return torch.full((len(belief.feat), 1), self.other if explore else self.action)

    def losses(self, world_model: WorldModel, fit: Fit, batch: Batch) -> AgentLoss:
        raise NotImplementedError

    def groups(self) -> Mapping[str, Iterator[nn.Parameter]]:
        return {}

    def after_update(self, updates: int) -> None:
        pass


class Valued(Pusher):
    """With a critic: the further left, the better."""

    def value(self, feat: Tensor) -> Tensor:
        return -10.0 * feat.squeeze(-1)


class Proposing(Pusher):
    """Its proposals are not what it does while exploring."""

    def propose(self, belief: Belief) -> Tensor:
        return torch.full((len(belief.feat), 1), 0.25)


SURE: dict[str, Any] = {"std_start": 0.0, "std_min": 0.0}
"""Sequences that are not drawn but known."""


def planner(
    world: nn.Module | None = None, agent: nn.Module | None = None, **words: Any
) -> Planner:
    chosen: dict[str, Any] = {"kind": "cem", "horizon": 3, "proposals": 0, **words}
    agent, world = agent or Pusher(), world or Line()
    return Planner(PlanConfig(**chosen), DISCOUNT, world, agent)  # type: ignore[arg-type]


def plan(made: Planner, start: list[float], **words: Any) -> tuple[Tensor, Tensor]:
    """Actions and plans of points at ``start``; at the first step of their episodes."""
    given = {"before": None, "is_first": torch.ones(len(start), dtype=torch.bool)}
    belief = Place(torch.tensor(start)[:, None])
    return made.act(belief, **given | {"explore": False} | words)


def optimum(start: float, steps: int) -> Tensor:
    """The best sequence, by its normal equations."""
    push = PUSH * torch.tril(torch.ones(steps, steps))
    gamma = torch.diag(DISCOUNT ** torch.arange(steps))
    curvature = push.T @ gamma @ push + COST * gamma
    return torch.linalg.solve(curvature, -push.T @ gamma @ torch.full((steps,), start))


@pytest.mark.parametrize(
    "words", [{"kind": "cem"}, {"kind": "mppi", "temperature": 0.02}], ids=lambda w: w["kind"]
)
def test_the_optimum_of_a_linear_quadratic_world_is_found(words: dict[str, Any]) -> None:
    torch.manual_seed(0)
    made = planner(iterations=15, std_min=0.0, population=1000, elites=50, **words)
    starts = [0.6, -0.3, 0.1]
    action, found = plan(made, starts)
    expected = torch.stack([optimum(x, 3) for x in starts], dim=1)[..., None]
    assert expected.abs().max() < 1.0
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.0)
    assert torch.equal(action, found[0])


def test_an_optimum_outside_the_range_lies_on_its_edge() -> None:
    torch.manual_seed(0)
    action, found = plan(planner(iterations=10), [3.0, -3.0])
    assert action[:, 0].tolist() == pytest.approx([-1.0, 1.0], abs=0.02)
    assert float(found.abs().max()) <= 1.0


def test_one_dream_an_iteration_holds_all_sequences_of_all_environments() -> None:
    world = Line()
    plan(planner(world, iterations=4, population=50, elites=5, proposals=7), [0.1, 0.2])
    assert world.dreams == [(14, 3)] + [(100, 3)] * 4


def test_rewards_are_discounted_and_the_first_is_not_counted() -> None:
    reward = torch.tensor([[5.0], [1.0], [2.0], [4.0]])
    goes_on = torch.tensor([[0.5], [0.8], [0.5], [0.1]])
    dream = Dream(torch.ones(4, 1, 1), reward, goes_on)
    expected = 1.0 + 0.9 * 0.8 * 2.0 + 0.9 * 0.8 * 0.9 * 0.5 * 4.0
    assert planner()._returns(dream).tolist() == pytest.approx([expected])
    # The critic's -10 stands in for the reward of the last state and all after it.
    with_value = expected + 0.9 * 0.8 * 0.9 * 0.5 * (-10.0 - 4.0)
    assert planner(agent=Valued())._returns(dream).tolist() == pytest.approx([with_value])
    without = planner(agent=Valued(), value=False)
    assert without._returns(dream).tolist() == pytest.approx([expected])
    unsure = dream._replace(uncertainty=torch.tensor([[9.0], [1.0], [0.0], [2.0]]))
    less = 2.0 * (1.0 + 0.9 * 0.8 * 0.9 * 0.5 * 2.0)
    careful = planner(caution=2.0)
    assert careful._returns(unsure).tolist() == pytest.approx([expected - less])
    assert planner()._returns(unsure).tolist() == pytest.approx([expected])


def test_mppi_weighs_the_elites_by_their_returns_and_cem_does_not() -> None:
    """Two sequences that are both proposals: +0.5 with return -1/16, and -0.5 with -1/16 - 1."""
    agent = Pusher(0.5, -0.5)
    world = Line(reward=lambda x, a: -(x**2) + torch.where(a > 0, 0.0, -1.0))
    words = {"horizon": 1, "population": 2, "elites": 2, "proposals": 2, "iterations": 1}
    action, _ = plan(planner(world, agent, kind="cem", **words), [0.0])
    assert float(action) == pytest.approx(0.0)
    heavy = 1.0 / (1.0 + np.exp(-2.0))  # a difference of 1 at a temperature of 1/2
    action, _ = plan(planner(world, agent, kind="mppi", temperature=0.5, **words), [0.0])
    assert float(action) == pytest.approx(0.5 * heavy - 0.5 * (1 - heavy))
    # The standard deviation is that of the weighted elites.
    torch.manual_seed(3)
    made = planner(world, agent, kind="mppi", temperature=0.5, std_min=0.0, **words)
    drawn, _ = plan(made, [0.0], explore=True)
    torch.manual_seed(3)
    plan(made, [0.0])
    spread = np.sqrt(0.25 - float(action) ** 2)
    assert float(drawn) == pytest.approx(float(action) + spread * float(torch.randn(1, 1)))


def test_the_plan_of_the_step_before_is_shifted_where_the_episode_goes_on() -> None:
    before = torch.tensor([[0.1, -0.1], [0.2, -0.2], [0.3, -0.3]])[..., None]
    words = {"before": before, "is_first": torch.tensor([False, True])}
    action, found = plan(planner(**SURE), [0.0, 0.0], **words)
    torch.testing.assert_close(found[..., 0].T, torch.tensor([[0.2, 0.3, 0.0], [0.0, 0.0, 0.0]]))
    assert torch.equal(action, found[0])
    _, cold = plan(planner(warm_start=False, **SURE), [0.0, 0.0], **words)
    assert not cold.any()
    _, longer = plan(planner(horizon=4, **SURE), [0.0, 0.0], **words)  # other settings than before
    assert longer.shape == (4, 2, 1)
    assert not longer.any()


def test_a_proposal_that_nothing_else_reaches_wins() -> None:
    """Only pushes of 0.7 are worth anything, and the population stands still."""
    world = Line(reward=lambda x, a: ((a - 0.7).abs() < 1e-3).float())
    one = {"elites": 1, "population": 8, "iterations": 2, "proposals": 3, **SURE}
    action, _ = plan(planner(world, Pusher(0.7, 0.1), **one), [0.0, 1.0])  # the greedy one
    assert action[:, 0].tolist() == pytest.approx([0.7, 0.7])
    action, _ = plan(planner(world, Pusher(0.1, 0.7), **one), [0.0, 1.0])  # a sample
    assert action[:, 0].tolist() == pytest.approx([0.7, 0.7])
    action, _ = plan(planner(world, Pusher(0.1, 0.7), **one | {"proposals": 1}), [0.0, 1.0])
    assert action[:, 0].tolist() == [0.0, 0.0]
    quarter = Line(reward=lambda x, a: ((a - 0.25).abs() < 1e-3).float())
    action, _ = plan(planner(quarter, Proposing(0.1, 0.7), **one), [0.0])
    assert float(action) == pytest.approx(0.25)


def test_caution_avoids_the_side_that_is_not_known() -> None:
    """The right is worth a little more, and nothing is known there."""
    world = Line(reward=lambda x, a: x.abs() + 0.1 * x, uncertainty=lambda x: x.clamp(min=0))
    for caution, side in ((0.0, 1.0), (1.0, -1.0)):
        torch.manual_seed(0)
        action, _ = plan(planner(world, caution=caution, iterations=10), [0.0])
        assert float(action) == pytest.approx(side, abs=0.05)


def test_a_world_model_that_knows_no_uncertainty_is_refused_where_it_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"caution=0.5 .* this Line does not give"):
        plan(planner(caution=0.5), [0.0])
    with pytest.raises(ConfigError, match=r"kind=cem plans in dreams, which Linear does not have"):
        planner(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"elites": 9, "population": 8, "proposals": 0}, "elites must not exceed population=8"),
        ({"proposals": 600}, "proposals must not exceed population=512, got 600"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"std_start": 0.1, "std_min": 0.2}, "std_min must lie between 0 and std_start=0.1"),
        ({"caution": -1.0}, "caution must not be negative"),
        ({"horizon": 0}, "horizon must be at least 1"),
    ],
)
def test_settings_that_cannot_plan_are_refused(words: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        PlanConfig(kind="cem", **words)


def steps(count: int, envs: int = 2) -> list[dict[str, Any]]:
    """What environments show: points at random places; the second one begins anew at step 3."""
    rng = np.random.default_rng(0)
    shown = []
    for t in range(count):
        first = np.array([t == 0, t in (0, 3), t == 0])[:envs]
        shown.append({"obs": rng.integers(0, 255, (envs, 4, 4, 3), np.uint8), "is_first": first})
    return shown


def policy(explore: bool = True, **words: Any) -> ActingPolicy:
    """One that needs its memory: a single iteration gets nowhere from zero."""
    words = {"iterations": 1, "population": 30, "elites": 5, "std_start": 0.1, **words}
    made = planner(**words)
    return ActingPolicy(made.world_model, made.agent, explore, made)


def test_acting_forgets_the_plan_of_the_environment_whose_episode_begins() -> None:
    act, shown = policy(explore=False, **SURE), steps(5)
    act(shown[0])
    act.plan = torch.tensor([[0.1, 0.1], [0.2, 0.2], [0.3, 0.3]])[..., None]
    assert act(shown[1])[:, 0].tolist() == pytest.approx([0.2, 0.2])
    act.plan = torch.tensor([[0.1, 0.1], [0.2, 0.2], [0.3, 0.3]])[..., None]
    assert act(shown[3])[:, 0].tolist() == pytest.approx([0.2, 0.0])


def test_a_resumed_policy_plans_on_exactly(tmp_path: Path) -> None:
    shown, torn = steps(8), policy()
    torch.manual_seed(0)
    for step in shown[:4]:
        torn(step)
    content = {"state_dict": {}, "mapo": {"stage": "finetune", "method": "mapo"}}
    write_checkpoint(content | {"policy": torn.state()}, tmp_path / "a.ckpt")
    state, drawn = read_checkpoint(tmp_path / "a.ckpt")["policy"], torch.get_rng_state()
    ahead = [torn(step) for step in shown[4:]]
    resumed, forgetful = policy(), policy()
    resumed.restore(state)
    forgetful.restore({name: state[name] for name in ("belief", "action")})  # of an old version
    for other, same in ((resumed, True), (forgetful, False)):
        torch.set_rng_state(drawn)
        again = [other(step) for step in shown[4:]]
        assert np.array_equal(again, ahead) == same


def test_a_policy_resumed_in_other_environments_begins_anew() -> None:
    torn = policy()
    torn(steps(1)[0])
    for envs in (1, 3):
        resumed, fresh, shown = policy(), policy(), steps(1, envs)[0]
        resumed.restore(torn.state())
        found = []
        for act in (resumed, fresh):
            torch.manual_seed(0)
            found.append(act(shown).tolist())
        assert found[0] == found[1]
        assert len(found[0]) == envs


def test_evaluation_repeats_and_collecting_draws() -> None:
    def played(explore: bool, seed: int = 5) -> list[Any]:
        torch.manual_seed(seed)
        act = policy(explore)
        return [act(step).tolist() for step in steps(4)]

    assert played(False) == played(False)
    assert played(True) == played(True)
    assert played(True) != played(False)


@pytest.mark.parametrize(
    ("where", "collects", "evaluates"),
    [("acting", True, False), ("evaluation", False, True), ("both", True, True)],
)
def test_where_says_what_is_planned(where: str, collects: bool, evaluates: bool) -> None:
    made = planner(where=where)
    module = FinetuneModule(made.world_model, made.agent, FinetuneConfig(), made)
    assert (acting(module, explore=True).planner is made) == collects
    assert (acting(module, explore=False).planner is made) == evaluates
    none = FinetuneModule(made.world_model, made.agent, FinetuneConfig())
    assert acting(none, explore=False).planner is None
