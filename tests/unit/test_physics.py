"""Where bodies are in dreams: places read off frames, and ways to get them wrong."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from mapo_lightning.envs.toy import ToyDisc
from mapo_lightning.envs.wrappers import PixelEnv
from mapo_lightning.judging.physics import (
    SEQUENCES,
    Sighted,
    learn_to_see,
    physical_sequences,
    physics,
    spread,
)

STEPS, CONTEXTS, SIDE = 10, 12, 32


def toy() -> PixelEnv:
    return PixelEnv(ToyDisc("disc"), size=SIDE, action_repeat=2)


def way(seed: int, actions: NDArray[np.float32]) -> NDArray[np.float64]:
    """Places of the disc, (H + 1, 1, 2) in pixels."""
    env = toy()
    env.reset(seed=seed)
    assert isinstance(env.simulator, ToyDisc)
    places = [env.simulator.landmarks(SIDE)["disc"]]
    for action in actions:
        env.step(action)
        places.append(env.simulator.landmarks(SIDE)["disc"])
    env.close()
    return np.array(places)[:, None]


@cache
def ways(kind: str) -> NDArray[np.float64]:
    """(C, 3, H + 1, 1, 2): the truth, or what a dream of a known kind makes of it."""
    found = []
    for seed in range(CONTEXTS):
        rng = np.random.default_rng(seed)
        three = physical_sequences(STEPS, 2)({}, rng)
        if kind == "wrong":
            three = -three
        if kind == "blind":
            three = rng.uniform(-1, 1, (3, 1, 2)).repeat(STEPS, axis=1).astype("f4")
        found.append([way(seed, actions) for actions in three])
    places = np.array(found)
    if kind == "copy":
        places = np.broadcast_to(places[:, :, :1], places.shape)
    if kind == "noisy":
        places = places + 0.3 * np.random.default_rng(0).normal(size=places.shape)
    if kind == "jumps":
        places = places.copy()
        places[:, :, 4:] += 9.0
    return places


# From the best to the worst, declared before the metric was run; equal ones in one group.
RANKINGS = {
    "acting": [{"oracle"}, {"noisy"}, {"copy", "blind", "wrong", "jumps"}],
    "still": [{"oracle", "copy", "wrong"}, {"noisy"}, {"blind", "jumps"}],
    "back": [{"oracle"}, {"noisy"}, {"blind", "wrong", "jumps"}],
    "jump": [{"oracle", "copy", "wrong"}, {"noisy"}, {"jumps"}],
}


@pytest.mark.parametrize("name", RANKINGS)
def test_constructed_dreams_are_ranked_as_declared(name: str) -> None:
    truth = ways("oracle")
    groups = RANKINGS[name]
    scores = {k: physics(truth, ways(k))[name][:, -1].mean() for group in groups for k in group}
    for better, worse in itertools.pairwise(groups):
        assert max(scores[k] for k in better) < min(scores[k] for k in worse), scores
    assert scores["oracle"] == 0.0


def test_distances_equal_their_definition() -> None:
    truth = np.zeros((1, 3, 3, 2, 2))
    dream = truth.copy()
    dream[0, 0, 2] = [[3.0, 4.0], [0.0, 0.0]]  # one of two bodies is 5 pixels off
    dream[0, 1, 1:] = [[6.0, 8.0], [0.0, 0.0]]  # one jumps by 10 in the first step, and stays
    found = physics(truth, dream)
    assert found["still"].tolist() == [[0.0, 2.5]]
    assert found["acting"].tolist() == [[5.0, 5.0]]
    assert found["jump"].tolist() == [[5.0, 5.0]]
    assert set(found) == {*SEQUENCES, "jump"}


def test_the_third_sequence_turns_round() -> None:
    still, acting, back = physical_sequences(7, 2)({}, np.random.default_rng(0))
    assert not still.any()
    assert (acting == acting[0]).all()
    assert (back[:4] == acting[:4]).all()
    assert (back[4:] == -acting[4:]).all()


@pytest.mark.slow
def test_places_are_read_off_frames() -> None:
    env = toy()
    assert isinstance(env.simulator, Sighted)
    eyes = learn_to_see(env, 40, seed=3)
    assert eyes is not None
    assert eyes.names == ("disc",)  # the pad stays where it is
    assert eyes.error < 1.0  # pixels of 32
    obs, _ = env.reset(seed=12345)
    assert isinstance(env.simulator, ToyDisc)
    read = eyes.places(obs["image"][None, None])
    assert read.shape == (1, 1, 1, 2)
    assert read[0, 0, 0] == pytest.approx(env.simulator.landmarks(SIDE)["disc"], abs=2.0)
    env.close()


def test_who_knows_no_places_has_none() -> None:
    env = toy()
    env.simulator = object()  # type: ignore[assignment]  # knows nothing of places
    assert learn_to_see(env, 8, seed=0) is None
    assert learn_to_see(toy(), 3, seed=0) is None  # too few to learn from and to judge by


def test_the_spread_of_true_takes_is_the_unit() -> None:
    truth = np.zeros((3, 3, 3, 1, 2))
    truth[1, :, :, :, 0], truth[2, :, :, :, 0] = 3.0, 6.0  # on a line, 3 pixels apart
    found = spread(truth)
    assert list(found) == list(SEQUENCES)
    np.testing.assert_allclose(found["acting"], [[4.5, 4.5], [3.0, 3.0], [4.5, 4.5]])
    another = physics(truth, np.roll(truth, 1, axis=0))["still"]
    np.testing.assert_allclose(another.mean(), found["still"].mean())
