"""Statistics of the report beside those of rliable, stored with their source, and by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mapo_lightning.reporting.statistics import (
    difference,
    improvement,
    profile,
    stratified_iqm,
)
from mapo_lightning.training.across_seeds import across_seeds

STORED = json.loads((Path(__file__).parents[1] / "golden" / "rliable.json").read_text())
# Both sides draw 5,000 to 50,000 times, and the statistics take few values: one step of them.
DRAWS = 0.015
METHODS = ("first", "second")


def tasks(method: str) -> list[NDArray[np.float64]]:
    return list(np.array(STORED["scores"][method]).T)


@pytest.mark.parametrize("method", METHODS)
def test_the_interquartile_mean_over_tasks_is_that_of_rliable(method: str) -> None:
    found = stratified_iqm(tasks(method))
    assert found.value == pytest.approx(STORED["iqm"][method], abs=1e-6)
    assert found.interval == pytest.approx(STORED["iqm_interval"][method], abs=DRAWS)


@pytest.mark.parametrize("method", METHODS)
def test_the_interquartile_mean_of_one_task_is_that_of_rliable(method: str) -> None:
    found = across_seeds(list(tasks(method)[0]))
    assert found.iqm == pytest.approx(STORED["iqm_first_task"][method], abs=1e-6)
    assert found.iqm_interval == pytest.approx(STORED["iqm_interval_first_task"][method], abs=DRAWS)


def test_the_bootstrap_is_stratified() -> None:
    """Drawn from all tasks together, these would spread far wider than task by task."""
    apart = [np.array([0.0, 0.1, 0.2]), np.array([10.0, 10.1, 10.2])]
    found = stratified_iqm(apart)
    assert found.interval is not None
    assert found.interval == pytest.approx((5.0, 5.2), abs=0.05)


def test_the_probability_of_improvement_is_that_of_rliable() -> None:
    found = improvement(tasks("first"), tasks("second"))
    assert found.value == pytest.approx(STORED["improvement"], abs=1e-6)
    assert found.interval == pytest.approx(STORED["improvement_interval"], abs=0.02)
    other = improvement(tasks("second"), tasks("first"))
    assert other.value == pytest.approx(1 - found.value)


def test_a_tie_counts_half() -> None:
    one, two = [np.array([1.0, 2.0])], [np.array([2.0, 3.0])]
    assert improvement(one, two).value == 0.125  # of four pairs, three are lost and one is tied
    assert improvement(one, one).value == 0.5
    with pytest.raises(ValueError, match="same tasks: 1, 2"):
        improvement(one, two * 2)


@pytest.mark.parametrize("method", METHODS)
def test_the_performance_profile_is_that_of_rliable(method: str) -> None:
    found = profile(tasks(method), STORED["taus"])
    assert [x.value for x in found] == pytest.approx(STORED["profile"][method], abs=1e-6)
    for side, stored in enumerate((STORED["profile_low"], STORED["profile_high"])):
        band = [x.interval[side] for x in found if x.interval]
        assert band == pytest.approx(stored[method], abs=0.07)  # one of fifteen runs


def test_one_seed_has_no_interval() -> None:
    single = [np.array([1.0]), np.array([2.0, 3.0])]
    assert stratified_iqm(single).interval is None
    found = difference(single[0], single[1])
    assert (found.mean, found.interval, found.apart) == (-1.5, None, False)
    assert found.verdict() == "one seed: cannot be told"


def test_the_difference_has_welchs_interval_and_says_how_many_seeds_would_do() -> None:
    # Welch by hand: means 12 and 10, variances 1 and 4, n = 3 each: standard error sqrt(5/3),
    # freedom (5/3)^2 / ((1/3)^2/2 + (4/3)^2/2) = 2.941, t(0.975) = 3.2188
    found = difference(np.array([11.0, 12.0, 13.0]), np.array([8.0, 10.0, 12.0]))
    assert found.interval == pytest.approx((2 - 4.1554, 2 + 4.1554), abs=2e-3)
    assert not found.apart
    # (t(0.975, 20) + t(0.8, 20))^2 * 5 / 4 = (2.086 + 0.860)^2 * 1.25 = 10.85 <= 11
    assert found.needed == 11
    assert found.verdict() == "not told apart; about 11 seeds each would"


def test_a_difference_of_nothing_is_not_told_apart_by_any_number_of_seeds() -> None:
    same = np.array([1.0, 2.0, 3.0])
    assert difference(same, same).needed is None
    assert difference(same, same).verdict() == "not told apart; more seeds may not help"
    flat = np.array([5.0, 5.0])
    assert difference(flat, flat).apart is False
    assert difference(flat + 1, flat).apart is True
