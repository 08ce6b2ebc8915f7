"""Maps actions in [-1, 1] to Gymnasium's spaces: uniform ones reach every value equally often.

A number of a float ``Box`` is scaled linearly, one of an integer ``Box`` falls into one of as many
equal bins as there are integers. Of n choices, the one with the largest of n numbers is taken.
``Dict`` and ``Tuple`` are the actions of their parts one after the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from mapo_lightning.types import EnvironmentSetupError

_MOST_INTEGERS = 2**24
"""Integers that one float32 number in [-1, 1] can tell apart."""
_WIDEST = 4096
"""Numbers of one action; the last layer of the actor has two outputs for each."""


def action_width(space: spaces.Space[Any]) -> int:
    """Numbers A of an action for a space.

    Raises:
        EnvironmentSetupError: Some values of the space cannot be reached by numbers in [-1, 1].
    """
    width = _width(space)
    if width == 0:
        raise _refused(space, "it holds no number to choose", "give the task at least one")
    if width > _WIDEST:
        raise _refused(
            space,
            f"it takes {width:,} numbers, one for each choice, and {_WIDEST:,} is the limit",
            "a number of 10,000 values can be two choices among 100",
        )
    return width


def to_space(space: spaces.Space[Any], action: NDArray[np.floating]) -> Any:
    """The value of a space that an action stands for.

    Args:
        space: One that `action_width` accepts.
        action: Its A numbers, (A,); those outside [-1, 1] count as the nearer bound.
    """
    if isinstance(space, spaces.Discrete):
        return int(space.start) + int(action.argmax())
    if isinstance(space, spaces.MultiDiscrete):
        counts = np.asarray(space.nvec).flatten()
        chosen = [part.argmax() for part in np.split(action, np.cumsum(counts)[:-1])]
        return (space.start + np.reshape(chosen, space.shape)).astype(space.dtype)
    share = (np.clip(np.asarray(action, np.float64), -1.0, 1.0) + 1.0) / 2.0
    if isinstance(space, spaces.MultiBinary):
        return (share >= 0.5).reshape(space.shape).astype(space.dtype)
    if isinstance(space, spaces.Box):
        return _in_box(space, share.reshape(space.shape))
    parts = _parts(space)
    assert parts is not None
    ends = np.cumsum([_width(part) for part in parts.values()])[:-1]
    split = np.split(action, ends)
    values = [to_space(part, x) for part, x in zip(parts.values(), split, strict=True)]
    return dict(zip(parts, values, strict=True)) if isinstance(space, spaces.Dict) else (*values,)


def _in_box(space: spaces.Box, share: NDArray[np.float64]) -> NDArray[Any]:
    """The point of a box at these shares of the way from ``low`` to ``high``."""
    if space.dtype.kind != "f":
        low, high = (bound.astype(np.int64) for bound in (space.low, space.high))
        count = high - low + 1
        step = np.minimum(np.floor(share * count).astype(np.int64), count - 1)
        return np.asarray(low + step, space.dtype)
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    # The clip undoes rounding: low + 1.0 * (high - low) may exceed high by one ulp.
    return np.asarray(np.clip(low + share * (high - low), low, high), space.dtype)


def _width(space: spaces.Space[Any]) -> int:
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return int(np.sum(space.nvec))
    if isinstance(space, spaces.MultiBinary):
        return int(np.prod(space.shape))
    if isinstance(space, spaces.Box):
        _check_box(space)
        return int(np.prod(space.shape))
    parts = _parts(space)
    if parts is not None:
        return sum(_width(part) for part in parts.values())
    raise _refused(
        space,
        "its values have no fixed number of parts",
        "use Box, Discrete, MultiDiscrete, MultiBinary, or a Dict or Tuple of these",
    )


def _check_box(space: spaces.Box) -> None:
    low, high = space.low, space.high
    if space.dtype.kind == "f":
        with np.errstate(over="ignore", invalid="ignore"):
            if not np.isfinite(high.astype(np.float64) - low.astype(np.float64)).all():
                raise _refused(
                    space, "a Box needs finite bounds", "give it some, or discrete choices"
                )
    elif np.any(high.astype(object) - low.astype(object) >= _MOST_INTEGERS):
        raise _refused(
            space,
            f"an integer Box may hold at most {_MOST_INTEGERS:,} values per number",
            "give it closer bounds, or make it a float Box",
        )


def _parts(space: spaces.Space[Any]) -> dict[Any, spaces.Space[Any]] | None:
    """The parts of a Dict or Tuple, in order; None for other spaces."""
    if isinstance(space, spaces.Dict):
        return dict(space.spaces)
    if isinstance(space, spaces.Tuple):
        return dict(enumerate(space.spaces))
    return None


def _refused(space: spaces.Space[Any], why: str, advice: str) -> EnvironmentSetupError:
    words = " ".join(str(space).split())
    return EnvironmentSetupError(
        f"numbers in [-1, 1] cannot choose the actions of {words:.200}: {why}. Wrap the task in an "
        f"environment with other actions and register that: {advice}"
    )
