"""Replay after an interruption: the same episodes, nothing twice, nothing damaged or malicious."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from replay_entries import entry, make, play

from mapo_lightning.data.replay import Replay, ReplayError, ReplaySpec
from mapo_lightning.data.settings import ReplayConfig


def test_resuming_brings_back_the_same_episodes_and_the_open_one(tmp_path: Path) -> None:
    replay = make(tmp_path)
    play(replay, 0, 6)
    for i in range(4):
        replay.add(1, entry(100 + i, first=i == 0))
    state = json.loads(json.dumps(replay.state()))
    before = replay.sample(np.random.default_rng(5), 1, 7)
    play(replay, 0, 9, start=50)  # after the checkpoint: the resumed run lives it again
    replay.add(1, entry(104))
    replay.add(1, entry(105, last=True))

    resumed = make(tmp_path)
    resumed.restore(state)

    assert (resumed.steps, resumed.episodes) == (6, 1)
    assert resumed.in_progress(1)["reward"].tolist() == [0.0, 101.0, 102.0, 103.0]
    assert not len(resumed.in_progress(0))
    again = resumed.sample(np.random.default_rng(5), 1, 7, joined=False)
    np.testing.assert_equal(again, before)
    resumed.cut_short(1)
    assert (resumed.steps, resumed.episodes) == (6 + 3, 2)
    cut = [resumed.sample(np.random.default_rng(s), 1, 4) for s in range(20)]
    ends = [c["is_last"][0].tolist() for c in cut if c["reward"].max() >= 100]
    assert ends == [[False, False, False, True]] * len(ends)
    assert ends
    assert len(list(tmp_path.glob("*.npy"))) == 2
    play(resumed, 0, 5)
    assert resumed.episodes == 3


def test_an_open_episode_goes_on_after_resuming(tmp_path: Path) -> None:
    replay = make(tmp_path)
    for i in range(70):  # more than one block of memory
        replay.add(3, entry(i, first=i == 0))
    resumed = make(tmp_path)
    resumed.restore(replay.state())
    resumed.add(3, entry(70, last=True))
    assert (resumed.steps, resumed.episodes) == (70, 1)
    chunk = resumed.sample(np.random.default_rng(0), 1, 71)
    assert chunk["reward"][0].tolist() == [float(i) for i in range(71)]
    assert chunk["is_last"][0].tolist() == [False] * 70 + [True]


def test_a_state_that_names_no_environments_ends_its_open_episodes(tmp_path: Path) -> None:
    replay = make(tmp_path)
    for i in range(4):
        replay.add(1, entry(i, first=i == 0))
    state = replay.state()
    old = state | {"version": 1, "open": [row[:2] for row in state["open"]]}
    resumed = make(tmp_path)
    resumed.restore(old)
    assert (resumed.steps, resumed.episodes) == (3, 1)


def test_resuming_without_a_state_takes_the_newest_in_the_folder(tmp_path: Path) -> None:
    replay = make(tmp_path)
    play(replay, 0, 6)
    replay.state()
    resumed = make(tmp_path)
    resumed.restore()
    assert resumed.steps == 6


def test_the_newest_checkpoint_still_finds_what_was_evicted_after_it(tmp_path: Path) -> None:
    replay = make(tmp_path, capacity=20)
    play(replay, 0, 10)
    play(replay, 0, 10, start=50)
    state = replay.state()
    for _ in range(4):
        play(replay, 0, 10, start=100)
    assert replay.steps == 20
    resumed = make(tmp_path, capacity=20)
    resumed.restore(state)
    assert (resumed.steps, resumed.episodes) == (20, 2)
    assert resumed.sample(np.random.default_rng(0), 20, 11)["reward"].max() == 60
    resumed.state()
    assert len(list(tmp_path.glob("*.npy"))) == 2, "what no state names is gone"


def test_a_process_that_dies_while_it_saves_leaves_the_state_before_usable(tmp_path: Path) -> None:
    replay = make(tmp_path, capacity=20)
    play(replay, 0, 10)
    play(replay, 0, 10, start=50)
    first = replay.state()
    for _ in range(4):
        play(replay, 0, 10, start=100)
    second = replay.state()
    assert replay.state() == second  # a checkpoint may be written twice, under two names
    resumed = make(tmp_path, capacity=20)
    assert resumed.restore(first) == 0  # the second checkpoint never reached the disk
    assert resumed.sample(np.random.default_rng(0), 20, 11)["reward"].max() == 60
    play(replay, 0, 10, start=150)
    third = replay.state()
    assert third != second
    files = {int(path.stem.rpartition("-")[2]) for path in tmp_path.glob("*.npy")}
    assert files <= {episode for state in (second, third) for episode, _ in state["episodes"]}


def test_damaged_and_missing_episodes_are_dropped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    replay = make(tmp_path)
    for episode in range(4):
        play(replay, 0, 5, start=10 * episode)
    state = replay.state()
    files = sorted(tmp_path.glob("*.npy"))
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-40])
    files[2].write_bytes(b"")
    resumed = make(tmp_path)
    assert resumed.restore(state) == 15
    assert (resumed.episodes, resumed.steps) == (1, 5)
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 3
    assert all("dropped an episode of 5 steps" in r.message for r in caplog.records)


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.touch, (Path("exploded"),))  # type: ignore[return-value]


def test_a_pickle_in_place_of_an_episode_is_not_run(in_tmp: Path) -> None:
    replay = make(in_tmp / "replay")
    play(replay, 0, 5)
    state = replay.state()
    (file,) = (in_tmp / "replay").glob("*.npy")
    np.save(file, np.array([Bomb()], dtype=object), allow_pickle=True)
    resumed = make(in_tmp / "replay")
    resumed.restore(state)
    file.write_bytes(pickle.dumps(Bomb()))
    resumed.restore(state)
    assert resumed.episodes == 0
    assert not (in_tmp / "exploded").exists()


@pytest.mark.parametrize(
    "state",
    [
        {},
        [],
        {"version": 3, "next_episode": 0, "episodes": [], "open": []},
        {"version": 2, "next_episode": 1, "episodes": [], "open": [[0, 3]]},
        {"version": 1, "next_episode": 1, "episodes": [["../x", 3]], "open": []},
        {"version": 1, "next_episode": 1, "episodes": [[0, -3]], "open": []},
        {"version": 1, "next_episode": 1, "episodes": [[0]], "open": []},
    ],
)
def test_what_is_no_state_is_refused(tmp_path: Path, state: Any) -> None:
    with pytest.raises(ReplayError, match="not the state of a replay"):
        make(tmp_path).restore(state)


def test_a_missing_index_says_what_resuming_needs(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="Resuming needs the folder"):
        make(tmp_path).restore()


def test_entries_of_another_shape_are_not_sampled(tmp_path: Path) -> None:
    replay = make(tmp_path)
    play(replay, 0, 5)
    state = replay.state()
    other = Replay(tmp_path, ReplayConfig(), ReplaySpec((4, 4, 3), action_dim=3, semantic_dim=5))
    other.restore(state)
    assert other.episodes == 0
