"""Quality of labels: videos whose motion is known, and the arithmetic by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from miniatures import write_list, write_ssv2
from scenes import cases, moving_camera, moving_square, still

from callbacks.label_report import LabelReport
from callbacks.settings import CallbacksConfig
from mapo_lightning.data.clips import LabelExample
from mapo_lightning.data.ground_truth import FILE, GroundTruth
from mapo_lightning.data.video import write_mp4
from mapo_lightning.label_tools.quality_report import _Stopwatch, markdown, measure
from mapo_lightning.run.quality import main
from mapo_lightning.semantics.agreement import (
    Agreement,
    Judged,
    agreement,
    clear_shift,
    frozen,
    jittered,
    said_direction,
    sentence_shift,
)
from mapo_lightning.semantics.describer import NoAnswer, Reply, Usage
from mapo_lightning.semantics.embed import HashedSlots
from mapo_lightning.semantics.flow import FlowDescriber
from mapo_lightning.semantics.labeler import Labeler
from mapo_lightning.semantics.phrase import Phrase, parse_reply
from mapo_lightning.semantics.point_tracking import dominant_motion
from mapo_lightning.semantics.store import LabelStore
from mapo_lightning.types import ConfigError, DescriberError, Frames, VideoError

ANGLES = [math.pi / 4 * way for way in range(8)]  # right, lower right, down ...


def says(direction: str, displacement: str = "5 cm") -> Phrase:
    return Phrase("hand", "moves", "cup", direction, displacement)


@pytest.mark.slow
@pytest.mark.parametrize("film", [moving_square, moving_camera])
def test_tracked_points_find_the_direction_and_the_distance(film: object) -> None:
    rng, found = np.random.default_rng(0), 0
    for way, percent in cases(24):
        if percent < 2.0:
            continue
        shift = dominant_motion(film(rng, way, percent))  # type: ignore[operator]
        if shift is None:
            continue
        found += 1
        assert np.linalg.norm(shift) == pytest.approx(percent, rel=0.25)
        assert math.cos(math.atan2(shift[1], shift[0]) - ANGLES[way]) > 0.95
    assert found >= 12


def test_tracked_points_stand_still_with_the_scene() -> None:
    shift = dominant_motion(still(np.random.default_rng(0), 2.0))
    assert shift is not None
    assert np.linalg.norm(shift) < 0.5
    assert dominant_motion(np.full((4, 64, 64, 3), 90, np.uint8)) is None


@pytest.mark.parametrize(
    ("direction", "expected"),
    [
        ("right", (1, 0)),
        ("Upwards", (0, -1)),
        ("towards the lower left", (-0.7071, 0.7071)),
        ("clockwise", None),
        ("counter-clockwise", None),
        ("towards the camera", None),
        ("", None),
        ("left and right", None),
    ],
)
def test_direction_that_a_phrase_names(
    direction: str, expected: tuple[float, float] | None
) -> None:
    said = said_direction(says(direction))
    assert (said is None) == (expected is None)
    if said is not None and expected is not None:
        np.testing.assert_allclose(said, expected, atol=1e-3)


def test_clear_motion_is_large_and_of_one_mind() -> None:
    np.testing.assert_array_equal(clear_shift(np.array([[0.0, 0.1], [4.0, 0.0]])), [4.0, 0.0])
    assert clear_shift(np.array([[2.9, 0.0]])) is None  # below 3 percent
    assert clear_shift(np.array([[4.0, 0.0], [-2.1, 0.0]])) is None  # another part swings back
    assert clear_shift(np.array([[4.0, 0.0], [-1.9, 0.0]])) is not None  # but not far
    assert clear_shift(np.array([[4.0, 0.0], [2.5, 2.4]])) is not None  # within 45 degrees


def test_agreement_by_hand() -> None:
    right, up = np.array([5.0, 0.0]), np.array([0.0, -8.0])
    windows = [
        (says("right", "2 cm"), right),
        (says("right", "3 cm"), up),
        (says("up", "9 cm"), up),
        (says("clockwise"), right),
        (None, up),
        (says("left"), np.array([1.0, 0.0])),  # not a clear motion
        (says("left"), None),
    ]
    judged = [Judged("slots" if p else "null", p, shift, None) for p, shift in windows]
    found = agreement(judged, [one.by_points for one in judged])
    assert (found.clear, found.told, found.agree, found.null) == (5, 3, 2, 1)
    assert found.share == pytest.approx(2 / 3)
    # Phrases right, right, up against motions right, up, up: of six mixed pairs two are right.
    assert found.chance == pytest.approx(2 / 6)
    assert found.magnitude == pytest.approx(0.866, abs=1e-3)  # distances 2, 3, 9 for 5, 8, 8
    assert found.interval == pytest.approx((0.208, 0.939), abs=1e-3)
    nobody = agreement(judged, [one.by_simulator for one in judged])
    assert nobody.clear == 0
    assert math.isnan(nobody.share)
    assert nobody.interval == (0.0, 1.0)


def test_a_class_is_a_reference_where_something_moves() -> None:
    moving, slow = np.array([-9.0, 0.0]), np.array([2.0, 0.0])
    np.testing.assert_allclose(sentence_shift("right", moving), [100.0, 0.0])
    np.testing.assert_allclose(sentence_shift("up", moving), [0.0, -100.0])
    for direction, by_points in (("", moving), ("right", slow), ("right", None)):
        assert sentence_shift(direction, by_points) is None


@pytest.mark.slow
def test_the_directions_of_real_videos_are_judged_by_their_classes(
    in_tmp: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_ssv2(in_tmp / "ssv2", train=4, validation=2)  # a block moves right in every video
    labels = in_tmp / "ssv2" / "labels"
    names = ("Pushing something from left to right", "Pulling something from right to left")
    write_list(
        labels / "labels.json",
        {name: str(i) for i, name in enumerate((*names, "Holding something"))},
    )
    for split, first in (("train", 0), ("validation", 4)):
        rows = json.loads((labels / f"{split}.json").read_text())
        for number, row in enumerate(rows, first):
            row["template"] = (*names, "Holding something")[number % 3].replace(
                "something", "[something]"
            )
        write_list(labels / f"{split}.json", rows)
    (in_tmp / "conf").symlink_to(root / "conf")
    words = ["data=ssv2", "data.root=ssv2", "data.workers=0", "callbacks.quality=6", "run_dir=out"]
    assert main([*words, "vlm=flow"]) == 0
    found = json.loads((in_tmp / "out/flow.json").read_text())
    # Flow sees the block move right: two videos say so, two say left, two say nothing.
    assert (found["sentence"]["clear"], found["sentence"]["told"]) == (4, 4)
    assert found["sentence"]["agree"] == 2
    assert "| direction as class | 50.0 % of 4" in (in_tmp / "out/flow.md").read_text()
    assert {video: one["agree"] for video, one in found["by_video"].items() if one["told"]} == {
        "101.webm": 1, "102.webm": 0, "104.webm": 1, "105.webm": 0,
    }  # fmt: skip
    assert main([*words, "vlm=templates"]) == 0
    table = (in_tmp / "out/templates.md").read_text()
    assert "| direction as class | 100.0 % of 4" in table
    assert "| still clips called null | - |" in table
    assert "same words" not in table
    capsys.readouterr()


def test_statistics_of_equal_and_of_few_windows() -> None:
    shifts = [np.array([length, 0.0]) for length in (4.0, 4.0, 6.0, 9.0, 9.0)]

    def measured(*distances: int) -> Agreement:
        phrases = [says("right", f"{distance} cm") for distance in distances]
        judged = [Judged("slots", phrase, None, None) for phrase in phrases]
        return agreement(judged, shifts[: len(judged)])

    # Ranks 1.5 1.5 3 4.5 4.5 of the motions against 2 1 3.5 3.5 5: 8.25 of the root of 9 times 9.5.
    assert measured(2, 1, 5, 5, 8).magnitude == pytest.approx(8.25 / math.sqrt(9.0 * 9.5))
    assert measured(2, 4, 6, 8, 8).magnitude == pytest.approx(9.0 / math.sqrt(9.0 * 9.5))
    assert math.isnan(measured(3, 3, 3, 3, 3).magnitude)
    assert math.isnan(measured(2, 4).magnitude)
    low, high = measured(1, 1, 1, 1, 1).interval  # Wilson's lower end is n / (n + z^2)
    assert (low, high) == pytest.approx((5 / (5 + 1.959964**2), 1.0), abs=1e-6)


def test_jitter_changes_pixels_but_not_the_motion() -> None:
    clip = moving_square(np.random.default_rng(0), 0, 6.0)
    before = clip.copy()
    copies = jittered(clip)
    for copy in copies.values():
        assert copy.shape == clip.shape
        assert copy.dtype == np.uint8
        assert not np.array_equal(copy, clip)
        phrase = parse_reply(FlowDescriber().describe([copy])[0].text).phrase
        assert phrase is not None
        assert phrase.direction == "right"
    np.testing.assert_array_equal(copies["shift"][:, 1:, 2:], clip[:, :-1, :-2])
    np.testing.assert_array_equal(jittered(clip)["noise"], copies["noise"])
    assert FlowDescriber().describe([frozen(clip)])[0].text == "null"
    np.testing.assert_array_equal(clip, before)


class Stubborn:
    """Says the same of everything."""

    name, in_worker = "stubborn", True

    def describe(self, clips: Sequence[Frames]) -> list[Reply]:
        return [Reply("[a thing][moves][nothing][right][1 cm]") for _ in clips]


def examples(folder: Path, describer: FlowDescriber | Stubborn) -> list[LabelExample]:
    """A square that moves each way in turn; a truth file says so for every second one."""
    rng, made, lines = np.random.default_rng(0), [], []
    for number, (way, percent) in enumerate(cases(16)):
        film = moving_square(rng, way, 4.0 + percent)
        name = f"film{number}.mp4"
        text = describer.describe([film])[0].text
        phrase, status = parse_reply(text)
        made.append(LabelExample(film, name, 0, text, status, phrase, folder / name, 3))
        far = (4.0 + percent) * np.array([math.cos(ANGLES[way]), math.sin(ANGLES[way])])
        path = [(far * t / 3).tolist() for t in range(4)]
        if number % 2 == 0:
            paths = {"square": path, "mocap": [[0, 0], [90, 0], [0, 90], [50, 50]]}
            lines.append(json.dumps({"video": name, "size": 100, "paths": paths}))
    (folder / FILE).write_text("\n".join(lines))
    return made


@pytest.mark.slow
def test_a_good_describer_is_told_from_a_stubborn_one(tmp_path: Path) -> None:
    found = []
    for describer in (FlowDescriber(), Stubborn()):
        store = LabelStore(tmp_path / describer.name, "w", durable=False)
        labeler, windows = Labeler(describer, store, HashedSlots()), examples(tmp_path, describer)
        quality = measure(labeler, windows)
        again = measure(labeler, windows)
        assert repr(again) == repr(quality)  # NaN is no equal of itself
        assert labeler.stats.asked == 4 * 16  # the second time everything is known
        found.append(quality)
    flow, stubborn = found
    assert flow.truth.clear == flow.truth.agree == 8
    assert flow.flow.share > 0.9
    assert flow.flow.share > flow.flow.chance + 0.5
    assert flow.truth.magnitude > 0.5
    assert flow.still_null == 1.0
    assert min(flow.direction_kept.values()) > 0.9
    assert stubborn.truth.told == 8
    assert stubborn.truth.share == pytest.approx(stubborn.truth.chance, abs=0.1)
    assert stubborn.still_null == 0.0
    assert set(stubborn.words_kept.values()) == {1.0}
    table = markdown(found)
    lines = table.splitlines()
    assert lines.index("") == 2 + len(flow.row()) - 1
    assert lines.count("| film0.mp4 | 1 of 1 |") == 2  # the square moves right, so both are right
    assert "| film2.mp4 | 0 of 1 |" in lines  # down
    assert not any("film1.mp4" in line for line in lines)  # nobody knows its truth
    assert "| direction as simulator | 100.0 % of 8 [68, 100] |" in table


class Shy(FlowDescriber):
    """Gives no answer about every third window, by its content."""

    def __init__(self) -> None:
        super().__init__()
        self.name, self.silent = "shy", 0

    def describe(self, clips: Sequence[Frames]) -> list[Reply | NoAnswer]:
        quiet = [int(clip.astype(np.int64).sum()) % 3 == 0 for clip in clips]
        self.silent += sum(quiet)
        replies = super().describe(clips)
        return [NoAnswer("shy") if q else r for q, r in zip(quiet, replies, strict=True)]


@pytest.mark.slow
def test_windows_without_an_answer_count_nowhere(tmp_path: Path) -> None:
    describer = Shy()
    labeler = Labeler(describer, LabelStore(tmp_path / "s", "w", durable=False), HashedSlots())
    windows = examples(tmp_path, FlowDescriber())
    windows[3] = windows[3]._replace(answered=False, status="null", phrase=None)
    found = measure(labeler, windows)
    assert describer.silent > 3
    assert found.unanswered == describer.silent + 1
    assert found.windows == 15
    assert found.null == 0.0
    assert found.still_null == 1.0  # of those that got an answer
    assert min(found.direction_kept.values()) > 0.9
    assert f"| without an answer | {found.unanswered} |" in markdown([found])
    nobody = [window._replace(answered=False) for window in windows]
    with pytest.raises(DescriberError, match="'shy' has answered about none of 16 windows"):
        measure(labeler, nobody)


def test_the_cost_is_that_of_all_queries_but_the_first() -> None:
    now = iter([0.0, 99.0, 100.0, 100.2, 101.0, 101.4, 102.0, 110.0, 111.0, 115.0])
    watch = _Stopwatch(Stubborn(), clock=lambda: next(now))
    clip = moving_square(np.random.default_rng(0), 0, 6.0)
    for windows in (1, 1, 1, 16, 8):
        assert len(watch.describe([clip] * windows)) == windows
    cost = watch.cost(Usage(queries=30, counted=27, tokens_in=2700, tokens_out=540))
    assert cost.windows == 26
    assert cost.seconds == pytest.approx(0.3)
    assert cost.seconds_90 == pytest.approx(0.38)
    assert cost.per_second == pytest.approx(24 / 12)
    assert cost.row()["tokens per query"] == "100 in, 20 out"
    nothing = _Stopwatch(Stubborn()).cost(Usage())
    assert nothing.windows == 0
    assert set(nothing.row().values()) == {0, "-"}


def test_training_prints_what_it_counted() -> None:
    report = LabelReport(CallbacksConfig())
    counts = {"windows": 9, "asked": 4, "hits": 3, "null": 5, "rejected": 1, "unanswered": 2}
    report.total = {name: torch.tensor(count) for name, count in counts.items()}
    assert str(report) == (
        "labels of 9 windows: 4 queried, 3 known before; 5 count as null, 2 of them for lack "
        "of an answer"
    )


def test_nothing_to_judge_by_is_an_error(tmp_path: Path) -> None:
    labeler = Labeler(Stubborn(), LabelStore(tmp_path, "w"), HashedSlots())
    with pytest.raises(ConfigError, match=r"callbacks\.quality must be > 0"):
        measure(labeler, [])


def test_truth_is_read_per_folder_and_checked(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    line = {"video": "a.mp4", "size": 200, "paths": {"hand": [[0, 0], [10, 4], [20, 8]]}}
    (tmp_path / FILE).write_text(json.dumps(line))
    truth = GroundTruth([tmp_path, tmp_path / "none"])
    moved = truth.moved(tmp_path / "a.mp4", 0, 2)
    assert moved is not None
    assert moved.parts == ("hand",)
    np.testing.assert_allclose(moved.shifts, [[10.0, 4.0]])
    assert truth.moved(tmp_path / "a.mp4", 0, 3) is None
    assert truth.moved(tmp_path / "b.mp4", 0, 2) is None
    for broken in ("{", "[1]", json.dumps(line | {"size": 0}), json.dumps(line | {"paths": 3})):
        (tmp_path / FILE).write_text(broken)
        with pytest.raises(VideoError, match="does not hold the true motion"):
            GroundTruth([tmp_path])


@pytest.mark.slow
def test_the_program_prints_and_writes_one_table(
    root: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for name, way in (("right", 0), ("up", 6)):
        write_mp4(in_tmp / f"films/{name}.mp4", moving_square(rng, way, 20.0, frames=9), 25.0)
    (in_tmp / "conf").symlink_to(root / "conf")
    words = ["data=folder", "data.root=films", "data.clip_length=9", "callbacks.quality=4"]
    assert main([*words, "run_dir=out"]) == 0
    table = capsys.readouterr().out
    assert table == (in_tmp / "out/flow.md").read_text()
    assert "| direction as points | 100.0 % of 4 [51, 100] |" in table
    found = json.loads((in_tmp / "out/flow.json").read_text())
    assert found["flow"]["agree"] == 4
    assert found["truth"]["share"] is None
    assert set(found["by_video"]) == {"right.mp4", "up.mp4"}
    assert main(["data=folder", "data.root=nowhere"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
