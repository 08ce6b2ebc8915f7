"""A counter that restarts with every episode, seen through vectors, replay, chunks and resume."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mapo_lightning.data.replay import Replay, ReplaySpec
from mapo_lightning.data.settings import ReplayConfig

SPEC = ReplaySpec((2, 2, 3), action_dim=1, semantic_dim=1)


class Counter:
    """An environment that shows how often it has been stepped; episodes have given lengths."""

    def __init__(self, env_id: int, lengths: list[int]) -> None:
        self.env_id, self.lengths, self.episode, self.number = env_id, lengths, -1, 0
        self.over = True

    def entry(self) -> dict[str, Any]:
        """The next entry of the endless stream of episodes."""
        first = self.over
        if first:
            self.episode, self.number = self.episode + 1, 0
        else:
            self.number += 1
        self.over = self.number == self.lengths[self.episode % len(self.lengths)]
        return {
            "obs": np.full((2, 2, 3), self.number, np.uint8),
            # The action that led here; who and which episode ride along as reward.
            "action": np.full(1, 0.0 if first else (self.number - 1) / 256, np.float32),
            "reward": np.float32(1000 * self.env_id + self.episode),
            "is_first": first,
            "is_last": self.over,
            "is_terminal": False,
            "semantic": np.full(1, self.number, np.float16),
            "has_semantic": True,
            "position": self.number % 25,
        }


def check_chunks(sample: dict[str, np.ndarray], length: int) -> None:
    number = sample["obs"][..., 0, 0, 0].astype(int)
    assert number.shape[1] == length
    inside = ~sample["is_first"][:, 1:]
    assert (np.diff(number, axis=1)[inside] == 1).all(), "numbers are consecutive"
    assert sample["is_first"][number == 0].all()
    assert (np.diff(sample["reward"], axis=1)[inside] == 0).all(), "one episode, one environment"
    # Where a chunk goes on in another episode, this one has come to its end.
    np.testing.assert_array_equal(sample["is_last"][:, :-1], ~inside)
    np.testing.assert_array_equal(sample["position"], number % 25)
    np.testing.assert_array_equal(sample["semantic"][..., 0], number)
    expected = np.where(number == 0, 0.0, (number - 1) / 256)
    np.testing.assert_allclose(sample["action"][..., 0], expected)


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=6)


@settings(max_examples=40)
@given(
    lengths=st.lists(lengths, min_size=1, max_size=3),
    entries=st.integers(1, 200),
    capacity=st.integers(31, 120),
    length=st.integers(1, 12),
    prioritize=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_chunks_leave_an_episode_at_its_end_only(
    lengths: list[list[int]],
    entries: int,
    capacity: int,
    length: int,
    prioritize: bool,
    seed: int,
) -> None:
    counters = [Counter(i, each) for i, each in enumerate(lengths)]
    with tempfile.TemporaryDirectory() as root:
        cfg = ReplayConfig(capacity=capacity, prioritize_ends=prioritize)
        replay = Replay(Path(root), cfg, SPEC)
        rng = np.random.default_rng(seed)
        for _ in range(entries):
            counter = counters[int(rng.integers(len(counters)))]
            replay.add(counter.env_id, counter.entry())
            assert replay.steps <= capacity or replay.episodes == 1
        assert len(list(Path(root).glob("*.npy"))) == replay.episodes
        if replay.episodes:
            check_chunks(replay.sample(rng, 16, length), length)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    lengths=lengths,
    before=st.integers(1, 80),
    after=st.integers(0, 80),
    later=st.integers(0, 60),
    capacity=st.integers(31, 90),
    seed=st.integers(0, 1000),
)
def test_a_killed_run_resumes_with_every_step_of_its_checkpoint_once(
    lengths: list[int], before: int, after: int, later: int, capacity: int, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as root:
        cfg = ReplayConfig(capacity=capacity)
        replay, counter = Replay(Path(root), cfg, SPEC), Counter(0, lengths)
        for _ in range(before):
            replay.add(0, counter.entry())
        state, whole = replay.state(), replay.steps
        under_way = 0 if counter.over else counter.number
        for _ in range(after):  # lost with the process
            replay.add(0, counter.entry())

        resumed = Replay(Path(root), cfg, SPEC)
        resumed.restore(state)
        resumed.cut_short(0)  # the episode in progress: then all steps are in whole ones

        if whole + under_way <= capacity:
            assert resumed.steps == whole + under_way, "none lost, none twice"
        fresh = Counter(0, lengths)
        for _ in range(later):
            resumed.add(0, fresh.entry())
        if resumed.episodes:
            check_chunks(resumed.sample(np.random.default_rng(seed), 16, 2), 2)
