"""Disagreement of one-step predictors: exact values, and nothing else that is learned moves."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mapo_lightning.config.compose import compose
from mapo_lightning.models.rssm_world.ensemble import Ensemble
from mapo_lightning.models.rssm_world.rssm import RSSMState
from mapo_lightning.models.rssm_world.settings import EnsembleConfig, RSSMConfig
from mapo_lightning.models.rssm_world.world_model import RSSMWorldModel
from mapo_lightning.run.build import build_finetune, build_pretrain
from mapo_lightning.run.config import RunConfig
from mapo_lightning.training.finetune import FinetuneModule
from mapo_lightning.types import ConfigError
from tests.contract.test_world_models import ACTIONS, experience

CONF = Path(__file__).parents[2] / "conf"
RSSM = RSSMConfig(deter=4, hidden=4, stoch=2, classes=3)


def ensemble(members: int = 2, action_dim: int = 1, hidden: int = 8) -> Ensemble:
    torch.manual_seed(0)
    return Ensemble(EnsembleConfig(members, hidden, 1), RSSM, action_dim)


def says(made: Ensemble, *logits: list[list[float]]) -> Ensemble:
    """Let each member say the same of every step: logits (S, K)."""
    for member, given in zip(made.members, logits, strict=True):
        assert isinstance(member, nn.Sequential)
        last = member[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        last.bias.data = torch.tensor(given).flatten()
    return made


def test_disagreement_is_the_gain_of_information() -> None:
    sure, other, even = [9e3, 0.0, 0.0], [0.0, 9e3, 0.0], [0.0, 0.0, 0.0]
    feat, action = torch.randn(5, RSSM.feat), torch.randn(5, 1)
    alike = says(ensemble(), [sure, even], [sure, even])
    assert alike.disagreement(feat, action).tolist() == pytest.approx([0.0] * 5, abs=1e-6)
    opposed = says(ensemble(), [sure, even], [other, even])  # one bit, in one of two groups
    assert opposed.disagreement(feat, action).tolist() == pytest.approx([math.log(2)] * 5)
    both = says(ensemble(), [sure, sure], [other, other])
    assert both.disagreement(feat, action).tolist() == pytest.approx([2 * math.log(2)] * 5)
    # One says 1, 0, 0 and one says 1/3, 1/3, 1/3: the mean is 2/3, 1/6, 1/6.
    half = says(ensemble(), [sure, even], [even, even])
    mean = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 6))
    expected = mean - 0.5 * math.log(3)
    assert half.disagreement(feat, action).tolist() == pytest.approx([expected] * 5)


def test_each_member_learns_the_state_that_followed_and_none_across_episodes() -> None:
    made = says(ensemble(), [[0.0] * 3] * 2, [[math.log(2), 0.0, 0.0], [0.0] * 3])
    sure = torch.tensor([60.0, 0.0, 0.0]).expand(1, 3, 2, 3)
    state = RSSMState(torch.randn(1, 3, RSSM.feat, requires_grad=True), sure.clone())
    state.logits.requires_grad_()
    first = torch.tensor([[True, False, True]])
    # Group 1: the first member errs by ln 3, the second by ln 2; group 2: both by ln 3.
    expected = 0.5 * (math.log(3) + math.log(2)) + math.log(3)
    error = made.loss(*state, torch.randn(1, 3, 1), first)
    assert error.item() == pytest.approx(expected)
    error.backward()
    assert state.feat.grad is None
    assert state.logits.grad is None
    assert all(p.grad is not None for p in made.parameters())
    nothing = made.loss(*state, torch.randn(1, 3, 1), torch.ones(1, 3, dtype=torch.bool))
    assert nothing.item() == 0.0


def test_a_prediction_reads_the_action_that_led_to_what_is_predicted() -> None:
    made = ensemble()
    state = RSSMState(torch.randn(1, 3, RSSM.feat), torch.randn(1, 3, 2, 3))
    first = torch.tensor([[True, False, True]])

    def error(*action: float) -> float:
        return made.loss(*state, torch.tensor(action)[None, :, None], first).item()

    assert error(0.0, 0.5, 0.0) == error(1.0, 0.5, -1.0)  # those lead to first frames
    assert error(0.0, 0.5, 0.0) != error(0.0, -0.5, 0.0)


def test_it_knows_what_it_has_seen() -> None:
    """Steps that lead anywhere, learned by heart: those it has not seen are not known."""
    made = ensemble(5, hidden=64)
    optimizer = torch.optim.Adam(made.parameters(), 1e-2)
    torch.manual_seed(1)
    feat, action = torch.randn(64, 2, RSSM.feat), torch.rand(64, 2, 1)
    state = RSSMState(feat, 4.0 * torch.randn(64, 2, 2, 3))
    first = torch.tensor([[True, False]]).expand(64, -1)
    for _ in range(300):
        optimizer.zero_grad()
        made.loss(*state, action, first).backward()
        optimizer.step()
    known = made.disagreement(feat[:, 0], action[:, 1]).mean()
    unknown = made.disagreement(torch.randn(64, RSSM.feat), action[:, 1]).mean()
    assert float(known) < 0.25 * float(unknown)


def module(*words: str) -> FinetuneModule:
    torch.manual_seed(0)
    cfg = compose(["env=toy", "agent.horizon=3", *words], RunConfig, CONF).config
    made, _ = build_finetune(cfg, ACTIONS, None)
    made.drawn = torch.get_rng_state()  # type: ignore[assignment]
    return made


MEMBERS = "world_model.ensemble.members=3"


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        [],
        ["method=prelar"],
        ["method=dreamerv2"],
        ["world_model.recurrence=plain"],
        ["agent=dreamerv3"],
        ["agent=dreamerv3", "agent.gradient=dynamics"],
    ],
    ids=str,
)
def test_nothing_else_that_is_learned_moves(words: list[str]) -> None:
    without, with_it = module(*words), module(*words, MEMBERS)
    assert torch.equal(without.drawn, with_it.drawn)  # type: ignore[arg-type]
    logs = []
    for one in (without, with_it):
        batch = experience(one.world_model)
        torch.manual_seed(2)
        total, log = one.losses(batch)
        total.backward()
        logs.append(log)
    parts = dict(with_it.named_parameters())
    for name, parameter in without.named_parameters():
        other = parts.pop(name)
        assert torch.equal(parameter, other), name
        if parameter.grad is None:
            assert other.grad is None, name
        else:
            assert other.grad is not None
            assert torch.equal(parameter.grad, other.grad), name
    assert all(".ensemble." in name for name in parts)
    assert all(p.grad is not None and p.grad.any() for p in parts.values())
    for name, value in logs[0].items():
        if name != "world_model":  # the sum of all terms
            assert torch.equal(value, logs[1].pop(name)), name
    assert set(logs[1]) == {"world_model", "ensemble", "uncertainty"}
    assert float(logs[1]["uncertainty"]) > 0.0
    gained = logs[1]["world_model"] - logs[0]["world_model"]
    assert float(gained) == pytest.approx(float(logs[1]["ensemble"]), rel=1e-3)
    assert set(with_it.world_model.groups()) - set(without.world_model.groups()) == {"ensemble"}


@pytest.mark.slow
@pytest.mark.parametrize("recurrence", ["fused", "plain"])
def test_a_dream_says_how_little_is_known_of_its_steps(recurrence: str) -> None:
    made = module(MEMBERS, f"world_model.recurrence={recurrence}")
    world = made.world_model
    assert isinstance(world, RSSMWorldModel)
    assert world.ensemble is not None
    start = world.observe(experience(world)).at(6).detach()
    actions = torch.rand(3, 2, ACTIONS) * 2 - 1
    dream = world.imagine(start, lambda i, _: actions[i], 3)
    assert dream.uncertainty is not None
    assert dream.uncertainty.shape == (4, 2)
    assert dream.uncertainty[0].tolist() == [0.0, 0.0]
    expected = world.ensemble.disagreement(dream.feat[:-1], actions)
    assert torch.equal(dream.uncertainty[1:], expected)
    assert float(expected.min()) > 0.0
    rest = iter(actions)

    def policy(feat: Tensor) -> Tensor:
        return next(rest)

    again = world.imagine_with_gradients(start, policy, 3)
    assert again.uncertainty is not None
    torch.testing.assert_close(
        again.uncertainty[1:], world.ensemble.disagreement(again.feat[:-1].detach(), actions)
    )
    assert not again.uncertainty.requires_grad
    assert module().world_model.imagine(start, lambda i, _: actions[i], 3).uncertainty is None


@pytest.mark.slow
def test_pre_training_has_none() -> None:
    cfg = compose(["env=toy", MEMBERS], RunConfig, CONF).config
    assert "ensemble" not in build_pretrain(cfg).world_model.parts()


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="got 1: one cannot disagree"):
        EnsembleConfig(1)
    words = ["env=toy", "agent.plan.caution=0.5", "agent.plan.kind=cem"]
    with pytest.raises(ConfigError, match=r"caution=0.5 .* train one with world_model.ensemble"):
        compose(words, RunConfig, CONF)
    assert compose([*words, MEMBERS], RunConfig, CONF).config.agent.plan.caution == 0.5
