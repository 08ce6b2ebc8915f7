"""Late labels: nobody waits for them, and each lands where it belongs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from test_collector import LENGTH, clocks

from mapo_lightning.data.replay import Replay, ReplaySpec
from mapo_lightning.data.settings import ReplayConfig
from mapo_lightning.envs.collector import Collector
from mapo_lightning.envs.episodes import RandomPolicy
from mapo_lightning.envs.live_labels import LiveLabeler, Step
from mapo_lightning.run.build import answers_late
from mapo_lightning.run.config import RunConfig
from mapo_lightning.semantics.describer import Reply
from mapo_lightning.semantics.embed import HashedSlots
from mapo_lightning.semantics.labeler import Labeler
from mapo_lightning.semantics.phrase import Phrase
from mapo_lightning.semantics.settings import CollectConfig, VlmConfig, WindowConfig
from mapo_lightning.semantics.store import LabelStore
from mapo_lightning.training.settings import TrainerConfig
from mapo_lightning.types import ConfigError, DescriberError, Frames


def phrase(time: int) -> Phrase:
    return Phrase("clock", "ticks", "time", "up", f"{time} ticks")


class GatedClockReader:
    """Says when a window of a clock's pictures ended, but only while its gate is open."""

    name, in_worker = "gated clocks", True

    def __init__(self, breaks: Exception | None = None, shut: bool = False) -> None:
        self.breaks = breaks
        self.threads: set[str] = set()
        self.gate = threading.Event()
        if not shut:
            self.gate.set()

    def describe(self, clips: Sequence[Frames]) -> list[Reply]:
        self.gate.wait()
        self.threads.add(threading.current_thread().name)
        if self.breaks is not None:
            raise self.breaks
        ends = [int(clip[-1, 0, 0, 0]) for clip in clips]
        return [Reply("".join(f"[{slot}]" for slot in phrase(end))) for end in ends]


def collector(
    folder: Path, describer: GatedClockReader, **collect: float
) -> tuple[Collector, Replay]:
    labeler = Labeler(describer, LabelStore(folder / "labels", "test"), HashedSlots())
    settings = CollectConfig(**collect)  # type: ignore[arg-type]
    live_labeler = LiveLabeler(labeler, WindowConfig(), settings, 2, "clock", late=True)
    replay = Replay(folder / "replay", ReplayConfig(), ReplaySpec((8, 8, 3), 2, 320))
    return Collector(clocks(2), live_labeler, replay, seed=0), replay


def entries(replay: Replay) -> list[np.ndarray]:
    """All whole episodes, as they lie on disk."""
    return [np.load(path) for path in sorted(replay._folder.root.glob("episode-*.npy"))]


def window_of(time: int) -> int | None:
    """Last frame of the window that labels a frame: the grid of 4, held until the next."""
    return None if time < 3 else 3 + (time - 3) // 4 * 4


def test_no_environment_waits_for_a_describer_and_every_label_lands(tmp_path: Path) -> None:
    describer = GatedClockReader(shut=True)
    playing, replay = collector(tmp_path, describer, queue=1000, drain=600.0)
    # Returns although the describer answers nothing yet.
    playing.collect(RandomPolicy(2, 0), 6 * LENGTH)
    assert playing.live_labeler.waiting == 6 * (LENGTH // 4)
    describer.gate.set()
    playing.close()
    assert describer.threads == {"labels"}
    assert playing.live_labeler.skipped == 0
    episodes = entries(replay)
    assert len(episodes) == 6
    for episode in episodes:
        for entry in episode:
            now = int(entry["obs"][0, 0, 0])
            end = window_of(now)
            assert bool(entry["has_semantic"]) == (end is not None)
            expected = np.zeros(320) if end is None else HashedSlots().encode(phrase(end))
            np.testing.assert_allclose(entry["semantic"], expected, atol=1e-3)


def test_a_full_queue_skips_as_null_and_counts(tmp_path: Path) -> None:
    describer = GatedClockReader(shut=True)
    playing, replay = collector(tmp_path, describer, queue=3, drain=600.0)
    playing.collect(RandomPolicy(2, 0), 4 * LENGTH)
    assert playing.live_labeler.waiting == 3
    describer.gate.set()
    playing.close()
    skipped = playing.live_labeler.skipped
    assert skipped == 4 * (LENGTH // 4) - 3
    labelled = 0
    for episode in entries(replay):
        for end in range(3, LENGTH, 4):
            span = episode[end : end + 4]
            assert len(set(span["has_semantic"].tolist())) == 1, "a window is known or skipped"
            expected = HashedSlots().encode(phrase(end)) * span["has_semantic"][0]
            np.testing.assert_allclose(span["semantic"], [expected] * len(span), atol=1e-3)
            labelled += int(span["has_semantic"][0])
    assert labelled + skipped == 4 * (LENGTH // 4)


def test_acting_uses_the_newest_finished_answer_and_replay_waits_for_its_own(
    tmp_path: Path,
) -> None:
    playing, _ = collector(tmp_path, GatedClockReader())
    live_labeler, seen = playing.live_labeler, []
    for now in range(12):
        frame = {"image": np.full((2, 8, 8, 3), now, np.uint8)}
        step = live_labeler.update(frame, np.full(2, now == 0))
        seen.append(
            (bool(step["has_semantic"][0]), bool(live_labeler.to_store()["has_semantic"][0]))
        )
        held = step["semantic"][0]
        if now in (4, 8):
            expected = HashedSlots().encode(phrase(now - 1))
            np.testing.assert_array_equal(held, expected)
        if now == 7:  # still that of the first window, while its own is being asked about
            np.testing.assert_array_equal(held, HashedSlots().encode(phrase(3)))
        _settle(live_labeler)
    assert seen[:3] == [(False, False)] * 3
    assert seen[3] == (False, False)
    assert seen[4] == (True, True)
    assert seen[7] == (True, False)
    assert seen[8] == (True, True)
    live_labeler.close()


def _settle(live_labeler: LiveLabeler) -> None:
    """Wait until every query has its answer, or until the thread has ended with an error."""
    late = live_labeler._late
    assert late is not None
    while len(late._answered) < live_labeler.waiting:
        assert late._thread is not None
        late._thread.join(0.005)
        if late._error is not None:
            return


class _Patient(RandomPolicy):
    """Lets the other thread come to its end before each action."""

    def __init__(self, live_labeler: LiveLabeler) -> None:
        super().__init__(2, 0)
        self.live_labeler = live_labeler

    def __call__(self, step: Step) -> np.ndarray:
        _settle(self.live_labeler)
        return super().__call__(step)


def test_what_breaks_in_the_thread_reaches_the_user(tmp_path: Path) -> None:
    gone = DescriberError("the server at 127.0.0.1 is gone")
    playing, _ = collector(tmp_path, GatedClockReader(breaks=gone))
    with pytest.raises(DescriberError, match=r"127\.0\.0\.1 is gone"):
        playing.collect(_Patient(playing.live_labeler), LENGTH)
    playing.close()


def collected_before_the_answer(folder: Path, describer: GatedClockReader) -> Collector:
    """A collector with a window in each of two environments that is answered only now."""
    playing, _ = collector(folder, describer)
    playing.collect(RandomPolicy(2, 0), 2 * 4)
    describer.gate.set()
    return playing


def test_a_describer_that_fails_at_the_end_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    describer = GatedClockReader(DescriberError("out of order"), shut=True)
    playing = collected_before_the_answer(tmp_path, describer)
    playing.close()
    assert "the labels still to come are lost: out of order" in caplog.text
    assert playing.live_labeler.skipped == 2


def test_an_error_of_the_program_is_raised_at_the_end_too(tmp_path: Path) -> None:
    describer = GatedClockReader(IndexError("a mistake"), shut=True)
    playing = collected_before_the_answer(tmp_path, describer)
    with pytest.raises(IndexError, match="a mistake"):
        playing.close()
    assert playing.envs.closed, "the environments' processes are ended all the same"


def test_the_end_does_not_wait_for_ever(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    describer = GatedClockReader(shut=True)
    playing, replay = collector(tmp_path, describer, drain=0.1)
    playing.collect(RandomPolicy(2, 0), 2 * LENGTH)
    with caplog.at_level(logging.WARNING):
        playing.close()  # returns although the answers never come
    describer.gate.set()
    assert playing.live_labeler.skipped == 2 * (LENGTH // 4)
    assert "14 windows of clock have no label and count as null" in caplog.text
    assert not any(episode["has_semantic"].any() for episode in entries(replay))


def test_answers_for_episodes_that_are_gone_do_no_harm(tmp_path: Path) -> None:
    describer = GatedClockReader(shut=True)
    playing, replay = collector(tmp_path, describer, drain=600.0)
    replay.cfg.capacity = LENGTH  # one episode stays
    playing.collect(RandomPolicy(2, 0), 4 * LENGTH)
    describer.gate.set()
    playing.close()
    (episode,) = entries(replay)
    assert episode["has_semantic"][3:].all()


def test_runs_that_can_repeat_exactly_wait_for_their_labels() -> None:
    exact, slow = TrainerConfig(deterministic=True), VlmConfig(kind="server")  # type: ignore[arg-type]
    assert not answers_late(RunConfig())  # flow
    assert not answers_late(RunConfig(vlm=VlmConfig(kind="templates")))
    assert answers_late(RunConfig(vlm=slow))
    assert not answers_late(RunConfig(vlm=slow, trainer=exact))
    assert answers_late(RunConfig(vlm=VlmConfig(collect=CollectConfig(late=True)), trainer=exact))
    slow.collect.late = False
    assert not answers_late(RunConfig(vlm=slow))


@pytest.mark.parametrize(("field", "value"), [("queue", 0), ("drain", -1.0), ("every", 0)])
def test_config_ranges(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field} must .*got {value}"):
        CollectConfig(**{field: value})  # type: ignore[arg-type]
