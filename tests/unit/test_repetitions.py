"""Reading what runs leave behind, and putting it side by side: values and reasons by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from studies import make_run, write_curve

from mapo_lightning.reporting import compare
from mapo_lightning.reporting.gather import Stores, from_folders, unique
from mapo_lightning.reporting.runs import Dream, Policy, Run, read_run
from mapo_lightning.reporting.study import Study, band, study
from mapo_lightning.types import ConfigError

TOY = ("env=toy", "method=apv")


def gather(*roots: Path) -> list[Run]:
    return from_folders(roots, Stores())


def left(found: Study) -> dict[str, tuple[str, str]]:
    return {run.name: (run.state, run.why) for run in found.left}


def test_a_finished_run_tells_what_it_reached(tmp_path: Path) -> None:
    make_run(tmp_path / "a", *TOY, "seed=3", score=20.5, success=0.75,
             curve=[(2000, 3.0), (4800, 20.5)])  # fmt: skip
    (run,) = gather(tmp_path)
    assert (run.name, run.state, run.method, run.task, run.seed) == (
        "a", "finished", "apv", "toy/disc", 3,
    )  # fmt: skip
    assert run.counts
    assert (run.frames, run.agent) == (4800, Policy(20.5, 0.75))
    assert run.baselines == {"random": Policy(2.0, 0.1), "still": Policy(1.0, None)}
    assert run.curve == ((2000, 3.0), (4800, 20.5))
    assert run.tuning_seconds == 4800  # from the row at 1000 to that at 1000 + 4800
    assert compare.rate(run) == 1.0


def test_a_later_value_of_a_step_counts_and_half_a_row_does_not(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", *TOY, score=1.0, curve=[(10, 1.0), (20, 2.0), (20, 5.0)])
    with (run / "finetune/curves.csv").open("a") as file:
        file.write("eval/return,30,nan,9000\neval/ret")
    assert gather(tmp_path)[0].curve == ((10, 1.0), (20, 5.0))


def test_what_does_not_count_says_why(tmp_path: Path) -> None:
    make_run(tmp_path / "good", *TOY, "seed=1", score=5.0)
    failed = make_run(tmp_path / "failed", *TOY, "seed=2", mark=False)
    (failed / "log.txt").write_text("error: first\nmore\nerror: the disk is full\nmore\n")
    begun = make_run(tmp_path / "begun", *TOY, "seed=3", mark=False)
    (begun / "finetune").mkdir()
    (begun / "finetune/last.ckpt").touch()
    make_run(tmp_path / "longer", *TOY, "seed=4", score=9.0, frames=2000, mark=False)
    broken = make_run(tmp_path / "broken", *TOY, "seed=5", score=9.0)
    (broken / "evaluation.json").write_text('{"policies": ')
    odd = make_run(tmp_path / "odd", *TOY, "seed=6", score=9.0)
    (odd / "evaluation.json").write_text('{"policies": {}}')
    make_run(tmp_path / "lost", *TOY, "seed=7", score=float("nan"))
    found = study(gather(tmp_path))
    assert [run.name for cell in found.cells for run in cell.runs] == ["good"]
    assert left(found).pop("failed") == ("failed", "the disk is full")
    assert left(found)["begun"] == ("unfinished", "newest checkpoint finetune/last.ckpt")
    assert left(found)["longer"] == ("unfinished", "evaluated after 2,000 of 4,800 frames")
    for name, why in (
        ("broken", "evaluation.json cannot be read"),
        ("odd", "evaluation.json holds no evaluation"),
        ("lost", "a result is nan"),
    ):  # fmt: skip
        state, reason = left(found)[name]
        assert state == "damaged"
        assert reason.startswith(why)


def test_runs_of_a_sweep_that_have_not_begun_are_named(tmp_path: Path) -> None:
    make_run(tmp_path / "s/seed=0", *TOY, score=5.0)
    points = {"seed=0": {"seed": "0"}, "seed=1": {"seed": "1"}, "../../etc": {"seed": "2"}}
    (tmp_path / "s/sweep.yaml").write_text(yaml.safe_dump({"points": points}))
    found = study(gather(tmp_path / "s"))
    assert left(found) == {"seed=1": ("missing", "it has not begun")}
    assert found.left[0].seed == 1
    (tmp_path / "s/sweep.yaml").write_text("points: [")
    with pytest.raises(ConfigError, match=r"sweep\.yaml' is damaged"):
        gather(tmp_path / "s")


def test_a_folder_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run in"):
        gather(tmp_path)
    with pytest.raises(ConfigError, match="there is no folder"):
        gather(tmp_path / "nowhere")


def test_a_folder_that_is_given_twice_counts_once(tmp_path: Path) -> None:
    make_run(tmp_path / "x/a", *TOY, score=5.0)
    assert len(gather(tmp_path, tmp_path / "x", tmp_path / "x/a")) == 1


def test_what_mlflow_keeps_of_a_run_is_no_run(tmp_path: Path) -> None:
    make_run(tmp_path / "a", *TOY, score=5.0)
    make_run(tmp_path / "artifacts" / ("0f" * 16) / "artifacts", *TOY, score=6.0)
    make_run(tmp_path / "mine/artifacts", *TOY, "seed=1", score=7.0)  # a name that users may take
    assert sorted(run.name.rpartition("/")[2] for run in gather(tmp_path)) == ["a", "artifacts"]


def test_an_evaluation_of_another_runs_agent_is_no_seed(tmp_path: Path) -> None:
    make_run(tmp_path / "a", *TOY, score=5.0)
    make_run(
        tmp_path / "again", *TOY, "stage=evaluate", "checkpoint=a/finetune/last.ckpt", score=6.0
    )
    found = study(gather(tmp_path))
    assert [cell.values.tolist() for cell in found.cells] == [[5.0]]
    assert [run.name for run in found.others] == ["again"]


def test_of_two_runs_of_one_seed_the_newest_counts(tmp_path: Path) -> None:
    old = make_run(tmp_path / "old", *TOY, "seed=0", score=5.0)
    make_run(tmp_path / "new", *TOY, "seed=0", score=7.0)
    os.utime(old / "evaluation.json", (1, 1))
    found = study(gather(tmp_path))
    assert found.cells[0].values.tolist() == [7.0]
    why = "the same method, task and seed as new, which is newer"
    assert left(found) == {"old": ("left out", why)}


def test_settings_that_vary_make_variants_and_seeds_do_not(tmp_path: Path) -> None:
    for seed, memory in ((0, "none"), (1, "cheap")):  # the same arithmetic in less memory
        for horizon in (5, 8):
            words = [f"seed={seed}", f"world_model.image.recompute={memory}"]
            words += [f"agent.horizon={horizon}"]
            score = float(horizon + seed)
            make_run(tmp_path / f"{horizon}-{seed}", *TOY, *words, score=score)
    found = study(gather(tmp_path))
    values = {cell.label: cell.values.tolist() for cell in found.cells}
    assert values == {"apv, horizon=5": [5.0, 6.0], "apv, horizon=8": [8.0, 9.0]}
    assert len({cell.colour for cell in found.cells}) == 1
    assert len({cell.marker for cell in found.cells}) == 2


def test_variants_are_named_by_the_settings_that_tell_them_apart(tmp_path: Path) -> None:
    """Four settings vary; two of them tell the three variants apart, and the others are noted."""
    presets = {
        "a": ("agent.horizon=5", "agent.lam=0.9", "agent.discount=0.9", "finetune.batch_size=4"),
        "b": ("agent.horizon=8", "agent.lam=0.8", "agent.discount=0.8", "finetune.batch_size=4"),
        "c": ("agent.horizon=8", "agent.lam=0.8", "agent.discount=0.8", "finetune.batch_size=8"),
    }
    for name, words in presets.items():
        make_run(tmp_path / name, *TOY, *words, score=5.0)
    found = study(gather(tmp_path))
    assert {cell.runs[0].name: cell.label for cell in found.cells} == {
        "a": "apv, discount=0.9, batch_size=4", "b": "apv, discount=0.8, batch_size=4",
        "c": "apv, discount=0.8, batch_size=8",
    }  # fmt: skip
    assert (
        "The variants of apv on toy/disc differ in more settings than their names tell: "
        in (found.notes[0])
    )
    assert found.notes[0].endswith("agent.horizon, agent.lam.")


def test_a_run_without_pre_training_is_another_method(tmp_path: Path) -> None:
    started = make_run(tmp_path / "pre", *TOY, "stage=pretrain")
    (started / "pretrain").mkdir()
    (started / "pretrain/last.ckpt").touch()
    make_run(tmp_path / "with", *TOY, "stage=finetune", f"init_from={started}/pretrain/last.ckpt",
             score=9.0)  # fmt: skip
    make_run(tmp_path / "without", *TOY, "stage=finetune", score=4.0)
    found = study(gather(tmp_path))
    assert {cell.label: cell.values.tolist() for cell in found.cells} == {
        "apv, pre-training=no": [4.0], "apv, pre-training=yes": [9.0],
    }  # fmt: skip
    assert found.origins["with"].pretraining == "pre"
    assert found.origins["with"].folder == started
    assert [run.name for run in found.others] == ["pre"]


def test_runs_that_do_not_compare_are_named(tmp_path: Path) -> None:
    make_run(tmp_path / "a", *TOY, score=5.0)
    make_run(tmp_path / "b", "env=toy", "method=contextwm", "finetune.agent_steps=5000", score=9.0)
    notes = " ".join(study(gather(tmp_path)).notes)
    assert "differ in finetune.agent_steps (2400: a; 5000: b)" in notes
    assert "do not compare" in notes


def test_settings_that_only_some_runs_know_are_named(tmp_path: Path) -> None:
    make_run(tmp_path / "a", *TOY, "seed=0", score=5.0)
    old = make_run(tmp_path / "b", *TOY, "seed=1", score=9.0)
    tree = yaml.safe_load((old / "config.yaml").read_text())
    del tree["agent"]["horizon"]
    (old / "config.yaml").write_text(yaml.safe_dump(tree))
    found = study(gather(tmp_path))
    assert [cell.values.tolist() for cell in found.cells] == [[5.0, 9.0]]
    assert any("apv know the settings agent.horizon:" in note for note in found.notes)


def test_names_that_mlflow_has_twice_are_told_apart() -> None:
    runs = [Run("x", None, "finished", mlflow=i * 16) for i in "ab"] + [Run("y", None, "finished")]
    assert [run.name for run in unique(runs)] == ["x aaaaaaaa", "x bbbbbbbb", "y"]


def test_curves_on_the_same_frames_are_averaged_frame_by_frame() -> None:
    found = band([((10, 1.0), (20, 3.0)), ((10, 3.0), (20, 9.0))])
    assert found is not None
    assert (found.frames, found.aligned) == ((10, 20), False)
    assert [point.mean for point in found.points] == [2.0, 6.0]


def test_curves_on_different_frames_hold_their_last_evaluation() -> None:
    sparse, dense = ((10, 1.0), (20, 3.0)), ((5, 2.0), (9, 4.0), (15, 6.0), (19, 8.0))
    found = band([sparse, dense])
    assert found is not None
    # At 10 the dense one stands at its evaluation at 9; at 20 it has ended.
    assert (found.frames, found.aligned) == ((10,), True)
    assert found.points[0].mean == 2.5
    assert band([((10, 1.0),), ((20, 1.0),)]) is None
    assert band([(), ()]) is None


def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    long = tuple((frame, float(frame)) for frame in range(1, 1001))
    found = band([long, long])
    assert found is not None
    assert len(found.frames) == 120
    assert (found.frames[0], found.frames[-1]) == (1, 1000)


def test_normalised_returns_begin_at_random_and_end_at_the_best_mean(tmp_path: Path) -> None:
    for seed, score in enumerate((4.0, 8.0)):
        make_run(tmp_path / f"a{seed}", *TOY, f"seed={seed}", score=score)
    make_run(tmp_path / "c", "env=toy", "method=contextwm", score=10.0)
    found = study(gather(tmp_path))
    scores = found.normalised("apv")
    assert scores is not None
    assert scores[0].tolist() == [0.25, 0.75]  # random gets 2, contextwm 10


def test_dreams_of_every_kind_of_file_are_read(tmp_path: Path) -> None:
    told = [
        {"dream": "told", "frames_ahead": n, "mean": 10.0 * n, "low": 0, "high": 0} for n in (1, 5)
    ]
    judged = [{"aspect": "looks", "dream": "dream", "measure": "psnr", "frames_ahead": 4,
               "mean": 7.5, "low": 0, "high": 0, "contexts": 1}]  # fmt: skip
    files = {"pretrain/told.json": told, "dreams/dreams.json": judged, "foresight.json": [0.9, 0.5]}
    make_run(
        tmp_path / "a",
        *TOY,
        score=5.0,
        more={**files, "dreams.json": {"drawn": 1.0, "copy 5": 3.0}},
    )
    run = read_run(tmp_path / "a", "a")
    assert Dream("looks: psnr", 4, 7.5) in run.dreams
    assert Dream("error, copy", 5, 3.0) in run.dreams
    found = compare.dreams(study([run]))
    key = ("toy/disc", "apv")
    assert {measure: mine[key].mean for measure, mine in found.items()} == {
        "error, copy, 5 ahead": 3.0, "error, told, 5 ahead": 50.0, "looks: psnr, 4 ahead": 7.5,
        "reward foreseen, correlation: now": 0.9,
        "reward foreseen, correlation: sum of ten steps ahead": 0.5,
    }  # fmt: skip
    (tmp_path / "a/dreams.json").write_text(json.dumps([{"aspect": "looks"}]))
    assert "dreams.json has a row without dream, measure" in read_run(tmp_path / "a", "a").why


def test_a_comparison_can_be_seen_from_either_side(tmp_path: Path) -> None:
    for seed, score in enumerate((4.0, 8.0)):
        make_run(tmp_path / f"a{seed}", *TOY, f"seed={seed}", score=score)
        make_run(tmp_path / f"c{seed}", "env=toy", "method=contextwm", f"seed={seed}",
                 score=score + 3)  # fmt: skip
    found = compare.comparisons(study(gather(tmp_path)))
    (one,), (two,) = (compare.from_view(name, found) for name in ("apv", "contextwm"))
    assert (one.second, two.second) == ("contextwm", "apv")
    assert (one.improvement.value, two.improvement.value) == (0.25, 0.75)
    assert one.improvement.interval is not None
    assert two.improvement.interval == (
        1 - one.improvement.interval[1],
        1 - one.improvement.interval[0],
    )
    assert one.difference is not None
    assert two.difference is not None
    assert (one.difference.mean, two.difference.mean) == (-3.0, 3.0)
    assert two.difference.interval is not None
    assert one.difference.interval == (-two.difference.interval[1], -two.difference.interval[0])


def test_a_curve_of_a_run_is_kept_without_an_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", *TOY, mark=False)
    write_curve(run, [(100, 1.0)])
    (found,) = gather(tmp_path)
    assert (found.curve, found.counts) == (((100, 1.0),), False)
