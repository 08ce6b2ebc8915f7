"""What is measured of dreams ranks dreams of known worth as was declared beforehand."""

from __future__ import annotations

import csv
import itertools
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mapo_lightning.judging.clips import Clips, misled, yardsticks
from mapo_lightning.judging.control import GENIE
from mapo_lightning.judging.episodes import halves
from mapo_lightning.judging.executable import inverse_model
from mapo_lightning.judging.judge import judge
from mapo_lightning.judging.looks import looks
from mapo_lightning.judging.measure import Measure
from mapo_lightning.judging.report import DreamReport, over_models, report
from mapo_lightning.judging.rollouts import write_rollouts
from tests.constructed_dreams import KINDS, SIZE, STEPS, ConstructedWorld, toy_clips

SEEN = 5


@cache
def clips() -> Clips:
    return toy_clips(range(100, 124))


@cache
def judged() -> dict[str, DreamReport]:
    """Every constructed dream, judged in the same way; the inverse model saw other episodes."""
    torch.manual_seed(0)
    inverse = inverse_model(toy_clips(range(500, 596)).batch)
    return {
        kind: judge(ConstructedWorld(kind), clips(), kind, inverse)  # type: ignore[arg-type]
        for kind in KINDS
    }


def figure(kind: str, *key: Any) -> float:
    return judged()[kind].at(*key).mean


# Declared before the metrics were run: from the best dream to the worst, in groups. A metric must
# rank the groups strictly; inside a group it cannot tell one from another, and need not.
RANKINGS: dict[tuple[str, str, str, int], list[set[str]]] = {
    ("looks", "dream", "psnr_moving", 5): [{"oracle"}, {"noisy"}, {"copy", "blind", "wrong"}],
    ("looks", "dream", "ssim_moving", 5): [{"oracle"}, {"noisy"}, {"copy", "blind", "wrong"}],
    ("control", "random", "control_moving", GENIE): [
        {"oracle"}, {"noisy"}, {"copy", "blind", "wrong"},
    ],
    # Who dreams the wrong way round comes nearer to the truth when told the opposite.
    ("control", "negated", "control_moving", GENIE): [
        {"oracle"}, {"noisy"}, {"copy", "blind"}, {"wrong"},
    ],
    # Steps that never happened say little of actions; steps the wrong way say the opposite.
    ("executable", "dream", "action", 6): [{"oracle"}, {"noisy"}, {"copy", "blind"}, {"wrong"}],
    ("foreseen", "dream", "reward", 5): [{"oracle"}, {"noisy"}, {"copy", "blind", "wrong"}],
    ("foreseen", "dream", "reward_sum", 5): [{"oracle"}, {"noisy"}, {"copy", "blind", "wrong"}],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("key", RANKINGS, ids=lambda key: "-".join(map(str, key)))
def test_constructed_dreams_are_ranked_as_declared(key: tuple[str, str, str, int]) -> None:
    values = {kind: figure(kind, *key) for kind in KINDS}
    ranking = RANKINGS[key]
    for better, worse in itertools.pairwise(ranking):
        low, high = min(values[k] for k in better), max(values[k] for k in worse)
        assert low > high, f"{key}: {better} should rank above {worse}: {values}"


@pytest.mark.slow
def test_dreams_that_ignore_actions_lose_nothing_when_misled() -> None:
    for kind in ("copy", "blind"):
        for way in ("random", "swapped", "negated", "null"):
            estimate = judged()[kind].at("control", way, "control_moving", GENIE)
            assert (estimate.mean, estimate.low, estimate.high) == (0.0, 0.0, 0.0)


@pytest.mark.slow
def test_the_ends_of_the_scales() -> None:
    for measure, best in (("psnr_moving", 58.92), ("ssim_moving", 1.0)):
        assert figure("oracle", "looks", "dream", measure, 5) == pytest.approx(best, abs=0.01)
    assert figure("oracle", "foreseen", "dream", "reward", 5) == pytest.approx(1.0, abs=1e-6)
    assert figure("oracle", "foreseen", "dream", "reward_slope", 5) == pytest.approx(1.0, abs=1e-6)
    assert figure("oracle", "foreseen", "dream", "reward_bias", 5) == pytest.approx(0.0, abs=1e-6)
    assert figure("oracle", "executable", "dream", "action", 6) > 0.8
    assert figure("oracle", "executable", "dream", "action", 6) == figure(
        "oracle", "executable", "oracle", "action", 6
    )


@pytest.mark.slow
def test_whole_frames_hide_what_moves() -> None:
    """Why the pixels that move are judged apart: noise everywhere outweighs a missed motion."""
    truth = clips().truth
    torch.manual_seed(0)
    noisy = (truth + 0.12 * torch.randn_like(truth)).clamp(0, 1)
    copy = yardsticks(clips(), SEEN)["copy"]
    found = {name: looks(truth, x, SEEN) for name, x in (("noisy", noisy), ("copy", copy))}
    at = found["copy"]["psnr"].ahead.index(1)
    whole = {name: measures["psnr"].estimate(at).mean for name, measures in found.items()}
    moving = {name: measures["psnr_moving"].estimate(at).mean for name, measures in found.items()}
    assert whole["copy"] > whole["noisy"]
    assert moving["copy"] < moving["noisy"] + 3.0 < whole["copy"]


def test_looks_equal_their_definition() -> None:
    torch.manual_seed(0)
    truth = torch.full((2, 8, SIZE, SIZE, 3), 0.5)
    truth[:, :, :4] = torch.rand(2, 8, 4, SIZE, 3)  # only these rows move
    dream = (truth + 0.1 * torch.randn_like(truth)).clamp(0, 1)
    found = looks(truth, dream, SEEN, (1, 3, 9))
    assert found["psnr"].ahead == (1, 3)  # nine frames ahead there is none
    squared = (truth - dream).square()[:, 7]
    for measure, part in (("psnr", squared), ("psnr_moving", squared[:, :4])):
        expected = -10 * part.mean(dim=(1, 2, 3)).log10()
        assert found[measure].values[:, 1] == pytest.approx(expected.numpy(), rel=1e-5)
    still = torch.full_like(truth, 0.5)
    nothing = looks(still, still, SEEN, (1,))
    assert np.isnan(nothing["psnr_moving"].values).all()
    assert nothing["psnr_moving"].estimate(0).contexts == 0


def test_looks_may_ask_a_third_party() -> None:
    truth = torch.rand(2, 7, SIZE, SIZE, 3)
    found = looks(truth, truth * 0.5, SEEN, (1,), lambda a, b: (a - b).abs().mean())
    assert found["lpips"].values[:, 0] == pytest.approx(
        (0.5 * truth[:, SEEN]).mean(dim=(1, 2, 3)).numpy(), rel=1e-5
    )


def test_an_estimate_weighs_contexts_alike_and_resamples_groups() -> None:
    values = np.array([[1.0], [3.0], [5.0], [np.nan]])
    alone = Measure((1,), values).estimate(0)
    assert (alone.mean, alone.contexts) == (3.0, 3)
    assert 1.0 <= alone.low < 3.0 < alone.high <= 5.0
    grouped = Measure((1,), values).estimate(0, np.array([7, 7, 8, 9]))
    assert (grouped.mean, grouped.low, grouped.high) == (3.0, 2.0, 5.0)  # two groups: 2 or 5
    assert grouped.contexts == 2
    share = Measure((1,), np.array([[1.0], [2.0]]), np.array([[4.0], [8.0]])).estimate(0)
    assert (share.mean, share.low, share.high) == (0.75, 0.75, 0.75)
    nobody = Measure((1,), np.full((2, 1), np.nan)).estimate(0)
    assert np.isnan(nobody.mean)
    assert nobody.contexts == 0


def test_only_means_at_the_same_frames_are_subtracted() -> None:
    mean = Measure((1,), np.ones((2, 1)))
    assert (mean.less(mean).values == 0).all()
    for other in (Measure((2,), np.ones((2, 1))), Measure((1,), np.ones((2, 1)), np.ones((2, 1)))):
        with pytest.raises(ValueError, match="same frames ahead"):
            mean.less(other)


def test_what_is_shown_keeps_its_driver() -> None:
    torch.manual_seed(0)
    action = torch.rand(4, 8, 2)
    group = torch.tensor([0, 0, 1, 2])
    base = Clips({"action": action}, group, torch.empty(0), torch.empty(0), "action")
    ways = {name: batch["action"] for name, batch in misled(base, SEEN).items()}
    assert all(torch.equal(x[:, :SEEN], action[:, :SEEN]) for x in ways.values())
    assert torch.equal(ways["negated"][:, SEEN:], -action[:, SEEN:])
    assert not ways["null"][:, SEEN:].any()
    assert torch.equal(ways["swapped"][1, SEEN:], action[3, SEEN:])  # not of its own group
    assert -1.0 <= float(ways["random"].min()) < float(ways["random"].max()) <= 1.0
    alone = base._replace(group=torch.zeros(4))
    with pytest.raises(ValueError, match="two videos or episodes"):
        misled(alone, SEEN)


def test_phrases_are_turned_round_where_their_vectors_tell_directions() -> None:
    torch.manual_seed(0)
    batch = {"semantic": torch.randn(3, 8, 6), "has_semantic": torch.ones(3, 8, dtype=torch.bool)}
    base = Clips(batch, torch.arange(3), torch.empty(0), torch.empty(0), "phrase", slice(2, 4))
    ways = misled(base, SEEN)
    turned = ways["negated"]["semantic"]
    assert torch.equal(turned[:, SEEN:, 2:4], -batch["semantic"][:, SEEN:, 2:4])
    assert torch.equal(turned[..., :2], batch["semantic"][..., :2])
    assert not ways["null"]["has_semantic"][:, SEEN:].any()
    assert ways["null"]["has_semantic"][:, :SEEN].all()
    assert "negated" not in misled(base._replace(direction=None), SEEN)


def episode(length: int, value: int) -> np.ndarray[Any, Any]:
    entries = np.zeros(
        length,
        [("obs", np.uint8, (4, 4, 3)), ("semantic", np.float16, (3,)), ("is_first", np.bool_)],
    )
    entries["obs"] = value
    entries["is_first"][0] = True
    return entries


def test_episodes_are_halved_and_cut_to_one_length() -> None:
    episodes = [episode(n, v) for v, n in enumerate((30, 28, 40, 26, 9, 3))]
    found = halves(episodes, SEEN, furthest=15, seed=0)
    assert found.clips.steps == 20  # 5 shown and 15 ahead; the short ones are left out
    assert found.clips.batch["obs"][:, 0, 0, 0, 0].tolist() == [0, 2]
    assert found.learned["obs"][:, 0, 0, 0, 0].tolist() == [1, 3]
    assert found.clips.batch["is_first"][:, 0].all()
    assert found.clips.still[1] == pytest.approx(2 / 255)
    mean = (28 * 1 + 26 * 3) / (28 + 26)  # of all frames of the others
    assert 255 * float(found.clips.mean_picture.mean()) == pytest.approx(mean, rel=1e-5)
    with pytest.raises(ValueError, match="four episodes with more than 5 frames are needed, got 0"):
        halves([episode(5, 0)] * 9, SEEN, furthest=15, seed=0)


def test_dreams_are_written_without_loss(tmp_path: Path) -> None:
    dream = torch.rand(24, STEPS, SIZE, SIZE, 3)
    write_rollouts(tmp_path, clips(), dream, SEEN, 5.0, "a model")
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 24
    manifest = json.loads((folders[3] / "manifest.json").read_text())
    assert (manifest["horizon"], manifest["fps"], manifest["resolution"]) == (11, 5.0, [32, 32])
    truth = clips().batch["obs"][3].numpy()
    for name, frame in (("context/frame_00004", truth[4]), ("ground_truth/frame_00000", truth[5])):
        assert (np.asarray(Image.open(folders[3] / f"{name}.png")) == frame).all()
    last = np.asarray(Image.open(folders[3] / "predictions/sample_00/frame_00010.png"))
    assert (last == (255 * dream[3, 15]).round().byte().numpy()).all()
    action = np.load(folders[3] / "actions.npy")
    assert (action == clips().batch["action"][3, SEEN:].numpy()).all()


def test_clips_that_are_too_short_are_refused() -> None:
    with pytest.raises(ValueError, match="after 16 frames, and the longest sequence has 16"):
        judge(ConstructedWorld("copy"), clips(), "", seen=16)  # type: ignore[arg-type]


def small_report(shift: float = 0.0) -> DreamReport:
    looks_like = {
        name: {"psnr_moving": Measure((1, 5), np.array([[20.0, 10.0], [22.0, 12.0]]) + shift)}
        for name in ("dream", "copy", "still_scene", "mean_picture")
    }
    lost = {"random": {"control_moving": Measure((4,), np.array([[2.0], [3.0]]))}}
    return report("<b>", {"looks": looks_like, "control": lost}, np.arange(2))


def test_the_report_is_one_table_in_five_forms(tmp_path: Path) -> None:
    found = small_report()
    found.save(tmp_path)
    assert "5 frames ahead the dream has a PSNR of 11.0 dB" in found.sentence()
    assert "It obeys: misled at random it loses 2.5 [2, 3] dB 4 frames ahead" in found.sentence()
    assert found.metrics()["dream/looks_psnr_moving_5"] == 11.0
    assert found.metrics()["dream/control_random_control_moving_4"] == 2.5
    rows = json.loads((tmp_path / "dreams.json").read_text())
    with (tmp_path / "dreams.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [row["mean"] for row in rows] == [float(line["mean"]) for line in lines]
    assert rows[1] == {
        "aspect": "looks", "dream": "dream", "measure": "psnr_moving", "frames_ahead": 5,
        "mean": 11.0, "low": 10.0, "high": 12.0, "contexts": 2,
    }  # fmt: skip
    assert "| psnr moving | dream | 21 [20, 22] | 11 [10, 12] |" in found.markdown()
    page = (tmp_path / "dreams.html").read_text()
    assert "<h1>&lt;b&gt;</h1>" in page
    assert "<td>11 [10, 12]</td>" in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing is loaded from anywhere
    assert (tmp_path / "dreams.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(KeyError, match="looks/dream/psnr 5 ahead was not measured"):
        found.at("looks", "dream", "psnr", 5)


def test_several_models_are_summed_up_over_models() -> None:
    together = over_models([small_report(), small_report(1.0), small_report(2.0)])
    estimate = together.at("looks", "dream", "psnr_moving", 5)
    assert (estimate.mean, estimate.contexts) == (12.0, 3)
    assert estimate.high - estimate.mean == pytest.approx(4.303 / np.sqrt(3), rel=1e-3)  # Student's
