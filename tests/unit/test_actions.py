"""Actions in [-1, 1] for every kind of Gymnasium space: all values reached, equally often."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from scipy import stats

from mapo_lightning.envs.actions import action_width, to_space
from mapo_lightning.types import EnvironmentSetupError

DRAWS = 20_000


def values(space: spaces.Space[Any]) -> list[Any]:
    """What uniform actions choose; every value is one of the space."""
    rng, width = np.random.default_rng(0), action_width(space)
    drawn = rng.uniform(-1.0, 1.0, (DRAWS, width)).astype(np.float32)
    chosen = [to_space(space, action) for action in drawn]
    assert all(space.contains(value) for value in chosen[:500])
    return chosen


def plain(value: Any) -> Any:
    """A value as something that can be counted."""
    if isinstance(value, dict):
        return tuple((key, plain(part)) for key, part in value.items())
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return value.tolist() if isinstance(value, np.generic) else str(np.asarray(value).tolist())


FINITE = {
    "integers": (spaces.Box(0, 10, (1,), np.int64), 11),
    "negative": (spaces.Box(-3, 3, (1,), np.int32), 7),
    "bytes": (spaces.Box(0, 255, (1,), np.uint8), 256),
    "signed_bytes": (spaces.Box(-128, 127, (1,), np.int8), 256),
    "far": (spaces.Box(2**60, 2**60 + 2, (1,), np.int64), 3),
    "unequal": (spaces.Box(np.array([0, 5]), np.array([2, 6]), dtype=np.int16), 6),
    "square": (spaces.Box(0, 1, (2, 2), np.int8), 16),
    "scalar": (spaces.Box(1, 6, (), np.int64), 6),
    "flags": (spaces.Box(0, 1, (2,), np.bool_), 4),
    "single": (spaces.Box(4, 4, (1,), np.int64), 1),
    "discrete": (spaces.Discrete(5), 5),
    "discrete_from": (spaces.Discrete(3, start=-7), 3),
    "one_choice": (spaces.Discrete(1), 1),
    "multi_discrete": (spaces.MultiDiscrete([2, 5, 1]), 10),
    "multi_discrete_from": (spaces.MultiDiscrete([3, 2], start=[10, -1]), 6),
    "multi_discrete_square": (spaces.MultiDiscrete([[2, 3], [2, 1]]), 12),
    "multi_binary": (spaces.MultiBinary(3), 8),
    "multi_binary_square": (spaces.MultiBinary([2, 2]), 16),
    "dict": (spaces.Dict({"b": spaces.Discrete(3), "a": spaces.MultiBinary(2)}), 12),
    "tuple": (spaces.Tuple([spaces.Discrete(2, start=1), spaces.Box(0, 3, (1,), np.int64)]), 8),
    "nested": (
        spaces.Tuple([spaces.Discrete(2), spaces.Dict({"y": spaces.Tuple([spaces.Discrete(3)])})]),
        6,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("space", "count"), FINITE.values(), ids=FINITE.keys())
def test_every_value_of_a_finite_space_is_chosen_equally_often(
    space: spaces.Space[Any], count: int
) -> None:
    found = Counter(plain(value) for value in values(space))
    assert len(found) == count
    assert count == 1 or stats.chisquare(list(found.values())).pvalue > 0.001


CONTINUOUS = {
    "floats": spaces.Box(-1.0, 1.0, (2,)),
    "unequal": spaces.Box(np.array([-1.0, 0.0]), np.array([1.1, 4.0]), dtype=np.float64),
    "half": spaces.Box(-2.0, 2.0, (1,), np.float16),
    "square": spaces.Box(-5.0, -4.0, (2, 2)),
    "wide": spaces.Box(-3e38, 3e38, (1,)),
    "part": spaces.Dict({"move": spaces.Box(0.0, 9.0, (2,)), "grip": spaces.MultiBinary(1)}),
}


@pytest.mark.slow
@pytest.mark.parametrize("space", CONTINUOUS.values(), ids=CONTINUOUS.keys())
def test_a_float_box_is_covered_evenly_up_to_its_bounds(space: spaces.Space[Any]) -> None:
    box = space["move"] if isinstance(space, spaces.Dict) else space
    drawn = values(space)
    points = np.array([x["move"] if isinstance(x, dict) else x for x in drawn], np.float64)
    low, high = box.low.astype(np.float64), box.high.astype(np.float64)
    share = ((points - low) / (high - low)).reshape(DRAWS, -1)
    for column in share.T:
        bins = np.histogram(column, 16, (0.0, 1.0))[0]
        assert bins.sum() == DRAWS
        assert stats.chisquare(bins).pvalue > 0.001
    ends = (to_space(box, np.full(action_width(box), end)) for end in (-9.0, -1.0, 1.0, 9.0))
    for end, bound in zip(ends, (box.low, box.low, box.high, box.high), strict=True):
        np.testing.assert_array_equal(end, bound)


def test_integers_at_the_ends_of_a_box_are_reached() -> None:
    """A share cut off instead of put into bins never gave the 10."""
    box = spaces.Box(0, 10, (1,), np.int64)
    chosen = [int(to_space(box, np.array([x]))[0]) for x in (-1.0, -0.83, 0.0, 0.83, 1.0)]
    assert chosen == [0, 0, 5, 10, 10]


UNBOUNDED = "a Box needs finite bounds"
NO_NUMBERS = "no fixed number of parts.*use Box, Discrete"
REFUSED = {
    "unbounded": (spaces.Box(-np.inf, np.inf, (2,)), UNBOUNDED),
    "from_below": (spaces.Box(0.0, np.inf, (2,)), UNBOUNDED),
    "from_above": (spaces.Box(-np.inf, 0.0, (2,)), UNBOUNDED),
    "too_far": (spaces.Box(-1.7e308, 1.7e308, (1,), np.float64), UNBOUNDED),
    "integers": (spaces.Box(-np.inf, np.inf, (1,), np.int64), "at most 16,777,216 values"),
    "half_integers": (spaces.Box(0, np.inf, (1,), np.int32), "at most 16,777,216 values"),
    "too_many": (spaces.Discrete(10_000), "takes 10,000 numbers, one for each choice, and 4,096"),
    "too_many_in_all": (spaces.MultiDiscrete([100] * 41), "it takes 4,100 numbers"),
    "empty": (spaces.Box(0.0, 1.0, (0,)), "it holds no number to choose"),
    "empty_tuple": (spaces.Tuple([]), "it holds no number to choose"),
    "text": (spaces.Text(5), NO_NUMBERS),
    "sequence": (spaces.Sequence(spaces.Discrete(2)), NO_NUMBERS),
    "graph": (spaces.Graph(spaces.Discrete(2), None), NO_NUMBERS),
    "one_of": (spaces.OneOf([spaces.Discrete(2), spaces.Box(0.0, 1.0, (1,))]), NO_NUMBERS),
    "inside": (spaces.Dict({"say": spaces.Text(3), "go": spaces.Discrete(2)}), r"Text\(1, 3"),
}


@pytest.mark.parametrize(("space", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_spaces_that_numbers_cannot_choose_from_are_refused(
    space: spaces.Space[Any], message: str
) -> None:
    with pytest.raises(EnvironmentSetupError, match=message) as caught:
        action_width(space)
    words = str(caught.value)
    assert "\n" not in words
    assert "Wrap the task in an environment with other actions" in words
