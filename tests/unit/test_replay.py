"""Replay: what is stored comes back, what is old leaves, what is wrong is refused."""

from __future__ import annotations

import hashlib
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from replay_entries import SPEC, entry, make, play

from mapo_lightning.data.episodes import EpisodeFolder
from mapo_lightning.data.replay import ReplayError
from mapo_lightning.data.settings import ReplayConfig
from mapo_lightning.training.datamodule import chunk_batch
from mapo_lightning.types import ConfigError


def test_a_sample_has_the_keys_types_and_shapes_of_a_batch(tmp_path: Path) -> None:
    replay = make(tmp_path)
    play(replay, 0, 9)
    sample = replay.sample(np.random.default_rng(0), 3, 4)
    assert {k: (v.shape, v.dtype.name) for k, v in sample.items()} == {
        "obs": ((3, 4, 4, 4, 3), "uint8"),
        "action": ((3, 4, 2), "float32"),
        "reward": ((3, 4), "float32"),
        "is_first": ((3, 4), "bool"),
        "is_last": ((3, 4), "bool"),
        "is_terminal": ((3, 4), "bool"),
        "semantic": ((3, 4, 5), "float32"),
        "has_semantic": ((3, 4), "bool"),
        "position": ((3, 4), "int64"),
    }
    assert all(v.flags.writeable and v.flags.c_contiguous for v in sample.values())


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    replay = make(tmp_path)
    play(replay, 0, 5)
    sample = replay.sample(np.random.default_rng(0), 1, 6)
    assert sample["reward"][0].tolist() == [0, 1, 2, 3, 4, 5]
    assert sample["obs"][0, :, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert sample["is_first"][0].tolist() == [True] + [False] * 5
    assert sample["is_last"][0].tolist() == [False] * 5 + [True]
    assert sample["semantic"][0, :, 2].tolist() == [0, 0.125, 0.25, 0.375, 0.5, 0.625]


def test_only_whole_episodes_are_drawn_from(tmp_path: Path) -> None:
    replay = make(tmp_path)
    for i in range(8):
        replay.add(0, entry(i, first=i == 0))
    assert (replay.steps, replay.episodes, replay.longest) == (0, 0, 0)
    with pytest.raises(ReplayError, match="longest of 0 whole episodes has 0: collect more"):
        replay.sample(np.random.default_rng(0), 1, 2)
    replay.add(0, entry(8, last=True))
    assert (replay.steps, replay.episodes, replay.longest) == (8, 1, 9)


@pytest.mark.parametrize(
    ("prioritized", "drawn", "digest"),
    [
        (
            False,
            "3046 2001 3042 3061 26 1129 3066 226 3010 3009 1370 1155 1326 1448 1217 2001",
            "0d408038a847902bbdb090e2963f274466a803c5ad766bae222d6f9428121377",
        ),
        (
            True,
            "3072 2001 2001 3028 151 1439 3001 1413 401 235 3037 1140 2001 3055 1254 2001",
            "a856fcf29c3a09a0ba2ff16072bad41879bdd1ab0b6f98ca57e38b4f3c760479",
        ),
    ],
)
def test_chunks_that_episodes_fill_are_drawn_as_published(
    tmp_path: Path, prioritized: bool, drawn: str, digest: str
) -> None:
    """Pinned before short episodes were joined to chunks: same draws, same bytes."""
    replay = make(tmp_path, capacity=5000, prioritize_ends=prioritized)
    for start, agent_steps in ((0, 500), (1000, 500), (2000, 49), (3000, 120)):
        play(replay, 0, agent_steps, start)
    batch = chunk_batch(replay, np.random.default_rng(7), 16, 50)
    assert batch["reward"][:, 1].int().tolist() == list(map(int, drawn.split()))
    content = hashlib.sha256()
    for key in sorted(batch):
        content.update(key.encode() + batch[key].numpy().tobytes())
    assert content.hexdigest() == digest


def test_a_chunk_goes_on_in_another_episode_where_one_is_too_short(tmp_path: Path) -> None:
    replay = make(tmp_path)
    play(replay, 0, 3, start=20)
    play(replay, 0, 30, start=50)
    play(replay, 0, 1, start=100)
    sample = replay.sample(np.random.default_rng(0), 300, 9)
    number, first = sample["obs"][..., 0, 0, 0].astype(int), sample["is_first"]
    starts = np.flatnonzero((number == 20).any(axis=1))
    assert len(starts) > 50, "short episodes are drawn from"
    jumps = np.diff(number, axis=1) != 1
    np.testing.assert_array_equal(first[:, 1:], jumps)
    left = number[:, :-1][jumps]
    assert set(left.tolist()) == {23, 101}, "what is too short is taken whole"
    long = (number[:, 1:][jumps] > 50) & (number[:, 1:][jumps] < 100)
    assert long.any(), "the last part may begin in the middle of an episode"
    alone = replay.sample(np.random.default_rng(0), 64, 9, joined=False)
    assert alone["reward"].min() == 0
    assert set(range(51, 80)) >= set(alone["reward"][:, 1:].astype(int).ravel()) - {80}
    with pytest.raises(ReplayError, match="the longest of 3 whole episodes has 31: collect more"):
        replay.sample(np.random.default_rng(0), 1, 32, joined=False)


def test_one_short_episode_fills_a_chunk_again_and_again(tmp_path: Path) -> None:
    replay = make(tmp_path)
    play(replay, 0, 1)
    sample = replay.sample(np.random.default_rng(0), 1, 8)
    assert sample["obs"][0, :, 0, 0, 0].tolist() == [0, 1] * 4
    assert sample["is_first"][0].tolist() == [True, False] * 4


def test_environments_side_by_side_do_not_mix(tmp_path: Path) -> None:
    replay = make(tmp_path)
    for i in range(6):
        for env_id in range(3):
            number = 20 * env_id + i
            replay.add(env_id, entry(number, first=i == 0, last=i == 5))
    obs = replay.sample(np.random.default_rng(0), 50, 4)["obs"][..., 0, 0, 0].astype(int)
    assert (np.diff(obs, axis=1) == 1).all()
    assert set(obs[:, 0] // 20) == {0, 1, 2}


def test_the_oldest_episodes_leave_whole_and_their_files_with_them(tmp_path: Path) -> None:
    replay = make(tmp_path, capacity=25)
    for episode in range(6):
        play(replay, 0, 10, start=20 * episode)
    assert (replay.steps, replay.episodes) == (20, 2)
    assert len(list(tmp_path.glob("*.npy"))) == 2
    obs = replay.sample(np.random.default_rng(0), 50, 11)["obs"][:, 0, 0, 0, 0]
    assert set(obs.tolist()) == {80, 100}


def test_an_episode_is_drawn_as_often_as_another_whatever_its_length(tmp_path: Path) -> None:
    replay = make(tmp_path, capacity=200)
    play(replay, 0, 90)
    play(replay, 0, 10, start=200)
    first = replay.sample(np.random.default_rng(0), 2000, 5)["obs"][:, 0, 0, 0, 0]
    assert np.mean(first >= 200) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize(("prioritized", "share"), [(True, 51 / 502), (False, 1 / 452)])
def test_ends_are_drawn_as_often_as_published(
    tmp_path: Path, prioritized: bool, share: float
) -> None:
    replay = make(tmp_path, capacity=1000, prioritize_ends=prioritized)
    play(replay, 0, 500)
    rng = np.random.default_rng(0)
    ends = [replay.sample(rng, 500, 50)["is_last"][:, -1].mean() for _ in range(20)]
    assert np.mean(ends) == pytest.approx(share, abs=0.01)


def test_equal_seeds_draw_equal_chunks(tmp_path: Path) -> None:
    replay = make(tmp_path)
    play(replay, 0, 40)
    one, two, other = (
        replay.sample(np.random.default_rng(seed), 8, 5)["reward"] for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()


@pytest.mark.parametrize("whole", [True, False])
def test_a_late_label_is_filled_in(tmp_path: Path, whole: bool) -> None:
    replay = make(tmp_path)
    places = play(replay, 0, 5) if whole else [replay.add(0, entry(i, i == 0)) for i in range(6)]
    assert replay.set_semantic(places[3], np.full(5, 9.0), False)
    if not whole:
        replay.add(0, entry(6, last=True))
    sample = replay.sample(np.random.default_rng(0), 1, 5 if whole else 7)
    row = int(np.flatnonzero(sample["reward"][0] == 3)[0])
    assert (sample["semantic"][0, row] == 9.0).all()
    assert not sample["has_semantic"][0, row]
    assert (sample["semantic"][0, row + 1] == 0.5).all()


def test_a_label_for_an_evicted_episode_is_dropped(tmp_path: Path) -> None:
    replay = make(tmp_path, capacity=10)
    places = play(replay, 0, 8)
    play(replay, 0, 8)
    assert not replay.set_semantic(places[2], np.zeros(5))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (entry(0), "environment 0 has no episode in progress"),
        (entry(0, first=True, action=np.zeros(3)), r"'action' must have the shape \(2,\), got"),
        ({k: v for k, v in entry(0, first=True).items() if k != "reward"}, "unknown: reward"),
        (entry(0, first=True, extra=1), "missing or unknown: extra"),
    ],
)
def test_wrong_steps_are_refused(tmp_path: Path, step: dict[str, Any], message: str) -> None:
    with pytest.raises(ReplayError, match=message):
        make(tmp_path).add(0, step)


def test_an_endless_episode_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    replay = make(tmp_path, capacity=10)
    for i in range(11):
        replay.add(0, entry(i, first=i == 0))
    with pytest.raises(ReplayError, match="outgrown the whole replay, 10 agent steps"):
        replay.add(0, entry(11))


def test_an_unfinished_episode_is_closed_when_the_next_begins(tmp_path: Path) -> None:
    replay = make(tmp_path)
    for i in range(4):
        replay.add(0, entry(i, first=i == 0))
    replay.add(0, entry(0, first=True))
    assert replay.sample(np.random.default_rng(0), 1, 4)["is_last"][0].tolist() == [False] * 3 + [
        True
    ]


def test_a_full_disk_is_reported_with_its_path_and_nothing_is_half_written(tmp_path: Path) -> None:
    replay = make(tmp_path)
    play(replay, 0, 5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))  # bytes; also stops root
    try:
        with pytest.raises(ReplayError, match=r"episode-000000001.npy.*Free some disk space"):
            play(replay, 0, 5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["episode-000000000.npy"]
    assert replay.sample(np.random.default_rng(0), 1, 6)["reward"].max() == 5


def test_capacity_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="capacity must be at least 1 agent step, got 0"):
        ReplayConfig(capacity=0)


def test_few_files_are_kept_open_and_those_that_were_drawn_last(tmp_path: Path) -> None:
    folder = EpisodeFolder(tmp_path / "deep" / "replay", SPEC.dtype)
    for episode in range(300):
        folder.write(episode, np.zeros(2, SPEC.dtype))
        first = folder.open(episode)
        assert folder.open(episode) is first
    assert list(folder._maps) == list(range(44, 300))  # 256 of them
    folder.open(44)
    folder.open(0)
    assert 44 in folder._maps
    assert 45 not in folder._maps  # the one that was not asked for the longest makes room
