from __future__ import annotations

import logging
import multiprocessing
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scenes import cases, moving_square

from mapo_lightning.data.video import VideoFileError
from mapo_lightning.semantics.describer import NullDescriber, Reply
from mapo_lightning.semantics.embed import HashedSlots
from mapo_lightning.semantics.factory import build_describer, build_labeler, semantic_dim
from mapo_lightning.semantics.labeler import (
    Labeler,
    LabelStats,
    WindowRequest,
    frames_identity,
    label_key,
)
from mapo_lightning.semantics.settings import (
    CollectConfig,
    ServerConfig,
    VlmConfig,
    WindowConfig,
)
from mapo_lightning.semantics.store import LabelStore
from mapo_lightning.types import ConfigError, DescriberError, Frames


class Scripted:
    """Says what it was told to, by the brightness of the first pixel; writes down each call."""

    in_worker = True

    def __init__(self, script: dict[int, str], log: Path, name: str = "scripted") -> None:
        self.script, self.log, self.name = script, log, name

    def describe(self, clips: Sequence[Frames]) -> list[Reply]:
        with self.log.open("a") as file:
            file.writelines(f"{clip.flat[0]}\n" for clip in clips)
        return [Reply(self.script[int(clip.flat[0])]) for clip in clips]


SCRIPT = {1: "[hand][opens][door][left][1 cm]", 2: "null", 3: "?!", 4: "A dog jumps."}


def request(number: int) -> WindowRequest:
    frames = np.full((4, 2, 2, 3), number, np.uint8)
    return WindowRequest(f"window {number}", f"v.mp4 {number}", lambda: frames)


def labeler(tmp_path: Path, writer: str = "w", name: str = "scripted") -> Labeler:
    describer = Scripted(SCRIPT, tmp_path / "calls", name)
    return Labeler(describer, LabelStore(tmp_path / "store", writer), HashedSlots())


def calls(tmp_path: Path) -> list[str]:
    path = tmp_path / "calls"
    return sorted(path.read_text().split()) if path.exists() else []


def test_each_kind_of_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asking = labeler(tmp_path)
    with caplog.at_level(logging.WARNING):
        labels = asking.label([request(n) for n in (1, 2, 3, 4)])
    assert [label.status for label in labels] == ["slots", "null", "unreadable", "prose"]
    assert [label.known for label in labels] == [True, False, False, True]
    assert [bool(label.vector.any()) for label in labels] == [True, False, False, True]
    assert labels[0].vector.shape == (asking.semantic_dim,)
    assert asking.stats == LabelStats(asked=4, hits=0, null=1, unreadable=1)
    assert "unreadable reply about v.mp4 3" in caplog.text


def test_asked_once_ever(tmp_path: Path) -> None:
    first = labeler(tmp_path, "one").label([request(1), request(2), request(1)])
    again = labeler(tmp_path, "two")
    second = again.label([request(2), request(1)])
    assert calls(tmp_path) == ["1", "2"]
    assert again.stats == LabelStats(asked=0, hits=2, null=1, unreadable=0)
    np.testing.assert_array_equal(first[0].vector, second[1].vector)


def test_frames_are_fetched_only_for_misses(tmp_path: Path) -> None:
    labeler(tmp_path).label([request(1)])

    def gone() -> Frames:
        raise AssertionError("a known window must not be decoded")

    assert labeler(tmp_path).label([request(1)._replace(frames=gone)])[0].known


def test_another_describer_is_asked_anew(tmp_path: Path) -> None:
    labeler(tmp_path).label([request(1)])
    labeler(tmp_path, name="scripted-v2").label([request(1)])
    assert calls(tmp_path) == ["1", "1"]


def test_failed_frames_store_nothing_and_release_the_claim(tmp_path: Path) -> None:
    def broken() -> Frames:
        raise VideoFileError(Path("v.mp4"), "damaged", "frame 3")

    asking = labeler(tmp_path)
    with pytest.raises(VideoFileError, match=r"v\.mp4.*frame 3"):
        asking.label([request(1), request(2)._replace(frames=broken)])
    assert asking.store.items() == {}
    assert asking.label([request(1), request(2)])[0].known


def test_wrong_number_of_replies_is_refused(tmp_path: Path) -> None:
    class Mute(Scripted):
        def describe(self, clips: Sequence[Frames]) -> list[Reply]:
            return []

    asking = labeler(tmp_path)
    asking.describer = Mute(SCRIPT, tmp_path / "calls")
    with pytest.raises(DescriberError, match="gave 0 replies for 1"):
        asking.label([request(1)])


def test_long_and_hostile_replies_are_stored_safely(tmp_path: Path) -> None:
    asking = labeler(tmp_path)
    asking.describer = Scripted({1: "\x1b[2J[a][b]" + "z" * 10**5}, tmp_path / "calls")
    asking.label([request(1)])
    (stored,) = asking.store.items().values()
    assert len(stored.text) == 256
    assert stored.text.startswith("[a][b]z")


def test_environment_frames_are_known_by_their_pixels(tmp_path: Path) -> None:
    asking = build_labeler(VlmConfig(), tmp_path, "env")
    films = [moving_square(np.random.default_rng(i), way, p) for i, (way, p) in enumerate(cases(6))]
    first = asking.label_frames(films, "env 0")
    second = asking.label_frames([film.copy() for film in films], "env 1")
    assert asking.stats.asked == asking.stats.hits == 6
    assert [a.text for a in first] == [b.text for b in second]
    assert frames_identity(films[0]) != frames_identity(films[0].reshape(4, 170, 128, 3))


def test_kind_none_asks_nobody_and_writes_nothing(tmp_path: Path) -> None:
    asking = build_labeler(VlmConfig(kind="none"), tmp_path, "w")
    assert isinstance(asking.describer, NullDescriber)

    def gone() -> Frames:
        raise AssertionError("nobody needs the frames")

    (label,) = asking.label([request(1)._replace(frames=gone)])
    assert not label.known
    assert label.vector.shape == (semantic_dim(VlmConfig(kind="none")),)
    assert asking.stats == LabelStats(asked=0, hits=0, null=1, unreadable=0)
    assert list(tmp_path.iterdir()) == []


def test_labeler_travels_to_a_process(tmp_path: Path) -> None:
    asking = build_labeler(VlmConfig(), tmp_path, "w")
    asking.label_frames([moving_square(np.random.default_rng(0), 0, 5.0)], "x")
    copy = pickle.loads(pickle.dumps(asking))
    copy.label_frames([moving_square(np.random.default_rng(0), 0, 5.0)], "x")
    assert copy.stats.hits == 1


def _label_all(tmp_path: Path, writer: str, barrier: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    asking = labeler(tmp_path, writer)
    for number in list(SCRIPT) * 3:
        asking.label([request(number)])


def test_two_processes_never_ask_the_same(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    workers = [context.Process(target=_label_all, args=(tmp_path, w, barrier)) for w in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert calls(tmp_path) == ["1", "2", "3", "4"]


SERVER = {"base_url": "http://127.0.0.1:9/v1"}
NAMES = [  # as version 0.1.0 computed them: labels in a store of that time must still be found
    (VlmConfig(), "flow-v1 side=128 min_percent=0.7 min_area=0.002", "bc24f8364ff5a33c"),
    (
        VlmConfig(flow_min_percent=1.5),
        "flow-v1 side=128 min_percent=1.5 min_area=0.002",
        "083d9b64a5d780f9",
    ),
    (
        VlmConfig(kind="transformers", max_new_tokens=32),
        "transformers Qwen/Qwen2.5-VL-7B-Instruct@main prompt 91b242db tokens 32",
        "bf4abd1256e95eaf",
    ),
    (
        VlmConfig(kind="openai", server=ServerConfig(**SERVER)),
        "openai Qwen/Qwen2.5-VL-7B-Instruct prompt 91b242db tokens 64 auto",
        "f70a944ba9ea4c5f",
    ),
    (
        VlmConfig(
            kind="openai", revision="abc", server=ServerConfig(**SERVER, structured="brackets")
        ),
        "openai Qwen/Qwen2.5-VL-7B-Instruct@abc prompt 91b242db tokens 64 brackets",
        "9cb8a8f107962af4",
    ),
]


@pytest.mark.parametrize(("cfg", "name", "key"), NAMES, ids=[name for _, name, _ in NAMES])
def test_describers_and_labels_are_named_as_in_older_stores(
    cfg: VlmConfig, name: str, key: str
) -> None:
    assert build_describer(cfg).name == name
    assert label_key(name, "video 0123 frames 0..3 step 1 size 128").startswith(key)


def test_windows_of_an_environment_are_named_as_in_older_stores() -> None:
    pixels = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
    assert frames_identity(pixels) == "pixels cfe5ab6313184e23589cc50c333f0ee3"


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        (WindowConfig, "frames", 1, "frames must be at least 2, got 1"),
        (WindowConfig, "stride", 0, "stride must be at least 1, got 0"),
        (WindowConfig, "offset", -1, "offset must be at least 0, got -1"),
        (WindowConfig, "size", 4, r"size must lie in \[16, 2048\] pixels, got 4"),
        (CollectConfig, "size", 4, r"size must lie in \[16, 2048\] pixels, got 4"),
        (ServerConfig, "concurrency", 0, "concurrency must be at least 1, got 0"),
        (ServerConfig, "timeout_seconds", 0.0, "timeout_seconds must be positive, got 0.0"),
        (
            VlmConfig,
            "flow_min_percent",
            0.0,
            r"must lie in \(0, 50\] percent, got 0.0",
        ),
        (VlmConfig, "store", "", "store must name a folder"),
    ],
)
def test_config_ranges(section: type, field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        section(**{field: value})
