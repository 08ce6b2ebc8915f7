"""The contract of `ActionSource`: everything that can drive a dynamics model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mapo_lightning.models.rssm_world.action_source import (
    ActionSource,
    EnvAction,
    InverseAction,
    NullAction,
    PaddedAction,
    SemanticAction,
    build_action_source,
)
from mapo_lightning.models.rssm_world.rssm import RSSM, RSSMState
from mapo_lightning.models.rssm_world.settings import ImageConfig, RSSMConfig, SourceConfig
from mapo_lightning.types import Batch, ConfigError

WORDS, ACTIONS, WIDTH = 12, 3, 8
IMAGE = ImageConfig(channels=[4, 8, 16], layers=1)
CNN = ImageConfig(kind="cnn", channels=[4])
DYNAMICS = RSSMConfig(deter=6, hidden=7, stoch=4, classes=5)


def build(kind: str, controls: bool, image: ImageConfig = IMAGE, **words: object) -> ActionSource:
    cfg = SourceConfig(kind=kind, width=WIDTH, **words)
    return build_action_source(cfg, image, 7, WORDS, ACTIONS if controls else None)


# Everything that build_action_source can make: a new source adds its line.
SOURCES: dict[str, tuple[type[ActionSource], Callable[[], ActionSource]]] = {
    "null": (NullAction, lambda: build("null", False)),
    "null, controlled": (PaddedAction, lambda: build("null", True)),
    "semantic": (SemanticAction, lambda: build("semantic", False)),
    "semantic without position": (
        SemanticAction,
        lambda: build("semantic", False, position=False),
    ),
    "inverse": (InverseAction, lambda: build("inverse", False)),
    "inverse, cnn": (InverseAction, lambda: build("inverse", False, CNN)),
    "inverse, controlled": (EnvAction, lambda: build("inverse", True)),
}
# What of a batch each of them reads, apart from the shape that is_first gives.
READS = {
    NullAction: set(),
    PaddedAction: {"action"},
    EnvAction: {"action"},
    SemanticAction: {"semantic", "has_semantic", "position"},
    InverseAction: {"obs"},
}


@pytest.fixture(params=sorted(SOURCES))
def source(request: pytest.FixtureRequest) -> ActionSource:
    torch.manual_seed(0)
    kind, make = SOURCES[request.param]
    made = make()
    assert type(made) is kind
    return made


def batch_of(count: int = 2, time: int = 5) -> Batch:
    torch.manual_seed(1)
    first = torch.zeros(count, time, dtype=torch.bool)
    first[:, 0] = True
    return {
        "obs": torch.randint(0, 256, (count, time, 64, 64, 3), dtype=torch.uint8),
        "semantic": torch.randn(count, time, WORDS),
        "has_semantic": torch.rand(count, time) < 0.7,
        "position": torch.arange(time).expand(count, time),
        "is_first": first,
        "action": torch.rand(count, time, ACTIONS) * 2 - 1,
    }


def test_one_action_per_frame(source: ActionSource) -> None:
    driven = source(batch_of())
    assert driven.action.shape == (2, 5, source.action_dim)
    assert driven.action.dtype == torch.float32
    assert bool(torch.isfinite(driven.action).all())


def test_it_reads_what_it_says_and_nothing_else(source: ActionSource) -> None:
    """A source that looked at the robot's actions in pre-training would fail without them."""
    batch = batch_of()
    reads = READS[type(source)]
    torch.manual_seed(2)
    whole = source(batch).action
    torch.manual_seed(2)
    part = source({key: batch[key] for key in {*reads, "is_first"}}).action
    assert torch.equal(part, whole)
    for key in reads - {"position"}:
        torch.manual_seed(2)
        other = source(batch | {key: batch[key].flip(1)}).action
        assert not torch.equal(other, whole), f"{key} makes no difference"


def test_an_action_does_not_depend_on_later_frames(source: ActionSource) -> None:
    """The dynamics would otherwise be told the future."""
    source.eval()
    if isinstance(source, InverseAction):
        source.sampled = False  # its noise is drawn for a whole clip at once
    batch = batch_of()
    head = {key: value[:, :3] for key, value in batch.items()}
    torch.testing.assert_close(source(head).action, source(batch).action[:, :3])


def test_other_clips_of_the_batch_do_not_matter(source: ActionSource) -> None:
    source.eval()
    if isinstance(source, InverseAction):
        source.sampled = False
    batch = batch_of()
    alone = source({key: value[1:] for key, value in batch.items()}).action
    torch.testing.assert_close(alone[0], source(batch).action[1])


def test_gradients_reach_every_parameter_it_has(source: ActionSource) -> None:
    action = source(batch_of()).action
    if not list(source.parameters()):
        assert not action.requires_grad
        return
    action.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in source.parameters())


def test_its_losses_are_those_that_it_names(source: ActionSource) -> None:
    """And finite scalars with gradients; the weights' names are checked against ``terms``."""
    torch.manual_seed(3)
    batch, dynamics = batch_of(), RSSM(DYNAMICS, source.action_dim, 9)
    driven = source(batch)
    start = RSSMState.of(torch.zeros(2, 6), torch.zeros(2, 4, 5), torch.zeros(2, 4, 5))
    post, prior = dynamics.observe(
        driven.action, torch.randn(2, 5, 9), batch["is_first"], start, torch.rand(2, 5, 4)
    )
    terms = source.losses(driven, dynamics, post, prior)
    assert tuple(terms) == source.terms
    for term in terms.values():
        assert term.ndim == 0
        assert bool(torch.isfinite(term))
        assert term.requires_grad


def test_every_kind_of_source_is_here() -> None:
    kinds = {kind for kind, _ in SOURCES.values()}
    assert kinds == set(READS) == set(ActionSource.__subclasses__())


def test_an_action_wider_than_its_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="has 9 numbers but world_model"):
        build_action_source(SourceConfig(kind="null", width=WIDTH), IMAGE, 7, WORDS, 9)
