"""Days and money on paper: the page shows what the script computes, and the script adds up."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.scaling import Assumptions, chosen, gpu_hours, report, stages, updates

ROOT = Path(__file__).parents[2]


def test_the_page_shows_what_the_script_computes() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    section = " ".join(page.partition("## Scaling on paper")[2].split())
    for piece in report(Assumptions()):
        assert " ".join(piece.split()) in section, "type: python benchmarks/scaling.py"


def test_the_longest_of_arithmetic_memory_and_launches_counts() -> None:
    parts = {name: part for name, (_, _, part) in updates(chosen(["tflops=100"])).items()}
    one = parts["fine-tuning, DeepMind Control"]
    assert (one.limit, one.seconds) == ("arithmetic", pytest.approx(0.0301))
    eager = updates(chosen(["captured=false", "launch_us=10"]))["pre-training"][2]
    assert (eager.limit, eager.seconds) == ("launches", pytest.approx(0.0133))
    slow = updates(chosen(["bandwidth=0.1"]))["pre-training"][2]
    assert (slow.limit, slow.seconds) == ("memory", pytest.approx(0.08))


def test_hours_follow_from_work_and_end_at_one_runs_length() -> None:
    a = chosen(["phrase_share=0"])
    eight = {stage.name: stage for stage in stages(a, 8)}
    one = {stage.name: stage for stage in stages(a, 1)}
    made = ("pre-training", "fine-tuning, DeepMind Control", "fine-tuning, Meta-World")
    assert sum(one[name].hours for name in made) == pytest.approx(gpu_hours(a))
    for name in made[1:]:
        assert eight[name].hours == pytest.approx(one[name].hours / 8)
    labels = "labelling the videos, once"
    assert one[labels].hours == pytest.approx(1.8e6 / 30 / 3600)
    slow = {stage.name: stage for stage in stages(chosen(["label_rate=100"]), 2)}[labels]
    assert (slow.hours, slow.limit) == (pytest.approx(9e5 / 37.9 / 3600), "labelling processes")
    many = {stage.name: stage for stage in stages(a, 1000)}
    assert many["pre-training"].hours == pytest.approx(one["pre-training"].hours / 9)
    assert many["pre-training"].limit == "one run's arithmetic"
    drawn = {stage.name: stage for stage in stages(chosen(["render_cores=1"]), 1000)}
    assert drawn["fine-tuning, Meta-World"].limit == "one run's simulators"


def test_money_is_hours_times_gpus_times_the_price() -> None:
    def money(*words: str) -> float:
        _, _, times, _ = report(chosen(words))
        return float(re.findall(r"\*\*([\d,]+)\*\*", times)[0].replace(",", ""))

    hours = sum(stage.hours for stage in stages(Assumptions(), 8))
    assert money("gpus=8", "gpu_hour=1000") == pytest.approx(8000 * hours, abs=1)


def test_an_unknown_assumption_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SystemExit, match="no assumption 'price'; there are gpus, gpu_hour"):
        chosen(["price=3"])
