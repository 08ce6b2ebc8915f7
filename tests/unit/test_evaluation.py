"""Statistics of test episodes against sums written out here, and what is written down of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mapo_lightning.data.video import probe_video
from mapo_lightning.envs.episodes import Episode, RandomPolicy
from mapo_lightning.training.evaluation import Evaluation, Score, baseline_scores

RETURNS = [3.0, 100.0, 1.0, 2.0, 4.0, 5.0, 6.0, -50.0]


def score(returns: list[float], success: float | None = None) -> Score:
    return Score(tuple(Episode(x, 5, success) for x in returns))


def evaluation() -> Evaluation:
    about = {"method": "mapo", "task": "toy/disc", "env_frames": 1200}
    return Evaluation(
        score(RETURNS, 1.0), {"random": score([1.0] * 8, 0.0)}, tuple(range(1000, 1008)), about
    )


def test_statistics_against_written_out_sums() -> None:
    figures = score(RETURNS).figures()
    mean = sum(RETURNS) / 8
    deviations = sum((x - mean) ** 2 for x in RETURNS)
    assert figures["return"] == pytest.approx(mean)
    assert figures["return_std"] == pytest.approx((deviations / 8) ** 0.5)
    assert figures["return_se"] == pytest.approx((deviations / 7) ** 0.5 / 8**0.5)
    assert figures["return_iqm"] == (2.0 + 3.0 + 4.0 + 5.0) / 4  # outliers count for nothing
    assert "success" not in figures


def test_the_interval_is_the_percentile_bootstrap_and_always_the_same() -> None:
    rng = np.random.default_rng(3)
    draws = np.sort(rng.choice(RETURNS, (20_000, 8)), axis=1)[:, 2:6].mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    found = score(RETURNS).interval
    assert found is not None
    assert found == pytest.approx((low, high), rel=0.1)
    assert found == score(RETURNS).interval


def test_one_episode_has_no_spread_and_equal_ones_have_none() -> None:
    assert score([2.0], 1.0).figures() == {
        "return": 2.0, "return_std": 0.0, "return_iqm": 2.0, "success": 1.0
    }  # fmt: skip
    same = score([2.0] * 4).figures()
    assert (same["return_se"], same["return_iqm_low"], same["return_iqm_high"]) == (0.0, 2.0, 2.0)


def test_the_tracker_the_file_and_the_summary_say_the_same(tmp_path: Path) -> None:
    found = evaluation()
    metrics = found.metrics()
    assert metrics["eval/return_random"] == 1.0
    assert metrics["eval/success"] == 1.0
    assert "dream" not in found.tree()
    judged = replace(found, dream={"regret": 0.25})
    assert judged.metrics() == metrics | {"dream/regret": 0.25}
    assert judged.tree() == found.tree() | {"dream": {"regret": 0.25}}
    found.save(tmp_path / "evaluation.json")
    tree = json.loads((tmp_path / "evaluation.json").read_text())
    agent = tree["policies"]["agent"]
    assert agent["return_iqm"] == metrics["eval/return_iqm"]
    assert [e["seed"] for e in agent["episodes"]] == list(range(1000, 1008))
    assert [e["return"] for e in agent["episodes"]] == RETURNS
    assert tree["policies"]["random"]["success"] == 0.0
    planned = replace(found, about={**found.about, "plan": "cem"})
    assert any(line.startswith("  mapo cem     return") for line in planned.lines())
    lines = "\n".join(found.lines())
    assert "toy/disc after 1,200 frames, 8 episodes from reset seeds 1000..1007" in lines
    low, high = metrics["eval/return_iqm_low"], metrics["eval/return_iqm_high"]
    assert f"interquartile mean 3.5 [{low:.1f}, {high:.1f}], success 100%" in lines


def test_the_summary_holds_the_agent_against_the_best_that_learns_nothing() -> None:
    found = evaluation()
    returns = [20.0, 22.0, 24.0, 26.0]
    half = 3.182446 * np.std(returns, ddof=1) / 2  # Student's t, three degrees of freedom
    baselines = {"random": score([1.0] * 4), "random_held": score([4.0, 6.0, 5.0, 5.0])}
    seeds = (1000, 1001, 1002, 1003)
    mine = replace(found, score=score(returns), baselines=baselines, seeds=seeds)
    line = list(mine.lines())[-1]
    low, high = 23.0 - half, 23.0 + half
    assert line.startswith(f"  mapo: mean in [{low:.1f}, {high:.1f}] (95 %, Student's t")
    assert line.endswith(f"its lower end is {low / 5.0:.1f} times the mean of random_held")
    # Where returns are not above zero, a ratio says nothing.
    none = replace(mine, baselines={"still": score([-3.0] * 4), "random": score([-9.0] * 4)})
    assert list(none.lines())[-1].endswith("the best policy that learns nothing, still, has -3.0")
    assert "mean in" not in list(replace(found, baselines={}).lines())[-1]


def test_films_are_enlarged_and_named_by_seed(tmp_path: Path) -> None:
    film = np.random.default_rng(0).integers(0, 255, (7, 16, 16, 3), np.uint8)
    evaluation().save_films(tmp_path, [film, film], fps=25)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["seed_1000.mp4", "seed_1001.mp4"]
    info = probe_video(tmp_path / "seed_1001.mp4")
    assert (info.width, info.height, info.frames) == (256, 256, 7)


def test_baselines_play_without_memory_of_earlier_batches() -> None:
    drawn: list[float] = []

    def play(policy_of, film):  # type: ignore[no-untyped-def]
        step = {"is_first": np.ones(1, bool)}
        drawn.append(float(policy_of(1000)(step)[0, 0]))
        drawn.append(float(policy_of(1002)(step)[0, 0]))
        return [Episode(1.0, 5, None)], []

    assert set(baseline_scores(play, 2)) == {"random", "random_held", "still"}
    first, second = drawn[:2]
    assert first != second  # another batch, other draws
    expected = RandomPolicy(2, 1000)({"is_first": np.ones(1, bool)})[0, 0]
    assert first == pytest.approx(expected)
    assert drawn[2:] == [first, second, 0.0, 0.0]  # the held policy begins with the same draw
