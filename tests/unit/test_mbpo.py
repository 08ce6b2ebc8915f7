"""DrQ-v2 on real and imagined experience (facts 7.6)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import token_world
from torch import nn
from torch.nn import functional as F

from mapo_lightning.models.agents.drqv2 import (
    Actor,
    Critics,
    Pixels,
    Transitions,
    n_steps,
    noisy,
    shifted,
)
from mapo_lightning.models.agents.mbpo import MBPOAgent
from mapo_lightning.models.agents.settings import MBPOConfig
from mapo_lightning.models.interfaces import Fit
from mapo_lightning.models.token_world.belief import stacked
from mapo_lightning.types import Batch, CheckpointError, ConfigError
from tests.contract.throwaways import CopyLastFrame

A = 2
SMALL: dict[str, Any] = {
    "hold": 0, "updates": 1, "batch": 8, "hidden": 16, "dreams": 4, "horizon": 5, "first_rounds": 2,
    "dream_every": 3,
}  # fmt: skip


def agent(**words: Any) -> MBPOAgent:
    torch.manual_seed(0)
    return MBPOAgent(MBPOConfig(**SMALL | words), token_world(A), A)


def experience(time: int = 12, batch: int = 3) -> Batch:
    """Frame t is of brightness t, reward and action of index t say t too."""
    index = torch.arange(time).expand(batch, -1)
    ends = torch.zeros(batch, time, dtype=torch.bool)
    return {
        "obs": index[..., None, None, None].expand(-1, -1, 32, 32, 3).to(torch.uint8),
        "action": (index[..., None].expand(-1, -1, A) / 100).float(),
        "reward": index.float(),
        "is_first": index == 0,
        "is_last": ends,
        "is_terminal": ends,
    }


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_networks_have_the_published_sizes() -> None:
    pixels = Pixels(9, 64)
    assert pixels.features == 20_000
    assert count(pixels) == 30_368
    assert count(Actor(20_000, 4, 1024)) == 2_106_074
    assert count(Critics(20_000, 4, 1024)) == 3_214_040
    assert pixels(torch.rand(2, 9, 64, 64)).shape == (2, 20_000)


def test_rewards_are_summed_over_n_steps_or_to_the_end_of_the_episode() -> None:
    reward = torch.tensor([[0.0, 1.0, 2.0, 4.0, 8.0, 16.0]])
    last = torch.tensor([[False, False, False, True, False, False]])
    found = n_steps(reward, last, torch.zeros_like(last), 2, 0.5)
    assert found.valid.tolist() == [[True, True, True, False, False, False]]
    assert found.place[0, :3].tolist() == [2, 3, 3]
    assert found.reward[0, :3].tolist() == [1 + 0.5 * 2, 2 + 0.5 * 4, 4]
    assert found.discount[0, :3].tolist() == [0.25, 0.25, 0.5]  # the clock ended it: it goes on
    found = n_steps(reward, last, last, 2, 0.5)
    assert found.discount[0, :3].tolist() == [0.25, 0.0, 0.0]  # the task ended it
    whole = n_steps(reward, torch.zeros_like(last), torch.zeros_like(last), 3, 1.0)
    assert whole.valid.tolist() == [[True, True, True, False, False, False]]
    assert whole.reward[0, :3].tolist() == [7, 14, 28]


def test_pictures_are_shifted_as_published() -> None:
    """The same as sampling a padded picture bilinearly on a grid moved by whole pixels."""
    pictures, pad = torch.rand(5, 3, 8, 8), 4
    torch.manual_seed(1)
    found = shifted(pictures, pad)
    torch.manual_seed(1)
    move = torch.randint(2 * pad + 1, (2, 5))
    padded, whole = F.pad(pictures, (pad,) * 4, mode="replicate"), 8 + 2 * pad
    line = torch.linspace(-1 + 1 / whole, 1 - 1 / whole, whole)[:8]
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1).expand(5, 8, 8, 2)
    grid = grid + (move.flip(0).T * 2.0 / whole)[:, None, None]
    expected = F.grid_sample(padded, grid, padding_mode="zeros", align_corners=False)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert len(set(map(tuple, move.T.tolist()))) > 1
    assert torch.equal(shifted(pictures, 0), pictures)


def test_noise_stays_in_range_and_gradients_pass() -> None:
    mean = torch.full((10_000, 1), 0.9, requires_grad=True)
    action = noisy(mean, 0.5, 0.3)
    assert float(action.max()) <= 1.0
    assert float((action - mean).detach().min()) >= -0.3 - 1e-6
    action.sum().backward()
    assert mean.grad is not None
    assert torch.equal(mean.grad, torch.ones_like(mean))


def test_noise_fades_with_the_steps_that_were_explored() -> None:
    actor = agent(noise_steps=10)
    world = token_world(A)
    belief = world.observe(experience(3, batch=5)).at(2)
    assert actor.noise == 1.0
    quiet = actor.act(belief, explore=False)
    assert torch.equal(quiet, actor.act(belief, explore=False))
    assert actor.noise == 1.0
    assert not torch.equal(actor.act(belief, explore=True), quiet)
    assert actor.noise == pytest.approx(0.55)
    for _ in range(3):
        actor.act(belief, explore=True)
    assert actor.noise == pytest.approx(0.1)


def check_times(found: Transitions, steps: int = 3, discount: float = 0.99) -> None:
    """Of experience in which everything says its index: what belongs together is together."""
    now = found.frames[:, -1, 0, 0, 0].float()
    assert torch.equal(found.frames[:, 0, 0, 0, 0].float(), (now - 2).clamp(min=0))
    torch.testing.assert_close(found.action[:, 0], (now + 1) / 100)  # the action that comes next
    gain = sum(discount**k * (now + 1 + k) for k in range(steps))
    torch.testing.assert_close(found.reward, torch.as_tensor(gain))
    assert torch.equal(found.after[:, -1, 0, 0, 0].float(), now + steps)
    torch.testing.assert_close(found.discount, torch.full_like(now, discount**steps))


def test_real_transitions_are_of_one_time() -> None:
    learner, batch = agent(), experience()
    belief = stacked(batch["obs"], batch["is_first"], 3)
    found = learner._real(belief, batch, 50)
    assert found.frames.shape == (50, 3, 32, 32, 3)
    check_times(found)
    batch["is_first"] = torch.ones_like(batch["is_first"])  # episodes of one entry
    with pytest.raises(ConfigError, match=r"no chunk .* raise finetune.chunk_length"):
        learner._real(belief, batch, 50)


def test_dreamt_transitions_are_of_one_time() -> None:
    learner, world, batch = agent(), token_world(A), experience(4)
    belief = stacked(batch["obs"], batch["is_first"], 3)
    learner._dream(world, belief, at_random=True)
    (dreams,) = learner.dreams
    assert dreams.film.shape == (4, 3 + 5, 32, 32, 3)
    assert dreams.action.shape == (4, 5, A)
    assert dreams.reward.shape == (4, 6)
    # What is kept is what was seen, then what was dreamt; here with pictures that say their index.
    index = torch.arange(8).expand(4, -1)
    film = index[..., None, None, None].expand(-1, -1, 32, 32, 3).to(torch.uint8)
    action = ((index[:, 3:, None] / 100).expand(-1, -1, A)).float()
    learner.dreams = []
    learner._keep(film, action, index[:, 2:].float())
    check_times(learner._dreamt(50))


@pytest.mark.parametrize(("share", "imagined"), [(0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_a_share_of_what_it_learns_from_is_imagined(share: float, imagined: int) -> None:
    made, world, batch = agent(imagined=share, horizon=3), token_world(A), experience()
    fit = Fit(torch.zeros(()), {}, world.observe(batch))
    seen: list[Transitions] = []
    made._learn = lambda drawn: (seen.append(drawn), {})[1]  # type: ignore[method-assign]
    made.losses(world, fit, batch)
    # Actions of the batch say their time; nothing that is dreamt does.
    times = (100 * seen[0].action[:, 0]).round() / 100
    real = (times == seen[0].action[:, 0]) & (seen[0].action[:, 0] == seen[0].action[:, 1])
    assert int((~real).sum()) == imagined
    assert len(made.dreams) == (2 if imagined else 0)
    if not imagined:  # a run that resumes with dreams begins with as many as any other
        made.cfg = MBPOConfig(**SMALL | {"horizon": 3})
        made.losses(world, fit, batch)
        assert len(made.dreams) == 2


def test_dreams_come_in_rounds_and_the_oldest_go() -> None:
    learner, world, batch = agent(kept=16), token_world(A), experience(6)
    learner.train()
    fit = world.loss(batch)
    held = []
    for _ in range(7):
        learner.losses(world, fit, batch)
        held.append(len(learner.dreams))
    assert held == [2, 2, 3, 3, 3, 4, 4]
    for _ in range(2):
        learner.losses(world, fit, batch)
    assert len(learner.dreams) == 4  # 16 dreams of 4 a round
    waiting = agent(hold=2).train()
    assert [len(waiting.losses(world, fit, batch).log) for _ in range(3)] == [0, 0, 3]
    assert not waiting.eval().losses(world, fit, batch).log


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_it_learns_which_action_pays(sign: float) -> None:
    """A reward of the first action; the second one changes nothing and stays where it was."""
    learner = agent(n_step=1, rate=1e-3, noise_start=0.5, noise_end=0.5, batch=32)
    torch.manual_seed(2)
    pictures = torch.full((1, 9, 32, 32), 90 / 255)
    before = learner.actor(learner.pixels(pictures)).detach()
    assert abs(float(before[0, 0])) < 0.7
    frames = torch.full((32, 3, 32, 32, 3), 90, dtype=torch.uint8)
    for _ in range(60):
        action = torch.rand(32, A) * 2 - 1
        drawn = Transitions(frames, action, sign * action[:, 0], torch.zeros(32), frames)
        log = learner._learn(drawn)
    chosen = learner.actor(learner.pixels(pictures)).detach()
    assert sign * float(chosen[0, 0]) > 0.9
    assert float(log["critic"]) < 0.5  # critics that always say zero have 0.67


def test_a_model_that_does_not_dream_in_pictures_is_refused() -> None:
    with pytest.raises(ConfigError, match="dreamt pictures, which CopyLastFrame does not give"):
        MBPOAgent(MBPOConfig(), CopyLastFrame(), A)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"horizon": 2}, "horizon must be at least n_step=3"),
        ({"target_rate": 2.0}, r"target_rate must lie in \[0, 1\]"),
        ({"rate": -1.0}, "rate must not be negative"),
        ({"dreams": 0}, "dreams must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MBPOConfig(**words)


def test_dreams_of_other_settings_are_dreamt_anew() -> None:
    made, world, batch = agent(), token_world(A), experience()
    fit = Fit(torch.zeros(()), {}, world.observe(batch))
    made.losses(world, fit, batch)
    state = made.get_extra_state()
    assert len(state["dreams"]) == 2
    for words in ({}, {"horizon": 6}, {"dreams": 5}):
        other = agent(**words)
        other.set_extra_state(state)
        assert len(other.dreams) == (0 if words else 2)
        other.losses(world, fit, batch)  # draws from dreams of its own
        assert {tuple(one.action.shape) for one in other.dreams} == {
            (words.get("dreams", 4), words.get("horizon", 5), A)
        }


@pytest.mark.parametrize("change", ["no steps", "no moments", "other moments", "dreams of numbers"])
def test_a_damaged_state_is_one_sentence(change: str) -> None:
    made, world, batch = agent(), token_world(A), experience()
    made.losses(world, Fit(torch.zeros(()), {}, world.observe(batch)), batch)
    state = made.get_extra_state()
    if change == "no steps":
        del state["steps"]
    elif change == "no moments":
        state["actor_optimizer"] = {}
    elif change == "other moments":
        state["actor_optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    else:
        state["dreams"] = [[1, 2, 3, 4]]
    with pytest.raises(CheckpointError, match="agent's own state in this checkpoint is damaged"):
        agent().set_extra_state(state)
