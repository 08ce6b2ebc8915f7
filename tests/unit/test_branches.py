"""Futures of one state, and the dreams of them that world models give."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from dream_truths import SEMANTIC, Unlabelled, record, with_negatives
from networks import backbone, token_world
from torch import nn

from mapo_lightning.envs.episodes import RandomPolicy
from mapo_lightning.envs.factory import make_env
from mapo_lightning.envs.settings import EnvConfig
from mapo_lightning.envs.toy import SPEED, reward_at
from mapo_lightning.judging.branches import (
    BranchPlan,
    opposed_sequences,
    random_sequences,
    record_branches,
)
from mapo_lightning.judging.consistency import counterfactual_consistency
from mapo_lightning.judging.decisions import decision_fidelity
from mapo_lightning.judging.dreams import Dreams, dream_sequences
from mapo_lightning.judging.foresight import foresight, record_foresight
from mapo_lightning.models.agents.dreamer import DreamerAgent
from mapo_lightning.models.agents.mbpo import MBPOAgent
from mapo_lightning.models.agents.settings import AgentConfig, MBPOConfig
from mapo_lightning.models.interfaces import Belief, Draughtsman, Dream, Policy
from mapo_lightning.types import ConfigError, MapoError
from tests.contract.test_world_models import rssm_world
from tests.contract.throwaways import CopyLastFrame, FrameBelief, RandomShooting

TOY = EnvConfig(size=32)
PLAN = BranchPlan(contexts=3, steps=6, shown=4)


class SeesTheDisc(CopyLastFrame):
    """A world model that knows the toy: it finds the disc in the last frame and moves it."""

    @torch.no_grad()
    def imagine(self, start: Belief, policy: Policy, steps: int) -> Dream:
        assert isinstance(start, FrameBelief)
        picture = start.frame.float()
        red = (picture[..., 0] - picture[..., 1:].amax(-1) - 60.0).clamp(min=0.0)
        size = red.shape[1]
        middle = (torch.arange(size) + 0.5) / size
        total = red.sum((1, 2))
        place = torch.stack(
            [(red.sum(1) * middle).sum(1) / total, (red.sum(2) * middle).sum(1) / total], -1
        )
        rewards, frames, actions = [torch.zeros(len(picture))], [start.frame], []
        for step in range(steps):
            actions.append(policy(step, start))
            length = actions[-1].norm(dim=-1, keepdim=True).clamp(min=1.0)
            place = (place + SPEED * actions[-1] / length).clamp(0.12, 0.88)
            distance = (place - 0.5).norm(dim=-1)
            rewards.append(torch.tensor([reward_at(float(x)) for x in distance]))
            x, y = middle[None, None, :], middle[None, :, None]
            disc = ((x - place[:, :1, None]).square() + (y - place[:, 1:, None]).square()) < 0.0144
            frames.append((disc[..., None] * torch.tensor([240, 60, 50])).to(torch.uint8))
        reward = torch.stack(rewards)
        feat = FrameBelief(torch.stack(frames)).feat
        return Dream(
            feat, reward, torch.ones_like(reward), torch.stack(actions), torch.stack(frames)
        )


def rssm(*words: str) -> nn.Module:
    torch.manual_seed(0)
    return rssm_world("mapo", "tiny", "vlm=none", f"vlm.hidden_dim={SEMANTIC}", *words)


def fixed(action: float, steps: int = 6) -> Any:
    return lambda shown, rng: np.full((1, steps, 2), action, np.float32)


def test_branches_start_in_the_last_frame_shown_and_repeat_exactly() -> None:
    draw = with_negatives(2, 6, 2)
    one, two = (record(TOY, draw, PLAN) for _ in range(2))
    for a, b in zip([*one[1:], *one.shown.values()], [*two[1:], *two.shown.values()], strict=True):
        np.testing.assert_array_equal(a, b)
    assert one.frames.shape == (3, 4, 7, 32, 32, 3)
    assert one.actions.shape == (3, 4, 6, 2)
    assert one.shown["obs"].shape == (3, 4, 32, 32, 3)
    np.testing.assert_array_equal(one.frames[:, :, 0], one.shown["obs"][:, -1:].repeat(4, 1))
    assert one.shown["is_first"].tolist() == [[True, False, False, False]] * 3
    assert (one.shown["action"][:, 1:] != 0).any(axis=(1, 2)).all()
    assert not one.terminated.any()
    other = record(TOY, draw, PLAN, seed=1)
    assert (other.frames != one.frames).any()
    fewer = record(TOY, draw, BranchPlan(2, 6, 4))  # a context depends on no other
    np.testing.assert_array_equal(fewer.frames, one.frames[:2])


def test_rewards_are_those_of_the_environment() -> None:
    found = record(TOY, fixed(0.0), PLAN)
    for context in range(3):  # the disc stands still, so nothing changes
        assert len(set(found.reward[context, 0])) == 1
        np.testing.assert_array_equal(found.frames[context, 0, 0], found.frames[context, 0, -1])
    np.testing.assert_allclose(found.returns[:, :, -1], 6 * found.reward[:, :, 0])
    assert set(found.success.ravel()) <= {0.0, 1.0}


def test_the_closed_loop_is_what_the_policy_would_have_done_anyway() -> None:
    env, label = make_env(TOY, 0), Unlabelled()

    def chase(step: Any) -> Any:
        return env.simulator.optimal_action()[None]  # type: ignore[attr-defined]

    def record_it(sequences: Any) -> Any:
        plan = BranchPlan(3, 6, 4, closed=True)
        return record_branches(env, label, lambda _: chase, sequences, plan, 0)

    some, none = record_it(random_sequences(3, 6, 2)), record_it(fixed(0.5))
    assert some.frames.shape[1] == 4
    np.testing.assert_array_equal(some.shown["obs"], none.shown["obs"])
    assert (some.returns[:, -1, -1] >= some.returns[:, :-1, -1].max(axis=1) - 1e-9).all()


def test_what_does_not_fit_into_an_episode_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="do not fit into an episode of toy/disc, which has at mo"
    ):
        record(TOY, fixed(0.0, 50), BranchPlan(1, 50))
    with pytest.raises(ConfigError, match="contexts must be at least 1, got 0"):
        BranchPlan(0, 5)
    falls = EnvConfig(kind="gym", name="InvertedPendulum-v5", size=16)
    with pytest.raises(MapoError, match="20 episodes of gym/InvertedPendulum-v5 in a row ended"):
        record(
            falls, fixed(0.0), BranchPlan(1, 6, 200), policy=lambda _: lambda step: np.ones((1, 1))
        )


@pytest.mark.slow
def test_after_the_end_nothing_is_earned_and_the_last_frame_stays() -> None:
    falls = EnvConfig(kind="gym", name="InvertedPendulum-v5", size=16)
    still = lambda _: lambda step: np.zeros((1, 1), np.float32)  # noqa: E731
    push = lambda shown, rng: np.ones((1, 40, 1), np.float32)  # noqa: E731
    found = record(falls, push, BranchPlan(1, 40, 2), policy=still)
    ended = int(found.terminated[0, 0].argmax())
    assert found.terminated.sum() == 1
    assert 0 < ended < 39
    assert (found.reward[0, 0, ended + 1 :] == 0).all()
    assert (found.frames[0, 0, ended + 1 :] == found.frames[0, 0, -1]).all()
    assert np.isnan(found.success).all()


def test_a_world_model_that_knows_the_task_is_found_to_do_so() -> None:
    """Frames, rewards and actions of truth and dream belong to the same steps."""
    played = record(EnvConfig(size=64), with_negatives(4, 8, 2), BranchPlan(6, 8, 3))
    knows = dream_sequences(SeesTheDisc(), played.shown, played.actions, 0)
    np.testing.assert_allclose(knows.reward, played.reward, atol=0.03)
    found = decision_fidelity(played.returns, knows.returns())
    assert np.nanmean(found["regret"][:, -1]) < 0.02
    assert np.nanmean(found["accuracy"][:, -1]) > 0.95
    blind = dream_sequences(CopyLastFrame(), played.shown, played.actions, 0)
    assert np.nanmean(decision_fidelity(played.returns, blind.returns())["accuracy"]) == 0.5
    pair = record(EnvConfig(size=64), opposed_sequences(8, 2, hold=8), BranchPlan(6, 8, 3))
    for model, low, high in ((SeesTheDisc(), 0.8, 1.0), (CopyLastFrame(), 0.0, 0.0)):
        film = dream_sequences(model, pair.shown, pair.actions, 0).frames
        direction = counterfactual_consistency(pair.frames, film)["direction"]
        assert low <= np.nanmean(direction[:, -1]) <= high


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [rssm, partial(rssm, *backbone("transformer", "mapo")), partial(token_world, 2)],
    ids=["rssm", "transformer", "tokens"],
)
def test_every_kind_of_world_model_dreams_sequences(make: Any) -> None:
    world = make()
    played = record(TOY, random_sequences(3, 6, 2), PLAN)
    actions = played.actions[:, [0, 1, 2, 0]] if isinstance(world, Draughtsman) else played.actions
    before, state = world.training, torch.get_rng_state()
    one, two = (dream_sequences(world, played.shown, actions, seed=5) for _ in range(2))
    assert world.training == before
    assert (torch.get_rng_state() == state).all()
    assert one.frames.shape == (*actions.shape[:2], 7, 32, 32, 3)
    assert one.frames.dtype == np.uint8
    np.testing.assert_array_equal(one.frames, two.frames)
    np.testing.assert_array_equal(one.reward, two.reward)
    assert one.reward.shape == one.alive.shape == actions.shape[:3]
    if isinstance(world, Draughtsman):  # the same random numbers for every sequence
        np.testing.assert_array_equal(one.frames[:, 0], one.frames[:, 3])
        assert (one.reward[:, 0] == one.reward[:, 3]).all()
        assert (one.reward[:, 0] != one.reward[:, 1]).any()


def test_returns_count_the_end_and_the_value() -> None:
    reward = np.array([[[1.0, 2.0, 4.0]]])
    alive, value = np.array([[[1.0, 0.5, 0.5]]]), np.array([[[10.0, 20.0, 30.0]]])
    dreams = Dreams(np.zeros(0, np.uint8), reward, alive, value)
    np.testing.assert_allclose(dreams.returns()[0, 0], [1.0, 2.0, 4.0])
    np.testing.assert_allclose(dreams.returns(0.5)[0, 0], [1.0, 1.5, 2.0])
    np.testing.assert_allclose(
        dreams.returns(0.5, value=True)[0, 0],
        [10.0, 1.0 + 0.25 * 20.0, 1.0 + 0.5 + 0.125 * 30.0],
    )
    with pytest.raises(ConfigError, match="has no critic"):
        dreams._replace(value=None).returns(value=True)


def test_a_world_model_that_draws_nothing_is_refused() -> None:
    class Blank(CopyLastFrame):
        def imagine(self, start: Belief, policy: Policy, steps: int) -> Dream:
            return super().imagine(start, policy, steps)._replace(frames=None)

    played = record(TOY, random_sequences(2, 6, 2), PLAN)
    with pytest.raises(ConfigError, match="dreams of a Blank cannot be judged by their looks"):
        dream_sequences(Blank(), played.shown, played.actions, 0)


def agents() -> dict[str, Any]:
    def dreamer() -> tuple[nn.Module, nn.Module]:
        world = rssm()
        return world, DreamerAgent(AgentConfig(horizon=3), world, 2, 1, 8)  # type: ignore[arg-type]

    def mbpo() -> tuple[nn.Module, nn.Module]:
        world = token_world(2)
        cfg = MBPOConfig(hold=1, updates=2, batch=8, hidden=16, dreams=3, horizon=4, first_rounds=1)
        return world, MBPOAgent(cfg, world, 2)

    def shooting() -> tuple[nn.Module, nn.Module]:
        world = SeesTheDisc()
        return world, RandomShooting(world, 2)

    return {"dreamer": dreamer, "mbpo": mbpo, "shooting": shooting}


@pytest.mark.slow
@pytest.mark.parametrize("make", agents().values(), ids=agents().keys())
def test_an_agent_imagines_and_both_ways_are_played(make: Any) -> None:
    torch.manual_seed(0)
    world, agent = make()
    rows = []
    for _ in range(2):
        env = make_env(EnvConfig(size=32), 0)
        rows.append(record_foresight(env, Unlabelled(), world, agent, BranchPlan(3, 5, 4), seed=2))
    found = rows[0]
    for one, two in zip(found, rows[1], strict=True):
        for a, b in zip(one, two, strict=True):
            if a is not None:
                np.testing.assert_array_equal(a, b)
    for way in found:
        assert way.frames.shape == (3, 6, 32, 32, 3)
        assert way.feat.shape == (3, 6, world.feat_dim)
        assert way.reward.shape == (3, 5)
        np.testing.assert_array_equal(way.feat[:, 0], found.imagined.feat[:, 0])  # one belief
    np.testing.assert_array_equal(found.executed.frames[:, 0], found.closed.frames[:, 0])
    metrics = foresight(found)
    assert set(metrics) == {
        f"{way}_{name}" for way in ("executed", "closed") for name in ("frames", "still", "belief")
    }
    assert all(value.shape == (3, 5) for value in metrics.values())
    if isinstance(world, SeesTheDisc):  # it foresees what its actions do, on a black floor
        np.testing.assert_allclose(found.imagined.reward, found.executed.reward, atol=0.05)


@pytest.mark.slow
def test_agents_that_only_watch_go_on_from_the_same_states() -> None:
    found = []
    for make in (agents()["dreamer"], agents()["mbpo"]):
        torch.manual_seed(0)
        world, agent = make()
        leader, env = partial(RandomPolicy, 2, hold=2), make_env(EnvConfig(size=32), 0)
        plan = BranchPlan(3, 5, 4)
        found.append(record_foresight(env, Unlabelled(), world, agent, plan, 2, leader))
    one, two = found
    np.testing.assert_array_equal(one.closed.frames[:, 0], two.closed.frames[:, 0])
    assert len({frame.tobytes() for frame in one.closed.frames[:, 0]}) == 3
    # From there on each acts for itself, and imagines that it will.
    assert not np.array_equal(one.closed.frames[:, 1:], two.closed.frames[:, 1:])
    assert not np.array_equal(one.imagined.reward, two.imagined.reward)


@pytest.mark.slow
def test_a_led_agent_does_what_it_would_do_in_the_same_belief() -> None:
    """The first action after the lead is the agent's own, as its imagination's first one is."""
    torch.manual_seed(0)
    world, agent = agents()["dreamer"]()
    leader, env = partial(RandomPolicy, 2, hold=2), make_env(EnvConfig(size=32), 0)
    found = record_foresight(env, Unlabelled(), world, agent, BranchPlan(3, 5, 4), 2, leader)
    np.testing.assert_array_equal(found.closed.frames[:, 1], found.executed.frames[:, 1])
    np.testing.assert_array_equal(found.closed.reward[:, 0], found.executed.reward[:, 0])
