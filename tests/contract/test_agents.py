"""The contract of `Agent`: Dreamer, a planner without weights, an agent with its own optimisers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import backbone, token_world
from torch import nn

from mapo_lightning.models.agents.dreamer import DreamerAgent
from mapo_lightning.models.agents.mbpo import MBPOAgent
from mapo_lightning.models.agents.settings import AgentConfig, MBPOConfig
from mapo_lightning.models.interfaces import Agent, WorldModel
from mapo_lightning.training.acting import ActingPolicy
from mapo_lightning.training.checkpoint import check_fit, read_checkpoint, write_checkpoint
from mapo_lightning.training.finetune import FinetuneModule
from mapo_lightning.training.settings import FinetuneConfig
from mapo_lightning.types import ConfigError
from tests.contract.test_world_models import ACTIONS, experience, rssm_world
from tests.contract.throwaways import CopyLastFrame, DreamtFrames, RandomShooting

Pair = Callable[[], tuple[nn.Module, nn.Module]]


def dreamer() -> tuple[nn.Module, nn.Module]:
    world = rssm_world("mapo")
    cfg = AgentConfig(horizon=3, target_every=2, explore_noise=0.5)
    return world, DreamerAgent(cfg, world, ACTIONS, 1, 8)  # type: ignore[arg-type]


def dreamer_in_transformers() -> tuple[nn.Module, nn.Module]:
    world = rssm_world("mapo", "tiny", *backbone("transformer", "mapo"))
    return world, DreamerAgent(AgentConfig(horizon=3, target_every=2), world, ACTIONS, 1, 8)  # type: ignore[arg-type]


def planner_in_a_transformer() -> tuple[nn.Module, nn.Module]:
    world = rssm_world("prelar", "tiny", *backbone("transformer", "prelar"))
    return world, RandomShooting(world, ACTIONS)  # type: ignore[arg-type]


def dreamer_by_likelihood() -> tuple[nn.Module, nn.Module]:
    """In a world model that gives no gradients through its dreams."""
    world = CopyLastFrame()
    cfg = AgentConfig(horizon=3, target_every=1, target_rate=0.5, gradient="reinforce")
    return world, DreamerAgent(cfg, world, ACTIONS, 1, 8)


def planner() -> tuple[nn.Module, nn.Module]:
    world = rssm_world("prelar")
    return world, RandomShooting(world, ACTIONS)  # type: ignore[arg-type]


def planner_in_pixels() -> tuple[nn.Module, nn.Module]:
    world = CopyLastFrame()
    return world, RandomShooting(world, ACTIONS)


def owner() -> tuple[nn.Module, nn.Module]:
    world = CopyLastFrame()
    return world, DreamtFrames(world, ACTIONS)


def mbpo() -> tuple[nn.Module, nn.Module]:
    world = token_world(ACTIONS, tokenizer_every=1)
    cfg = MBPOConfig(hold=1, updates=2, batch=8, hidden=16, dreams=3, horizon=4, first_rounds=1)
    return world, MBPOAgent(cfg, world, ACTIONS)


PAIRS: list[Pair] = [dreamer, dreamer_by_likelihood, planner, planner_in_pixels, owner, mbpo]
PAIRS += [dreamer_in_transformers, planner_in_a_transformer]


def module_of(pair: Pair, **settings: Any) -> FinetuneModule:
    torch.manual_seed(0)
    world, agent = pair()
    assert isinstance(world, WorldModel)
    assert isinstance(agent, Agent)
    return FinetuneModule(world, agent, FinetuneConfig(**settings))


def train(module: FinetuneModule, updates: int) -> None:
    optimizer = module.configure_optimizers()
    for made in range(updates):
        if made:
            module.agent.after_update(made)
        total, _ = module.losses(experience(module.world_model))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("explore", [False, True])
def test_actions_have_their_shape_and_range(pair: Pair, explore: bool) -> None:
    module = module_of(pair)
    belief = module.world_model.observe(experience(module.world_model)).at(6).detach()
    action = module.agent.act(belief, explore)
    assert action.shape == (2, module.agent.action_dim)
    assert float(action.detach().abs().max()) <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_an_agent_acts_in_environments_step_after_step(pair: Pair) -> None:
    module = module_of(pair)
    act, batch = (
        ActingPolicy(module.world_model, module.agent, True),
        experience(module.world_model),
    )
    for t in range(3):
        step = {k: v[:, t].numpy() for k, v in batch.items() if k not in ("action", "reward")}
        assert act(step).shape == (2, ACTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [dreamer, dreamer_in_transformers, planner_in_a_transformer])
def test_acting_goes_on_from_its_state(pair: Pair, tmp_path: Path) -> None:
    """What is stored in the middle of episodes, of which one begins later, changes no action."""
    module = module_of(pair).eval()
    batch = experience(module.world_model, time=6)
    batch["is_first"][1, 2] = True

    def acted(policy: ActingPolicy, steps: range) -> list[Any]:
        found = []
        for t in steps:
            torch.manual_seed(t)
            step = {k: v[:, t].numpy() for k, v in batch.items() if k not in ("action", "reward")}
            found.append(policy(step).tolist())
        return found

    whole = ActingPolicy(module.world_model, module.agent, False)
    expected = acted(whole, range(6))
    first = ActingPolicy(module.world_model, module.agent, False)
    assert acted(first, range(4)) == expected[:4]
    card, path = {"stage": "finetune", "method": "mapo"}, tmp_path / "last.ckpt"
    write_checkpoint({"state_dict": {}, "mapo": card, "acting": first.state()}, path)
    again = ActingPolicy(module.world_model, module.agent, False)
    again.restore(read_checkpoint(path)["acting"])
    assert acted(again, range(4, 6)) == expected[4:]
    fresh = ActingPolicy(module.world_model, module.agent, False)
    assert acted(fresh, range(4, 6)) != expected[4:]


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_three_updates_move_what_an_agent_has(pair: Pair) -> None:
    module = module_of(pair)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    train(module, 4)
    still = {
        n for n, p in module.named_parameters() if p.requires_grad and torch.equal(p, before[n])
    }
    assert not {n for n in still if not n.startswith("agent.target")}


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_a_checkpoint_holds_all_of_an_agent(pair: Pair, tmp_path: Path) -> None:
    """Two modules go on alike from one file; Lightning's own optimiser is not part of this."""
    module, other, path = module_of(pair), module_of(pair), tmp_path / "last.ckpt"
    train(module, 3)
    card = {"stage": "finetune", "method": "mapo"}
    write_checkpoint({"state_dict": module.state_dict(), "mapo": card}, path)
    stored = read_checkpoint(path)
    check_fit(other, stored, path)
    other.load_state_dict(stored["state_dict"])
    for one in (module, other):
        train(one, 2)
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_optimisers_of_its_own_keep_their_moments_and_paces() -> None:
    module = module_of(owner)
    agent = module.agent
    assert isinstance(agent, DreamtFrames)
    train(module, 5)
    paces = [int(next(iter(o.state.values()))["step"]) for o in (agent.fast, agent.slow)]
    assert paces == [4, 2]
    again = module_of(owner).agent
    assert isinstance(again, DreamtFrames)
    again.load_state_dict(agent.state_dict())
    assert [int(next(iter(o.state.values()))["step"]) for o in (again.fast, again.slow)] == paces
    assert len(agent.buffer) == 5


def test_exploration_noise_is_added_while_exploring_only() -> None:
    module = module_of(dreamer)
    belief = module.world_model.observe(experience(module.world_model)).at(6).detach()
    agent = module.agent
    assert isinstance(agent, DreamerAgent)
    assert torch.equal(agent.act(belief, False), agent.policy(belief.feat).mode())
    agent.cfg.greedy = "mean"
    assert torch.equal(agent.act(belief, False), agent.policy(belief.feat).expectation())
    torch.manual_seed(4)
    noisy = agent.act(belief, True)
    agent.cfg.explore_noise = 0.0
    torch.manual_seed(4)
    quiet = agent.act(belief, True)
    assert not torch.equal(noisy, quiet)
    torch.manual_seed(4)
    torch.rand_like(quiet)
    torch.testing.assert_close(noisy, (quiet + 0.5 * torch.randn_like(quiet)).clamp(-1, 1))


@pytest.mark.slow
def test_a_group_without_a_learning_rate_is_refused() -> None:
    world, agent = dreamer()
    agent.groups = lambda: {"navigator": []}  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="no learning rate for the parameters of navigator"):
        FinetuneModule(world, agent, FinetuneConfig())  # type: ignore[arg-type]


def test_a_part_that_is_not_there_cannot_be_frozen() -> None:
    with pytest.raises(ConfigError, match="freeze names retina"):
        module_of(dreamer, freeze=["retina"])


@pytest.mark.slow
def test_an_agent_learns_in_a_frozen_world_model() -> None:
    parts = sorted(dreamer()[0].parts())
    module = module_of(dreamer, freeze=parts)
    train(module, 1)
    learns = {n.split(".")[0] for n, p in module.named_parameters() if p.grad is not None}
    assert learns == {"agent"}


@pytest.mark.slow
def test_something_has_to_learn() -> None:
    world, agent = dreamer()
    agent.groups = dict  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="leaves nothing to learn: the agent DreamerAgent"):
        FinetuneModule(world, agent, FinetuneConfig(freeze=sorted(world.parts())))  # type: ignore[arg-type]


def test_an_agent_without_parameters_has_nothing_to_update_twice() -> None:
    with pytest.raises(ConfigError, match=r"agent_updates=2 .* but RandomShooting has none"):
        module_of(planner, agent_updates=2)
