"""The contract of `Stepwise`: a dream that is dreamt step by step is the one dreamt at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from networks import RSSM_METHODS, backbone, image, token_world
from torch import Tensor, nn

from mapo_lightning.config.compose import compose
from mapo_lightning.models.interfaces import Dreaming, Stepwise
from mapo_lightning.models.rssm_world.action_source import InverseAction
from mapo_lightning.models.rssm_world.decoder import CrossAttention
from mapo_lightning.models.rssm_world.world_model import RSSMWorldModel
from mapo_lightning.models.token_world.world_model import TokenWorldModel
from mapo_lightning.run.build import build_pretrain
from mapo_lightning.run.config import RunConfig
from mapo_lightning.types import Batch
from tests.contract.test_world_models import (
    ACTIONS,
    CONF,
    MAKERS,
    experience,
    modes,
    semantic_width,
)

pytestmark = pytest.mark.slow

STEPWISE = {name: make for name, make in MAKERS.items() if name != "copy last frame"}
STEPWISE["mapo ensemble"] = partial(
    MAKERS["mapo tiny"].func, "mapo", "tiny", "world_model.ensemble.members=3"
)


def pretrained(method: str, kind: str = "gru") -> nn.Module:
    words = [f"method={method}", "env=toy", image("tiny", method), *backbone(kind, method)]
    return build_pretrain(compose(words, RunConfig, CONF).config).world_model


OF_VIDEOS: dict[str, Callable[[], nn.Module]] = {
    f"{method} {kind}": partial(pretrained, method, kind)
    for method in RSSM_METHODS
    if method != "dreamerv2"
    for kind in ("gru", "transformer")
}
OF_VIDEOS["tokens"] = partial(token_world, None, "transformer")
OF_VIDEOS["tokens and phrases"] = lambda: token_world(
    None, "transformer", semantic_width(), phrases=True
)


def rows(batch: Batch, t: int) -> Batch:
    return {key: value[:, t] for key, value in batch.items()}


def stepped(first: Dreaming, batch: Batch, start: int) -> list[Dreaming]:
    """The moments of a dream from the batch's drivers after ``start`` frames."""
    moments = [first]
    for t in range(start, batch["obs"].shape[1]):
        moments.append(moments[-1].step(rows(batch, t)))
    return moments


@pytest.mark.parametrize("kind", sorted(STEPWISE))
def test_steps_are_those_of_imagine(kind: str) -> None:
    torch.manual_seed(0)
    world = STEPWISE[kind]().eval()
    assert isinstance(world, Stepwise)
    assert (world.driver, world.drive_dim) == ("action", ACTIONS)
    batch = experience(world, time=9)
    with torch.no_grad():
        start = world.observe(batch).at(3)
    torch.manual_seed(5)
    whole = world.imagine(start, lambda i, _: batch["action"][:, 4 + i], 5)
    first = world.dreaming(start, batch["obs"][:, :4])
    torch.manual_seed(5)
    moments = stepped(first, batch, 4)
    for i, moment in enumerate(moments):
        torch.testing.assert_close(moment.belief.feat, whole.feat[i])
        assert moment.reward is not None
        torch.testing.assert_close(moment.reward, whole.reward[i], rtol=1e-4, atol=1e-5)
        if whole.uncertainty is None:
            assert moment.uncertainty is None
        else:
            assert moment.uncertainty is not None
            torch.testing.assert_close(moment.uncertainty, whole.uncertainty[i])


@pytest.mark.parametrize("kind", sorted(STEPWISE | OF_VIDEOS))
def test_pictures_are_those_of_the_open_loop(kind: str) -> None:
    """Whatever leads the dream; modes stay as they were."""
    torch.manual_seed(0)
    world = (STEPWISE | OF_VIDEOS)[kind]().train()
    assert isinstance(world, Stepwise)
    if isinstance(world, RSSMWorldModel):
        world.cfg.context.frame = "first"  # not one at random
        if isinstance(world.source, InverseAction):
            world.source.sampled = False
        for part in world.decoder.modules():  # and all of its tokens, not a random quarter
            if isinstance(part, CrossAttention):
                part.kept = round(part.kept / (1.0 - world.cfg.context.key_mask))
    batch, before = experience(world, time=8), modes(world)
    shown = {key: value[:, :3] for key, value in batch.items()}
    torch.manual_seed(5)
    film = world.open_loop(batch, 3)
    torch.manual_seed(5)
    with torch.no_grad(), world.evaluating():
        belief = world.observe(shown).at(2)
        if world.driver == "latent":
            batch |= {"action": world.source(batch).action}
    moments = stepped(world.dreaming(belief, shown["obs"]), batch, 3)
    assert modes(world) == before
    for t, moment in enumerate(moments, 2):
        assert moment.reward is None or world.driver == "action"
        if t == 2 and isinstance(world, TokenWorldModel):
            continue  # the start is drawn as the context of what follows here
        torch.testing.assert_close(moment.frame, film[:, t], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(STEPWISE | OF_VIDEOS))
def test_a_past_moment_is_left_again_and_its_own_future_stays(kind: str) -> None:
    torch.manual_seed(0)
    world = (STEPWISE | OF_VIDEOS)[kind]().eval()
    assert isinstance(world, Stepwise)
    batch = experience(world, time=8)
    if world.driver == "latent":
        batch["action"] = torch.randn(2, 8, world.drive_dim)
    with torch.no_grad():
        start = world.observe({key: value[:, :3] for key, value in batch.items()}).at(2)

    def frames(first: Dreaming, begin: int, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.stack([moment.frame for moment in stepped(first, batch, begin)[1:]])

    first = world.dreaming(start, batch["obs"][:, :3])
    then = first.step(rows(batch, 3))
    end = frames(then, 4, 1)
    other = frames(first, 4, 2)  # left a second time, and on from there
    assert torch.equal(frames(then, 4, 1), end)
    assert torch.equal(frames(first, 4, 2), other)


def test_tokens_go_on_where_positions_run_out() -> None:
    """The last frames become the context, as in `imagine`."""
    torch.manual_seed(0)
    world = token_world(ACTIONS, top=1).eval()
    batch = experience(world, time=40)
    start = world.observe(batch).at(3)
    torch.manual_seed(1)
    whole = world.imagine(start, lambda i, _: batch["action"][:, 4 + i], 36)
    torch.manual_seed(1)
    last = stepped(world.dreaming(start, batch["obs"][:, :4]), batch, 4)[-1]
    assert torch.equal(last.belief.feat, whole.feat[-1])
