"""Metrics of dreams against dreams whose order of quality is declared beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from dream_truths import dreamt_films, dreamt_returns, opposed, truth
from numpy.typing import NDArray

from mapo_lightning.judging.consistency import counterfactual_consistency
from mapo_lightning.judging.decisions import (
    decision_fidelity,
    over_checkpoints,
    over_checkpoints_interval,
    rank_correlation,
    summary,
)
from mapo_lightning.judging.foresight import Foresight, Trajectory, foresight, given_close
from mapo_lightning.types import MapoError

Values = NDArray[np.float64]
TASKS = [
    pytest.param("toy", "disc", 2, 16, id="toy"),
    pytest.param("dmc", "cartpole_swingup", 1, 8, id="cartpole", marks=pytest.mark.slow),
]

# Declared before anything is measured: from the best dream to the worst; those in one set tie.
SAME = {"copy of the last frame", "blind to actions"}
RANKING: list[set[str]] = [{"oracle"}, {"noisy oracle"}, SAME, {"wrong direction"}]
MARGIN = 0.05
"""Two places of the ranking differ by at least this much, on scales of which 1 is the best."""


def check_ranking(
    scores: Mapping[str, float], ranking: list[set[str]], best: float, margin: float = MARGIN
) -> None:
    """See that larger scores come first, that ties tie, and that the oracle has the best one."""
    assert scores["oracle"] == pytest.approx(best)
    places = [[scores[name] for name in place] for place in ranking]
    for place in places:
        assert max(place) - min(place) < margin, scores
    for better, worse in pairwise(places):
        assert min(better) - max(worse) > margin, scores


def at_the_end(found: Mapping[str, Values], name: str) -> float:
    values = found[name][:, -1]
    return float(values[np.isfinite(values)].mean())


@pytest.mark.parametrize(("kind", "name", "width", "contexts"), TASKS)
def test_consistency_ranks_dreams_as_declared(
    kind: str, name: str, width: int, contexts: int
) -> None:
    frames = opposed(kind, name, width, contexts).frames
    found = {
        dream: counterfactual_consistency(frames, film)
        for dream, film in dreamt_films(frames, frames[:, ::-1]).items()
    }
    check_ranking({k: at_the_end(v, "direction") for k, v in found.items()}, RANKING, 1.0)
    assert at_the_end(found["wrong direction"], "direction") == pytest.approx(-1.0)
    size = {k: at_the_end(v, "size") for k, v in found.items()}
    assert size["oracle"] == size["wrong direction"] == pytest.approx(1.0)  # it has no sign
    assert size["blind to actions"] == size["copy of the last frame"] == 0.0
    spill = {k: at_the_end(found[k], "spill") for k in ("oracle", "noisy oracle")}
    assert spill["oracle"] < 0.1 < 0.5 < spill["noisy oracle"]
    assert np.isnan(found["blind to actions"]["spill"]).all()
    assert found["oracle"]["direction"].shape == (contexts, 10)


def test_consistency_sees_how_far_and_what_is_elsewhere() -> None:
    true = np.full((1, 2, 2, 8, 8, 3), 100, np.uint8)
    true[0, 0, 1, 2] = 200
    half, aside = true.copy(), true.copy()
    half[0, 0, 1, 2] = 150
    aside[0, 0, 1, 5] = 200
    found = counterfactual_consistency(true, half)
    assert found["direction"][0, 0] == pytest.approx(1.0)
    assert found["size"][0, 0] == pytest.approx(0.5)
    both = counterfactual_consistency(true, aside)
    assert both["spill"][0, 0] == pytest.approx(0.5)
    assert both["direction"][0, 0] == pytest.approx(1.0)  # only spill tells
    true[0, 0] = true[0, 1]  # nothing to see
    assert np.isnan(counterfactual_consistency(true, half)["direction"]).all()
    with pytest.raises(MapoError, match="two sequences or more"):
        counterfactual_consistency(true[:, :1], half[:, :1])


@pytest.mark.parametrize(("kind", "name", "width", "contexts"), TASKS)
def test_decisions_rank_dreams_as_declared(kind: str, name: str, width: int, contexts: int) -> None:
    returns = truth(kind, name, width, contexts).returns
    # Of negated actions in the toy; a pole falls either way, so there the order is turned around.
    wrong = np.roll(returns, 5, axis=1) if kind == "toy" else -returns
    found = {
        dream: decision_fidelity(returns, values)
        for dream, values in dreamt_returns(returns, wrong).items()
    }
    regret = {k: 1.0 - at_the_end(v, "regret") for k, v in found.items()}
    check_ranking(regret, RANKING, best=1.0)
    check_ranking({k: at_the_end(v, "accuracy") for k, v in found.items()}, RANKING, best=1.0)
    check_ranking({k: at_the_end(v, "spearman") for k, v in found.items()}, RANKING, best=1.0)
    assert at_the_end(found["blind to actions"], "accuracy") == pytest.approx(0.5)
    assert at_the_end(found["blind to actions"], "spearman") == pytest.approx(0.0)


def test_decisions_against_numbers_written_out_here() -> None:
    true = np.array([[1.0, 3.0, 2.0, 2.0]])[..., None]
    found = decision_fidelity(true, np.array([[5.0, 4.0, 5.0, 0.0]])[..., None])
    assert found["regret"][0, 0] == pytest.approx((3.0 - (1.0 + 2.0) / 2) / 2.0)
    # Of five pairs that differ: 0-1 wrong, 0-2 a tie, 0-3 wrong, 1-2 wrong, 1-3 right.
    assert found["accuracy"][0, 0] == pytest.approx(1.5 / 5)
    ranks = np.corrcoef([1.0, 4.0, 2.5, 2.5], [3.5, 2.0, 3.5, 1.0])[0, 1]
    assert found["spearman"][0, 0] == pytest.approx(ranks)
    equal = decision_fidelity(np.ones((1, 3, 1)), np.arange(3.0)[None, :, None])
    assert all(np.isnan(value).all() for value in equal.values())
    with pytest.raises(MapoError, match="not a finite number"):
        decision_fidelity(true, np.full_like(true, np.nan))


def test_the_summary_has_intervals_of_the_last_step() -> None:
    values = np.array([[0.0, 0.2], [0.0, 0.4], [0.0, np.nan]])
    found = summary({"regret": values})
    assert found["regret"] == pytest.approx(0.3)
    assert (found["regret_low"], found["regret_high"]) == (0.2, 0.4)
    assert found["decided"] == 2.0
    assert summary({"regret": np.full((2, 1), np.nan)}) == {"decided": 0.0}


def test_checkpoints_are_ranked_by_dreams_as_declared() -> None:
    rng = np.random.default_rng(0)
    skill = np.linspace(0.0, 1.0, 8)[:, None, None]
    true = (skill + 0.3 * rng.normal(size=(8, 12, 3))).cumsum(axis=2)
    dreams = {
        "oracle": true,
        "noisy oracle": true + 2.0 * rng.normal(size=true.shape),
        "copy of the last frame": np.zeros_like(true),  # nothing is ever earned
        "blind to actions": np.broadcast_to(true.mean(axis=0), true.shape),
        "wrong direction": -true,
    }
    found = {k: over_checkpoints(true, v) for k, v in dreams.items()}
    for name in ("of_means", "per_state"):
        check_ranking({k: at_the_end(v, name) for k, v in found.items()}, RANKING, best=1.0)
    assert found["oracle"]["of_means"].shape == (1, 3)
    assert found["oracle"]["per_state"].shape == (12, 3)
    ends = {k: over_checkpoints_interval(true[..., -1], v[..., -1]) for k, v in dreams.items()}
    assert ends["oracle"] == (1.0, 1.0)
    assert ends["copy of the last frame"] == (0.0, 0.0)
    low, high = ends["noisy oracle"]
    assert -1.0 < low < found["noisy oracle"]["of_means"][0, -1] <= high <= 1.0
    with pytest.raises(MapoError, match="three checkpoints or more"):
        over_checkpoints(true[:2], true[:2])


def test_rank_correlation_against_numpy() -> None:
    rng = np.random.default_rng(1)
    one, two = rng.normal(size=(2, 5, 7, 2))
    found = rank_correlation(one, two)
    for context in range(5):
        ranks = [x[context, :, 1].argsort().argsort() for x in (one, two)]
        assert found[context, 1] == pytest.approx(np.corrcoef(*ranks)[0, 1])


def disc_of(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Where the red disc is, (..., 2): the true state, as a belief that knows it all."""
    colours = frames.astype(np.float32)
    red = np.clip(colours[..., 0] - colours[..., 1:].max(axis=-1) - 60.0, 0.0, None)
    places = np.arange(frames.shape[-2])
    total = red.sum(axis=(-2, -1))
    return np.stack(
        [(red.sum(axis=-2) * places).sum(-1) / total, (red.sum(axis=-1) * places).sum(-1) / total],
        axis=-1,
    ).astype(np.float32)


def imagined() -> tuple[Trajectory, Trajectory, dict[str, Trajectory]]:
    """What really happened, two ways, and dreams of the first: with pictures and true states."""
    played = truth("toy", "disc", 2, 16)
    films = dreamt_films(played.frames[:, :5], played.frames[:, 5:])
    films["blind to actions"] = np.roll(played.frames[:, :5], 1, axis=1)  # another sequence's

    def way(frames: Any) -> Trajectory:
        return Trajectory(frames, disc_of(frames), played.reward[:, 0], played.success[:, 0])

    real = way(played.frames[:, 0])
    return real, way(played.frames[:, 1]), {k: way(film[:, 0]) for k, film in films.items()}


def test_foresight_ranks_dreams_as_declared() -> None:
    real, other, dreams = imagined()
    found = {k: foresight(Foresight(dream, real, other)) for k, dream in dreams.items()}
    frames = {k: at_the_end(v, "executed_frames") for k, v in found.items()}
    assert frames["oracle"] == 0.0
    assert frames["oracle"] < frames["noisy oracle"]
    for name in ("copy of the last frame", "blind to actions", "wrong direction"):
        assert 2.0 * frames["noisy oracle"] < frames[name], frames
    assert at_the_end(found["copy of the last frame"], "executed_still") == pytest.approx(
        frames["copy of the last frame"]
    )
    # On the true states: standing still is half as far away as going the other way.
    beliefs = {k: -at_the_end(v, "executed_belief") for k, v in found.items()}
    order = [{"oracle"}, {"noisy oracle"}, {"copy of the last frame"}, {"wrong direction"}]
    check_ranking(beliefs, order, best=0.0, margin=0.02)
    assert at_the_end(found["oracle"], "closed_belief") > 0.3  # it did something else


def test_success_is_split_by_whether_the_imagination_was_followed() -> None:
    real, other, dreams = imagined()
    half = np.arange(16) < 8
    mixed = Trajectory(
        *(
            np.where(half.reshape(-1, *[1] * (np.ndim(good) - 1)), good, bad)
            for good, bad in zip(dreams["oracle"], dreams["wrong direction"], strict=True)
        )
    )
    found = foresight(Foresight(mixed, real, other))
    for name in ("executed_frames", "executed_belief"):
        split = given_close(found[name].mean(axis=1), half.astype(float))
        assert (split.close, split.far, split.close_count, split.far_count) == (1.0, 0.0, 8, 8)
    same = given_close(np.zeros(3), np.array([1.0, 0.0, np.nan]))
    assert (same.close, same.close_count, same.far_count) == (0.5, 2, 0)
    assert np.isnan(same.far)
    with pytest.raises(MapoError, match="none of 2 contexts"):
        given_close(np.full(2, np.nan), np.ones(2))
