"""The token world as a world model: stacks, time, cadence, dreams (facts 7.5, 7.6)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import token_world
from torch import Tensor

from mapo_lightning.models.interfaces import Belief
from mapo_lightning.models.scalar_outputs import symexp, symlog
from mapo_lightning.models.token_world.belief import StackedFrames, stacked
from mapo_lightning.models.token_world.settings import (
    TokenizerConfig,
    TokenWorldConfig,
)
from mapo_lightning.models.token_world.world_model import Taught, TokenWorldModel
from mapo_lightning.types import Batch, CheckpointError, ConfigError

A = 2


def experience(time: int, batch: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(0)
    first = torch.zeros(batch, time, dtype=torch.bool)
    first[:, 0] = True
    size = (batch, time, 32, 32, 3)
    return {
        "obs": torch.randint(0, 256, size, dtype=torch.uint8, generator=generator),
        "is_first": first,
        "action": torch.rand(batch, time, A, generator=generator) * 2 - 1,
        "reward": torch.rand(batch, time, generator=generator) * 9,
    }


def driven(world: TokenWorldModel) -> TokenWorldModel:
    """With actions that change something: at first their weights are zero."""
    torch.manual_seed(3)
    assert world.predictor is not None
    assert world.predictor.control is not None
    torch.nn.init.normal_(world.predictor.control.action.weight)
    return world


def constant(action: Tensor) -> Callable[[int, Belief], Tensor]:
    return lambda i, _: action[:, i]


def test_frames_are_stacked_within_their_episode() -> None:
    obs = torch.arange(1, 7, dtype=torch.uint8).view(1, 6, 1, 1, 1).expand(1, 6, 1, 1, 3)
    first = torch.tensor([[True, False, False, True, False, False]])
    found = stacked(obs, first, 3)
    assert found.frames[0, :, :, 0, 0, 0].tolist() == [
        [1, 1, 1], [1, 1, 2], [1, 2, 3], [4, 4, 4], [4, 4, 5], [4, 5, 6],
    ]  # fmt: skip
    # In pieces, the second of which begins in the middle of an episode.
    head = stacked(obs[:, :2], first[:, :2], 3)
    tail = stacked(obs[:, 2:], first[:, 2:], 3, head.at(1))
    assert torch.equal(torch.cat([head.frames, tail.frames], dim=1), found.frames)
    # A batch that begins in the middle, without a belief: its first frame stands in.
    assert stacked(obs[:, 1:3], first[:, 1:3], 3).frames[0, :, :, 0, 0, 0].tolist() == [
        [2, 2, 2], [2, 2, 3],
    ]  # fmt: skip


def test_an_agent_reads_channels_before_rows() -> None:
    frames = torch.randint(0, 256, (2, 3, 4, 4, 3), dtype=torch.uint8)
    feat = StackedFrames(frames).feat.view(2, 9, 4, 4)
    assert float(feat[1, 5, 2, 3]) == pytest.approx(int(frames[1, 1, 2, 3, 2]) / 255)


def test_an_action_drives_the_frame_that_it_leads_to() -> None:
    """The action at index t led to frame t; the transformer is given it at the mark before t."""
    world = driven(token_world(A)).eval()
    batch = experience(6)
    tokens, _ = world.tokenizer.tokenize(batch["obs"].movedim(-1, 2).float() / 255)
    assert world.predictor is not None
    layout = world.predictor.layout
    mark = layout.first_mark + 2 * (layout.future_tokens + 1)  # before frame 4
    assert int(tokens[0, mark]) == layout.future_follows
    before = world.predictor(tokens, batch["action"][:, 2:]).logits
    other = batch["action"].clone()
    other[:, 4] += 1.0
    after = world.predictor(tokens, other[:, 2:]).logits
    changed = (before - after).abs().amax(dim=(0, 2)) > 1e-6
    assert not changed[:mark].any()
    assert changed[mark]
    # And the loss sees it: with this action, not with those that the context's frames came from.
    for t, counts in ((4, True), (2, True), (1, False), (0, False)):
        other = batch["action"].clone()
        other[:, t] += 1.0
        losses = [
            world.loss(batch | {"action": action}).log["tokens"]
            for action in (batch["action"], other)
        ]
        assert (losses[0] != losses[1]) == counts, t


@pytest.mark.parametrize("late", [False, True])
def test_rewards_are_learned_where_they_are_received(late: bool) -> None:
    world = token_world(A, late_reward=late).eval()
    batch = experience(6)
    tokens, _ = world.tokenizer.tokenize(batch["obs"].movedim(-1, 2).float() / 255)
    assert world.predictor is not None
    said = world.predictor(tokens, batch["action"][:, 2:]).reward
    assert said is not None
    right = symlog(batch["reward"])
    expected = (
        (said[:, :-1] - right[:, 3:]).square().mean()
        if late
        else (said - right[:, 2:]).square().mean()
    )
    torch.testing.assert_close(world.loss(batch).log["reward"], expected)


def test_the_tokenizer_learns_in_every_fourth_update() -> None:
    world = token_world(A, tokenizer_every=4)
    world.train()
    batch, learned = experience(8), []
    for _ in range(5):
        world.zero_grad()
        world.loss(batch).total.backward()
        grad = world.tokenizer.before_codes.weight.grad
        learned.append(grad is not None and bool(grad.any()))
        assert world.predictor is not None
        assert world.predictor.transformer.head.weight.grad is not None
    assert learned == [True, False, False, False, True]
    assert world.tokenizer.future_codes.codes.grad is None
    again = token_world(A, tokenizer_every=4)
    again.load_state_dict(world.state_dict())
    assert again.updates == 5
    # Between its updates, the log says how it did in the last one, also after a resume.
    told = [w.loss(batch).log for w in (world, again)]
    for name in ("context", "future", "codes"):
        assert float(told[0][name]) == float(told[1][name]) == float(world.drawn[name]) > 0.0
    for damaged in ({}, {"updates": "x", "drawn": {}}, {"updates": 1, "drawn": [1]}):
        with pytest.raises(CheckpointError, match=r"world model's own state .* is damaged"):
            again.set_extra_state(damaged)
    world.eval()
    judged = world.loss(batch).log["future"]
    assert world.updates == 6  # a validation is no update
    assert float(judged) not in (0.0, float(world.drawn["future"]))


def test_phases_of_pre_training_learn_what_they_should() -> None:
    batch = {key: value for key, value in experience(8).items() if key in ("obs", "is_first")}
    phases: tuple[Taught, ...] = ("tokenizer", "transformer")
    for learn in phases:
        world = token_world(None, learn)
        world.loss(batch).total.backward()
        for name, module in world.parts().items():
            moved = any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
            assert moved == (name == learn), (learn, name)
        learning = {id(p) for group in world.groups().values() for p in group}
        assert learning == {id(p) for p in world.parameters() if p.requires_grad}
    # Nothing predicts in the tokenizer's phase: a film is its frames, drawn from their own tokens.
    world = token_world(None, "tokenizer").eval()
    drawn = world.tokenizer(batch["obs"].movedim(-1, 2).float() / 255)
    expected = torch.cat([drawn.context, drawn.future], dim=1).clamp(0, 1).movedim(2, -1)
    torch.testing.assert_close(world.open_loop(batch, seen=5), expected)


def test_a_dream_is_the_open_loop_of_the_same_actions() -> None:
    world = driven(token_world(A, temperature=0.0))
    batch = experience(9)
    with torch.no_grad():
        start = world.observe(batch).at(3)
        dream = world.imagine(start, constant(batch["action"][:, 4:]), 5)
        film = world.open_loop(batch, seen=4)
    assert dream.frames is not None
    shown = dream.frames[1:].movedim(0, 1).float() / 255
    torch.testing.assert_close(shown, film[:, 4:], atol=0.5 / 255 + 1e-6, rtol=0)
    other = world.imagine(start, constant(-batch["action"][:, 4:]), 5)
    assert not torch.equal(other.feat, dream.feat)
    # What was shown, as drawn: the context and the two frames after it.
    drawn = world.eval().tokenizer(batch["obs"][:, :4].movedim(-1, 2).float() / 255)
    expected = torch.cat([drawn.context, drawn.future], dim=1).clamp(0, 1).movedim(2, -1)
    torch.testing.assert_close(film[:, :4], expected)


def test_a_dream_goes_on_where_positions_end() -> None:
    """200 positions hold the context and 14 frames; the next ones follow from those drawn last."""
    world = driven(token_world(A, temperature=0.0))
    batch = experience(1, batch=1)
    action = torch.rand(1, 20, A)
    start = world.observe(batch).at(0)
    whole = world.imagine(start, constant(action), 20)
    assert whole.frames is not None
    fresh = StackedFrames(whole.frames[12:15].movedim(0, 1))
    rest = world.imagine(fresh, constant(action[:, 14:]), 6)
    assert rest.frames is not None
    near = (rest.frames[1].int() - whole.frames[15].int()).abs()
    assert int(near.max()) <= 8  # the context was rounded to bytes in between


def test_rewards_of_a_dream_are_in_units_of_the_environment() -> None:
    world = token_world(A, temperature=0.0)
    assert world.predictor is not None
    assert world.predictor.control is not None
    torch.nn.init.zeros_(world.predictor.control.reward.weight)
    torch.nn.init.constant_(world.predictor.control.reward.bias, -2.0)
    dream = world.imagine(world.observe(experience(3)).at(2), constant(torch.zeros(2, 3, A)), 3)
    assert dream.reward[0].tolist() == [0.0, 0.0]
    torch.testing.assert_close(dream.reward[1:], symexp(torch.full((3, 2), -2.0)))


def test_what_the_released_code_does_in_dreams_can_be_asked_for() -> None:
    seen: list[float] = []

    def policy(_: int, belief: Belief) -> Tensor:
        seen.append(float(belief.feat.max()))
        return torch.zeros(2, A)

    batch = experience(3)
    for blind, most in ((False, 1.0), (True, 1.0 / 255.0)):
        world = token_world(A, blind_policy=blind)
        dream = world.imagine(world.observe(batch).at(2), policy, 2)
        assert seen[-2] == pytest.approx(most, rel=0.02)
        assert float(dream.feat[0].max()) == pytest.approx(1.0, rel=0.02)  # replay gets the truth
    for dropped in (False, True):
        world = driven(token_world(A, dream_dropout=dropped, temperature=0.0)).train()
        start = world.observe(batch).at(2)
        rewards = [world.imagine(start, constant(torch.ones(2, 2, A)), 2).reward for _ in range(2)]
        assert torch.equal(*rewards) != dropped


def test_codes_stay_as_they_are_in_control() -> None:
    frozen = {name for name, p in token_world(A).named_parameters() if not p.requires_grad}
    assert frozen == {"tokenizer.context_codes.codes", "tokenizer.future_codes.codes"}
    assert all(p.requires_grad for p in token_world(None, "tokenizer").parameters())
    learning = {name for name, p in token_world(None, "transformer").named_parameters()
                if p.requires_grad}  # fmt: skip
    assert {name.partition(".")[0] for name in learning} == {"predictor"}


def test_an_update_learns_from_as_many_clips_as_it_should() -> None:
    batch = experience(6, batch=5)
    world, whole = token_world(A, clips=2).eval(), token_world(A, clips=16).eval()
    whole.load_state_dict(world.state_dict())
    first = {key: value[:2] for key, value in batch.items()}
    found = world.loss(batch)
    assert found.log["tokens"] == whole.loss(first).log["tokens"]
    assert found.log["tokens"] != whole.loss(batch).log["tokens"]
    assert isinstance(found.belief, StackedFrames)
    assert found.belief.frames.shape[:2] == (5, 6)  # the agent learns from all


def test_gradients_of_frozen_codes_add_up_where_the_released_code_counts_them() -> None:
    world, mended = token_world(A, codes_in_clip=True), token_world(A)
    batch = experience(6)
    for _ in range(2):
        for x in world.groups()["lower"]:
            x.grad = None
        world.updates = 0
        torch.manual_seed(0)
        world.loss(batch).total.backward()
    counted = world.clipped_along()["lower"]
    assert [x is y for x, y in zip(counted, world._codes, strict=True)] == [True, True]
    grad = world.tokenizer.future_codes.codes.grad
    assert grad is not None
    once = torch.autograd.grad(_again(world, batch), world.tokenizer.future_codes.codes)[0]
    torch.testing.assert_close(grad, 2 * once)
    held = {id(x) for group in world.groups().values() for x in group}
    assert not any(id(x) in held for x in counted)  # no optimiser moves them
    assert mended.clipped_along() == {}


def _again(world: TokenWorldModel, batch: Batch) -> Tensor:
    world.updates = 0
    torch.manual_seed(0)
    return world.loss(batch).total


def test_a_belief_of_another_model_is_refused() -> None:
    world, belief = token_world(A), type("Other", (), {})()
    for call in (
        lambda: world.observe(experience(2), belief),
        lambda: world.imagine(belief, constant(torch.zeros(2, 1, A)), 1),
    ):
        with pytest.raises(TypeError, match="must be StackedFrames, got Other"):
            call()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"stacked": 1}, "stacked must be at least context_frames=2"),
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"top": 0}, "top must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(words: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TokenWorldConfig(TokenizerConfig(), **words)  # type: ignore[arg-type]
