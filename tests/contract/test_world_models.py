"""The contract of `WorldModel`: every method, all kinds of dynamics, models of other kinds."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import NETWORKS, RSSM_METHODS, backbone, image, token_world
from torch import Tensor, nn

from mapo_lightning.config.compose import compose
from mapo_lightning.models.agents.dreamer import DreamerAgent
from mapo_lightning.models.agents.planner import Planner
from mapo_lightning.models.agents.settings import AgentConfig, PlanConfig
from mapo_lightning.models.interfaces import Belief, DifferentiableWorldModel, WorldModel
from mapo_lightning.models.rssm_world.transformer import TransformerDynamics
from mapo_lightning.models.rssm_world.world_model import RSSMWorldModel
from mapo_lightning.models.token_world.world_model import TokenWorldModel
from mapo_lightning.run.build import build_finetune
from mapo_lightning.run.config import RunConfig
from mapo_lightning.semantics.factory import semantic_dim
from mapo_lightning.types import Batch, ConfigError
from tests.contract.throwaways import CopyLastFrame, RandomShooting

CONF = Path(__file__).parents[2] / "conf"
ACTIONS = 3


def rssm_world(method: str, networks: str = "tiny", *words: str) -> nn.Module:
    chosen = [f"method={method}", "env=toy", image(networks, method), *words]
    cfg = compose(chosen, RunConfig, CONF).config
    world_model = build_finetune(cfg, ACTIONS, None)[0].world_model
    assert isinstance(world_model, nn.Module)
    return world_model


MAKERS: dict[str, Callable[[], nn.Module]] = {
    f"{method} {networks}": partial(rssm_world, method, networks)
    for method in RSSM_METHODS
    for networks in NETWORKS
}
MAKERS |= {
    f"{method} plain": partial(rssm_world, method, "tiny", "world_model.recurrence=plain")
    for method in ("mapo", "prelar")
}
MAKERS |= {
    f"{method} {kind}": partial(rssm_world, method, "tiny", *backbone(kind, method))
    for method, kind in (
        *((method, "transformer") for method in RSSM_METHODS),
        ("mapo", "gru+transformer"),
        ("mapo", "transformer+gru"),
    )
}
MAKERS["token world"] = partial(token_world, ACTIONS)
MAKERS["token world with phrases"] = lambda: token_world(
    ACTIONS, semantic_dim=semantic_width(), phrases=True
)
MAKERS["copy last frame"] = CopyLastFrame


@pytest.fixture(params=sorted(MAKERS))
def world(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return MAKERS[request.param]()


def semantic_width() -> int:
    return semantic_dim(compose(["env=toy"], RunConfig, CONF).config.vlm)


def side_of(world: nn.Module) -> int:
    """Side of the frames that a world model was made for; one of another kind takes any."""
    if isinstance(world, TokenWorldModel):
        return world.cfg.tokenizer.size
    return world.cfg.image.size if isinstance(world, RSSMWorldModel) else 64


def experience(world: nn.Module, batch: int = 2, time: int = 7) -> Batch:
    """Random experience, in frames of the side that the world model takes."""
    torch.manual_seed(1)
    side = side_of(world)
    first = torch.zeros(batch, time, dtype=torch.bool)
    first[:, 0] = True
    width = semantic_width()
    return {
        "obs": torch.randint(0, 256, (batch, time, side, side, 3), dtype=torch.uint8),
        "semantic": torch.randn(batch, time, width),
        "has_semantic": torch.rand(batch, time) < 0.7,
        "position": torch.arange(time).expand(batch, time),
        "is_first": first,
        "action": torch.rand(batch, time, ACTIONS) * 2 - 1,
        "reward": torch.rand(batch, time),
        "is_terminal": torch.zeros(batch, time, dtype=torch.bool),
        "is_last": torch.zeros(batch, time, dtype=torch.bool),
    }


def modes(module: nn.Module) -> list[bool]:
    return [m.training for m in module.modules()]


def assert_unchanged(module: nn.Module, state: dict[str, Any]) -> None:
    """No weight, no statistic and nothing that a module stores besides them has moved."""
    torch.testing.assert_close(dict(module.state_dict()), dict(state), rtol=0.0, atol=0.0)


@pytest.mark.slow
def test_a_belief_is_sliced_merged_and_repeated(world: nn.Module) -> None:
    assert isinstance(world, WorldModel)
    belief = world.observe(experience(world))
    assert isinstance(belief, Belief)
    assert belief.feat.shape == (2, 7, world.feat_dim)
    assert torch.equal(belief.at(3).feat, belief.feat[:, 3])
    assert torch.equal(belief.flatten().feat, belief.feat.flatten(0, 1))
    assert torch.equal(belief.at(0).repeat(2).feat, belief.feat[[0, 0, 1, 1], 0])
    assert not belief.detach().feat.requires_grad


@pytest.mark.slow
def test_following_goes_on_from_a_belief(world: nn.Module) -> None:
    assert isinstance(world, WorldModel)
    batch = experience(world)
    tail = {key: value[:, 4:] for key, value in batch.items()}
    with world.evaluating():
        head = world.observe({key: value[:, :4] for key, value in batch.items()})
        assert world.observe(tail, head.at(3)).feat.shape == (2, 3, world.feat_dim)


@pytest.mark.slow
def test_the_loss_trains_parameters_and_starts_dreams(world: nn.Module) -> None:
    assert isinstance(world, WorldModel)
    fit = world.loss(experience(world))
    assert torch.isfinite(fit.total)
    assert not any(value.requires_grad for value in fit.log.values())
    fit.total.backward()
    assert any(p.grad is not None for p in world.parameters())
    assert fit.belief.flatten().feat.shape == (14, world.feat_dim)


@pytest.mark.slow
def test_a_dream_has_one_more_state_than_actions_and_no_gradients(world: nn.Module) -> None:
    assert isinstance(world, WorldModel)
    start = world.observe(experience(world)).at(6)
    asked: list[int] = []

    def policy(i: int, belief: Belief) -> Tensor:
        assert belief.feat.shape == (2, world.feat_dim)
        asked.append(i)
        return torch.full((2, ACTIONS), i / 10)

    dream = world.imagine(start, policy, 4)
    assert asked == [0, 1, 2, 3]
    assert dream.feat.shape == (5, 2, world.feat_dim)
    torch.testing.assert_close(dream.feat[0], start.feat)
    assert dream.action is not None
    assert dream.action[:, 0, 0].tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert dream.reward.shape == dream.discount.shape == (5, 2)
    assert float(dream.discount.min()) >= 0.0
    assert float(dream.discount.max()) <= 1.0
    assert not dream.reward.requires_grad


@pytest.mark.slow
def test_a_dream_repeats_with_its_random_numbers(world: nn.Module) -> None:
    assert isinstance(world, WorldModel)
    start = world.observe(experience(world)).at(6).detach()
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(world.imagine(start, lambda _, b: torch.zeros(2, ACTIONS), 3).feat)
    assert torch.equal(*found)


@pytest.mark.slow
def test_actions_are_planned_in_any_world_model(world: nn.Module) -> None:
    """The same seed finds the same plan."""
    assert isinstance(world, WorldModel)
    belief = world.observe(experience(world)).at(6).detach()
    # This agent dreams before it acts, and nobody dreams on from a state that a transformer has
    # dreamt: what it looks back at stays with the first dream.
    inside = not (
        isinstance(world, RSSMWorldModel) and isinstance(world._dreaming, TransformerDynamics)
    )
    cfg = PlanConfig("mppi", population=6, horizon=2, iterations=2, elites=3, proposals=2 * inside)
    planner = Planner(cfg, 0.9, world, RandomShooting(world, ACTIONS))
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(planner.act(belief, None, torch.ones(2, dtype=torch.bool), False))
    (action, plan), (again, _) = found
    assert torch.equal(action, again)
    assert plan.shape == (2, 2, ACTIONS)
    assert 0.0 < float(action.abs().max()) <= 1.0


@pytest.mark.slow
def test_an_open_loop_video_leaves_every_mode_as_it_was(world: nn.Module) -> None:
    assert isinstance(world, WorldModel)
    world.train()
    before, batch = modes(world), experience(world)
    state = deepcopy(world.state_dict())
    frames = world.open_loop(batch, seen=3)
    assert frames.shape == batch["obs"].shape
    assert 0.0 <= float(frames.min()) <= float(frames.max()) <= 1.0
    assert modes(world) == before
    assert_unchanged(world, state)


@pytest.mark.slow
def test_acting_leaves_modes_and_statistics_as_they_were(world: nn.Module) -> None:
    assert isinstance(world, WorldModel)
    world.train()
    before, state = modes(world), deepcopy(world.state_dict())
    with world.evaluating(), torch.no_grad():
        world.observe(experience(world, time=1))
    assert modes(world) == before
    assert_unchanged(world, state)


@pytest.mark.slow
def test_parts_and_groups_hold_every_parameter_once(world: nn.Module) -> None:
    assert isinstance(world, WorldModel)
    learning = sorted(id(p) for p in world.parameters() if p.requires_grad)
    assert sorted(id(p) for ps in world.groups().values() for p in ps) == learning
    every = sorted(id(p) for p in world.parameters())
    assert sorted(id(p) for part in world.parts().values() for p in part.parameters()) == every


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_gradients_reach_the_actions_or_the_agent_that_needs_them_is_refused(kind: str) -> None:
    torch.manual_seed(0)
    world = MAKERS[kind]()
    assert isinstance(world, WorldModel)
    if not isinstance(world, DifferentiableWorldModel):
        name = type(world).__name__
        with pytest.raises(ConfigError, match=f"gradients through dreams, which {name}"):
            DreamerAgent(AgentConfig(), world, ACTIONS, 1, 4)
        return
    start = world.observe(experience(world)).at(6).detach()
    push = torch.zeros(2, ACTIONS, requires_grad=True)
    dream = world.imagine_with_gradients(start, lambda feat: push, 3)
    (grad,) = torch.autograd.grad(dream.reward.square().sum(), push)
    assert bool((grad != 0).any(dim=1).all())


@pytest.mark.parametrize("networks", NETWORKS)
def test_convolutions_keep_their_weights_as_frames_are_kept(networks: str) -> None:
    """Channels last: any other order costs a copy per layer, and nobody would see it."""
    weights = [p for p in rssm_world("mapo", networks).parameters() if p.ndim == 4]
    assert weights
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
