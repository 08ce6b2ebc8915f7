"""Collection and evaluation, on an environment that shows its own clock."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from numpy.typing import NDArray

from mapo_lightning.data.replay import Replay, ReplayError, ReplaySpec
from mapo_lightning.data.settings import ReplayConfig
from mapo_lightning.envs.collector import Collector
from mapo_lightning.envs.episodes import Policy, RandomPolicy, StillPolicy, run_episodes
from mapo_lightning.envs.factory import make_vector_env
from mapo_lightning.envs.live_labels import LiveLabeler, Step
from mapo_lightning.envs.replacement import Deaths, close_vector_env
from mapo_lightning.envs.seeded_episodes import SeededEpisodes
from mapo_lightning.envs.settings import EnvConfig
from mapo_lightning.semantics.describer import Reply
from mapo_lightning.semantics.embed import HashedSlots
from mapo_lightning.semantics.labeler import Labeler
from mapo_lightning.semantics.settings import CollectConfig, WindowConfig
from mapo_lightning.semantics.store import LabelStore
from mapo_lightning.training.datamodule import chunk_batch
from mapo_lightning.types import POSITIONS, EnvironmentSetupError

LENGTH = 30


class Clock(gym.Env[Any, Any]):
    """Its picture is the number of actions taken; its reward the same; it lasts LENGTH of them."""

    observation_space = spaces.Dict({"image": spaces.Box(0, 255, (8, 8, 3), np.uint8)})
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self) -> None:
        self.time = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.time = 0
        return self._obs(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.time += 1
        done = self.time == LENGTH
        return self._obs(), float(self.time), False, done, {"success": float(self.time == 7)}

    def _obs(self) -> dict[str, NDArray[np.uint8]]:
        return {"image": np.full((8, 8, 3), self.time, np.uint8)}


class ReadsClocks:
    """A describer of such pictures: says when the window began and ended."""

    name, in_worker = "clocks", True

    def __init__(self) -> None:
        self.windows: list[list[int]] = []

    def describe(self, clips: Any) -> list[Reply]:
        times = [[int(frame[0, 0, 0]) for frame in clip] for clip in clips]
        self.windows += times
        return [Reply(f"[clock][ticks][time][up][{t[-1]} ticks]") for t in times]


def tracker(folder: Path, envs: int, offset: int = 0) -> tuple[LiveLabeler, ReadsClocks]:
    describer = ReadsClocks()
    labeler = Labeler(describer, LabelStore(folder / "labels", "test"), HashedSlots())
    window = WindowConfig(offset=offset)
    return LiveLabeler(labeler, window, CollectConfig(), envs, "clock"), describer


def seeded_clock() -> SeededEpisodes:
    return SeededEpisodes(Clock())


def clocks(count: int) -> SyncVectorEnv:
    return SyncVectorEnv([seeded_clock] * count, autoreset_mode=AutoresetMode.NEXT_STEP)


@pytest.fixture
def collected(tmp_path: Path) -> tuple[Collector, Replay]:
    watch, _ = tracker(tmp_path, 2)
    replay = Replay(tmp_path / "replay", ReplayConfig(), ReplaySpec((8, 8, 3), 2, 320))
    collector = Collector(clocks(2), watch, replay, seed=0)
    assert collector.collect(RandomPolicy(2, 0), 4 * LENGTH) == 4 * LENGTH
    return collector, replay


def test_replay_holds_consecutive_clocks_aligned_with_their_rewards(
    collected: tuple[Collector, Replay],
) -> None:
    _, replay = collected
    batch = chunk_batch(replay, np.random.default_rng(0), 40, 10)
    time = batch["obs"][:, :, 0, 0, 0].long()
    assert bool((time.diff(dim=1) == 1).all())  # never across an episode's end
    assert bool((batch["reward"] == time.float()).all())  # received on reaching the frame
    begins = time == 0
    assert bool((batch["action"][begins] == 0).all())
    assert bool((batch["action"][~begins].abs().sum(-1) > 0).all())
    assert bool((batch["position"] == time % POSITIONS).all())
    assert bool(batch["is_first"][:, 0].all())
    assert not bool(batch["is_terminal"].any())  # the clock ran out, the task did not end


def test_finished_episodes_are_counted_once(collected: tuple[Collector, Replay]) -> None:
    collector, replay = collected
    total = LENGTH * (LENGTH + 1) / 2
    assert [tuple(e) for e in collector.finished] == [(total, LENGTH, 1.0)] * 4
    assert replay.episodes == 4
    assert replay.steps == 4 * LENGTH


def test_a_collector_goes_on_with_the_experience_of_another(
    collected: tuple[Collector, Replay], tmp_path: Path
) -> None:
    collector, replay = collected
    policy = RandomPolicy(2, 0)
    collector.collect(policy, 10)  # five steps into the third episodes
    state = collector.state()
    watch, _ = tracker(tmp_path / "later", 2)
    again = Replay(replay.root, ReplayConfig(), replay.spec)
    later = Collector(clocks(2), watch, again, seed=0)
    later.restore(state)
    assert again.steps == 4 * LENGTH
    assert [len(again.in_progress(n)) for n in (0, 1)] == [6, 6]
    assert later.collect(policy, 2 * LENGTH) == 2 * LENGTH
    assert again.steps == 6 * LENGTH
    assert [len(again.in_progress(n)) for n in (0, 1)] == [6, 6]
    assert later.finished[-2:] == collector.finished[-2:]
    for path in sorted(replay.root.glob("*.npy"))[:2]:
        path.unlink()
    with pytest.raises(ReplayError, match="60 agent steps of the checkpoint's replay are missing"):
        Collector(clocks(2), watch, Replay(replay.root, ReplayConfig(), replay.spec), 0).restore(
            state
        )


class LooseClock(Clock):
    """Runs at a speed of its own, whatever its seed is."""

    speeds = iter((1, 1, 2, 2, 2, 2))

    def __init__(self) -> None:
        super().__init__()
        self.speed = next(self.speeds)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.time += self.speed - 1
        return super().step(action)


def test_an_episode_that_cannot_be_repeated_ends_where_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def make() -> SyncVectorEnv:
        first: Any = lambda: SeededEpisodes(Clock())  # noqa: E731
        second: Any = lambda: SeededEpisodes(LooseClock())  # noqa: E731
        return SyncVectorEnv([first, second], autoreset_mode=AutoresetMode.NEXT_STEP)

    LooseClock.speeds = iter((1, 2))
    replay = Replay(tmp_path / "replay", ReplayConfig(), ReplaySpec((8, 8, 3), 2, 320))
    collector = Collector(make(), tracker(tmp_path, 2)[0], replay, seed=0)
    policy = RandomPolicy(2, 0)
    collector.collect(policy, 10)
    state = collector.state()
    again = Replay(replay.root, ReplayConfig(), replay.spec)
    later = Collector(make(), tracker(tmp_path / "later", 2)[0], again, seed=0)
    later.restore(state)
    assert "1 of 2 episodes in progress cannot be repeated" in caplog.text
    assert (again.episodes, again.steps) == (1, 5)
    assert later.collect(policy, 3) == 3  # the first of three steps only begins the new episode
    assert again.in_progress(0)["obs"][:, 0, 0, 0].tolist() == list(range(8))
    assert again.in_progress(1)["obs"][:, 0, 0, 0].tolist() == [0, 2]
    assert again.in_progress(1)["is_first"].tolist() == [True, False]


def test_labels_lie_on_the_grid_and_are_held(tmp_path: Path) -> None:
    watch, describer = tracker(tmp_path, 1)
    known, changes, last = [], [], None
    for time in range(12):
        frame = {"image": np.full((1, 8, 8, 3), time, np.uint8)}
        step = watch.update(frame, np.array([time == 0]))
        known.append(bool(step["has_semantic"][0]))
        if last is not None and not np.array_equal(step["semantic"], last):
            changes.append(time)
        last = step["semantic"]
    assert describer.windows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert known == [False] * 3 + [True] * 9
    assert changes == [3, 7, 11]


def test_an_offset_keeps_a_label_from_the_frame_it_has_seen(tmp_path: Path) -> None:
    watch, _ = tracker(tmp_path, 1, offset=1)
    known = []
    for time in range(5):
        frame = {"image": np.full((1, 8, 8, 3), time, np.uint8)}
        known.append(bool(watch.update(frame, np.array([time == 0]))["has_semantic"][0]))
    assert known == [False, False, False, False, True]


def test_nothing_is_asked_about_an_environment_that_no_longer_counts(tmp_path: Path) -> None:
    watch, describer = tracker(tmp_path, 2)
    for time in range(12):
        frame = np.stack([np.full((8, 8, 3), time + 100 * n, np.uint8) for n in range(2)])
        step = watch.update({"image": frame}, np.full(2, time == 0), np.array([True, time < 6]))
    assert [w[0] for w in describer.windows] == [0, 100, 4, 8]
    assert step["has_semantic"].all()  # it keeps the label that it had
    np.testing.assert_array_equal(step["position"], [11, 5])


def test_evaluation_asks_nothing_for_what_fills_its_last_batch(tmp_path: Path) -> None:
    watch, describer = tracker(tmp_path, 3)
    asked: list[int] = []
    query = watch._query

    def counting(ended: list[Any]) -> None:
        asked.append(len(ended))
        query(ended)

    watch._query = counting  # type: ignore[method-assign]
    run_episodes(clocks(3), watch, lambda seed: lambda step: np.zeros((3, 2)), [5, 6, 7, 8])
    windows = LENGTH // 4
    assert sum(asked) == 4 * windows
    assert len(describer.windows) == windows  # the others are known


def test_a_new_episode_forgets_the_label(tmp_path: Path) -> None:
    watch, describer = tracker(tmp_path, 1)
    for time in (0, 1, 2, 3, 0, 1):
        frame = {"image": np.full((1, 8, 8, 3), time, np.uint8)}
        step = watch.update(frame, np.array([time == 0]))
    assert not step["has_semantic"][0]
    assert not step["semantic"].any()
    assert describer.windows == [[0, 1, 2, 3]]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_evaluation_plays_every_seed_once(count: int, tmp_path: Path) -> None:
    watch, _ = tracker(tmp_path, count)
    seen: list[NDArray[np.bool_]] = []

    def policy(step: Step) -> NDArray[np.float32]:
        seen.append(step["is_first"])
        return np.zeros((count, 2), np.float32)

    episodes, films = run_episodes(clocks(count), watch, lambda seed: policy, [5, 6, 7], record=2)
    total = LENGTH * (LENGTH + 1) / 2
    assert [tuple(e) for e in episodes] == [(total, LENGTH, 1.0)] * 3
    assert [film[:, 0, 0, 0].tolist() for film in films] == [list(range(LENGTH + 1))] * 2
    assert sum(bool(first.any()) for first in seen) == -(-3 // count)


def test_policies_that_never_look_cost_no_pictures_and_no_labels(tmp_path: Path) -> None:
    watch, describer = tracker(tmp_path, 2)
    envs = make_vector_env(EnvConfig(size=32, time_limit=8), 0, 2)
    shown: list[Step] = []

    def looking(seed: int) -> Policy:
        random = RandomPolicy(2, seed)

        def policy(step: Step) -> NDArray[np.float32]:
            shown.append(step)
            return random(step)

        return policy

    def blind(seed: int) -> Policy:
        return RandomPolicy(2, seed)

    try:
        unseen, _ = run_episodes(envs, watch, blind, [5, 6, 7])
        assert not describer.windows
        seen, _ = run_episodes(envs, watch, looking, [5, 6, 7])
        assert describer.windows
        filmed, (film,) = run_episodes(envs, watch, blind, [5, 6, 7], record=1)
    finally:
        close_vector_env(envs)
    assert seen == unseen == filmed
    assert film.any()
    assert all(step["obs"].any() for step in shown)


@pytest.mark.parametrize("label_size", [None, 48])
def test_a_film_shows_the_larger_picture_where_there_is_one(
    label_size: int | None, tmp_path: Path
) -> None:
    cfg = EnvConfig(size=32, label_size=label_size, time_limit=3)
    envs = make_vector_env(cfg, 0, 1)
    watch, _ = tracker(tmp_path, 1)
    try:
        _, (film,) = run_episodes(envs, watch, lambda seed: StillPolicy(2), [7], record=1)
    finally:
        close_vector_env(envs)
    side = label_size or 32
    assert film.shape == (4, side, side, 3)


def test_random_actions_are_held_as_long_as_asked() -> None:
    policy, step = RandomPolicy(2, seed=0, hold=3), {"is_first": np.zeros(4, bool)}
    drawn = np.stack([policy(step) for _ in range(6)])
    assert np.array_equal(drawn[0], drawn[2])
    assert np.array_equal(drawn[3], drawn[5])
    assert not np.array_equal(drawn[2], drawn[3])


def test_a_process_that_died_is_said_in_one_sentence(tmp_path: Path) -> None:
    envs = AsyncVectorEnv([Clock], context="fork", autoreset_mode=AutoresetMode.NEXT_STEP)
    replay = Replay(tmp_path / "replay", ReplayConfig(), ReplaySpec((8, 8, 3), 2, 320))
    collector = Collector(envs, tracker(tmp_path, 1)[0], replay, seed=0)
    policy = RandomPolicy(2, seed=0)
    collector.collect(policy, 3)
    envs.processes[0].kill()
    with pytest.raises(
        EnvironmentSetupError, match=r"process of an environment has died.*num_envs"
    ):
        collector.collect(policy, 3)
    collector.close()
    assert replay.state()["open"] == [[0, 4, 0]]


@pytest.mark.slow
def test_a_process_that_died_is_replaced_and_its_episode_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def make() -> AsyncVectorEnv:
        return AsyncVectorEnv(
            [seeded_clock] * 3, context="fork", autoreset_mode=AutoresetMode.NEXT_STEP
        )

    now = [0.0]
    deaths = Deaths(2, lambda: now[0])
    replay = Replay(tmp_path / "replay", ReplayConfig(), ReplaySpec((8, 8, 3), 2, 320))
    collector = Collector(make(), tracker(tmp_path, 3)[0], replay, 0, (make, deaths))
    policy, taken = RandomPolicy(2, seed=0), 0
    taken += collector.collect(policy, 9)
    assert isinstance(collector.envs, AsyncVectorEnv)
    collector.envs.processes[1].kill()
    collector.envs.processes[1].join()
    taken += collector.collect(policy, 6)
    assert deaths.count == 1
    assert "whose process has died and is replaced: 1" in caplog.text

    def times(env: int) -> list[int]:
        return [int(t) for t in replay.in_progress(env)["obs"][:, 0, 0, 0]]

    def held() -> int:
        return replay.steps + sum(len(replay.in_progress(n)) - 1 for n in range(3))

    assert replay.steps == 3
    assert times(0) == times(2) == list(range(len(times(0))))  # they went on
    assert times(1) == list(range(len(times(0)) - 4))  # this one began anew
    assert held() == taken
    # Killed while a step is under way: the action that it never took is not counted.
    taken += collector.collect(policy, 3, ahead=True)
    collector.envs.processes[0].kill()
    collector.envs.processes[0].join()
    taken += collector.collect(policy, 3)
    assert deaths.count == 2
    assert held() == taken
    now[0] = 3600.0  # an hour later they are forgotten
    collector.envs.processes[0].kill()
    collector.envs.processes[0].join()
    collector.collect(policy, 3)
    for process in collector.envs.processes:
        process.kill()
        process.join()
    with pytest.raises(EnvironmentSetupError, match=r"4 processes .*deaths_per_hour allows 2"):
        collector.collect(policy, 3)
    collector.close()


class BrokenClock(Clock):
    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.time == 2:
            raise EnvironmentSetupError("gym/Clock at step 3 of an episode: it stopped")
        return super().step(action)


def test_what_fails_in_a_process_is_said_once(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    envs = AsyncVectorEnv([BrokenClock], context="fork", autoreset_mode=AutoresetMode.NEXT_STEP)
    replay = Replay(tmp_path / "replay", ReplayConfig(), ReplaySpec((8, 8, 3), 2, 320))
    collector = Collector(envs, tracker(tmp_path, 1)[0], replay, seed=0)
    level = gym.logger.min_level
    with pytest.raises(
        EnvironmentSetupError, match="gym/Clock at step 3 of an episode: it stopped"
    ):
        collector.collect(RandomPolicy(2, seed=0), 5)
    collector.close()
    assert not [str(w.message) for w in recwarn if "Worker" in str(w.message)]
    assert gym.logger.min_level == level
    assert replay.state()["open"] == [[0, 3, 0]]


def test_a_step_under_way_does_not_hold_up_the_learner(tmp_path: Path) -> None:
    gate = multiprocessing.get_context("fork").Event()

    class GatedClock(Clock):
        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            assert gate.wait(120), "somebody waits for a step that has not been let through"
            return super().step(action)

    envs = AsyncVectorEnv([GatedClock], context="fork", autoreset_mode=AutoresetMode.NEXT_STEP)
    replay = Replay(tmp_path / "replay", ReplayConfig(), ReplaySpec((8, 8, 3), 2, 320))
    collector = Collector(envs, tracker(tmp_path, 1)[0], replay, seed=0)
    policy = RandomPolicy(2, seed=0)
    gate.set()
    collector.collect(policy, 1)
    gate.clear()
    assert collector.collect(policy, 1, ahead=True) == 1
    assert collector.live_labeler.age.tolist() == [1]
    gate.set()
    collector.settle()
    assert collector.live_labeler.age.tolist() == [2]
    collector.close()


@pytest.mark.parametrize("parallel", [True, False])
def test_collecting_ahead_writes_the_same_experience(parallel: bool, tmp_path: Path) -> None:
    found = []
    for ahead in (True, False):
        envs: VectorEnv = clocks(2)
        if parallel:
            envs = AsyncVectorEnv(
                [Clock, Clock], context="fork", autoreset_mode=AutoresetMode.NEXT_STEP
            )
        folder = tmp_path / f"{ahead}"
        replay = Replay(folder, ReplayConfig(), ReplaySpec((8, 8, 3), 2, 320))
        collector = Collector(envs, tracker(folder, 2)[0], replay, seed=0)
        policy, taken = RandomPolicy(2, seed=0), 0
        for count in (1, 2, 5, 60, 3, 40):
            taken += collector.collect(policy, count, ahead)
        collector.settle()
        found.append((taken, replay.sample(np.random.default_rng(0), 20, 9), collector.finished))
        collector.close()
    assert found[0][0] == found[1][0]
    assert found[0][2] == found[1][2]
    for key, value in found[0][1].items():
        np.testing.assert_array_equal(value, found[1][1][key])
