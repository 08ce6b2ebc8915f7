"""A whole corpus labelled, killed and gone on with; labels as a file."""

from __future__ import annotations

import json
import logging
import random
import re
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from label_job import Job, at, corpus
from label_servers import Running, running
from scenes import cases, moving_square

from mapo_lightning.data.label_corpus import LabelProgress
from mapo_lightning.data.settings import LabelConfig
from mapo_lightning.data.video import write_mp4
from mapo_lightning.label_tools import parquet as labels
from mapo_lightning.semantics.phrase import parse_reply
from mapo_lightning.semantics.store import LabelStore, StoredLabel
from mapo_lightning.types import ConfigError, DescriberError

pytestmark = pytest.mark.slow

VIDEOS, FRAMES = 5, 60
WINDOWS = VIDEOS * len(range(3, FRAMES, 4))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for number, (way, pixels) in enumerate(cases(VIDEOS)):
        rng = np.random.default_rng(number)
        parts = [moving_square(rng, way, pixels) for _ in range(FRAMES // 4)]
        write_mp4(folder / f"{number}.mp4", np.concatenate(parts), 10.0)
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(seconds=0.02, at_once=4, schema="ignored") as server:
        yield server


def test_every_window_is_labelled_once(videos: Path, tmp_path: Path) -> None:
    seen: list[LabelProgress] = []
    done = corpus(videos, tmp_path).run(seen.append)
    assert (done.windows, done.done, done.missing) == (WINDOWS, WINDOWS, WINDOWS)
    assert done.stats.asked == WINDOWS
    assert done.eta_seconds == 0.0
    assert seen[0].eta_seconds is None
    assert seen[-1] == done
    assert re.fullmatch(r"0\.0 queried/s, known 0, null 0%, left 75 in \?", seen[0].brief)
    assert re.fullmatch(r"\d+\.\d queried/s, known 0, null \d+%, left 0 in 0:00:00", seen[-1].brief)
    again = corpus(videos, tmp_path).run(seen.append)
    assert (again.missing, again.stats.asked, again.stats.hits) == (0, 0, WINDOWS)
    # Training asks about no window that labelling left out.
    clips = corpus(videos, tmp_path, cached_only=True).clips
    for video in range(VIDEOS):
        for start_ in range(0, FRAMES - 8):
            assert clips.clip_at(video, start_)["vlm_asked"] == 0


def test_shards_are_the_whole(videos: Path, tmp_path: Path) -> None:
    parts = [corpus(videos, tmp_path, (n, 3)) for n in range(3)]
    assert sum(part.windows for part in parts) == WINDOWS
    assert min(part.windows for part in parts) > 0
    assert sum(part.run(lambda _: None).stats.asked for part in parts) == WINDOWS


def test_estimate_asks_only_its_probe(videos: Path, tmp_path: Path, server: Running) -> None:
    before = server.stats()["calls"]
    vlm = at(server, 4)
    estimate = corpus(videos, tmp_path, **vlm).estimate(16)
    assert server.stats()["calls"] - before == 17
    assert (estimate.windows, estimate.missing) == (WINDOWS, WINDOWS - 17)
    assert estimate.rate is not None
    assert 0 < estimate.rate < 200  # four at a time, 20 ms each
    none = corpus(videos, tmp_path, **vlm).estimate(0)
    assert none.rate is None
    assert server.stats()["calls"] - before == 17
    assert "label.probe=N" in str(none)


def test_estimate_counts_only_windows_that_got_a_label(
    videos: Path, tmp_path: Path, server: Running
) -> None:
    server.break_next(always="sorry")
    estimate = corpus(videos, tmp_path, **at(server, 4)).estimate(16)
    server.break_next()
    assert (estimate.missing, estimate.rate) == (WINDOWS, None)


def test_lost_video_is_counted_and_the_rest_labelled(videos: Path, tmp_path: Path) -> None:
    work = corpus(videos, tmp_path)
    work.clips.videos[1] = work.clips.videos[1]._replace(path=tmp_path / "gone.mp4")
    done = work.run(lambda _: None)
    assert (done.lost, done.done) == (WINDOWS // VIDEOS, WINDOWS - WINDOWS // VIDEOS)


def test_cached_only_names_the_window(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(DescriberError, match=r"there is no label of 0\.mp4 frames 0\.\.3 step 1"):
        corpus(videos, tmp_path, cached_only=True).run(lambda _: None)


def test_killed_again_and_again_asks_no_more_than_was_in_flight(
    videos: Path, tmp_path: Path, server: Running
) -> None:
    words = at(server, 4)
    Job(videos, tmp_path / "calm", **words).finish()
    before, kills, rng = server.stats()["calls"], 0, random.Random(0)
    for _ in range(4):
        asked = server.stats()["answered"]
        job = Job(videos, tmp_path / "wild", **words)
        server.wait_for(asked + 4)
        time.sleep(rng.uniform(0.0, 0.2))
        kills += job.kill()
    assert server.stats()["calls"] > before
    said = Job(videos, tmp_path / "wild", **words).finish()
    assert kills == 4
    time.sleep(0.1)
    assert server.stats()["calls"] - before <= WINDOWS + 4 * kills
    known = re.search(rf"^{WINDOWS} of {WINDOWS} windows: \d+ queried, (\d+) known before", said)
    assert known is not None
    assert int(known[1]) > 0  # what was answered before a kill is kept
    for name in ("calm", "wild"):
        labels.export_labels(tmp_path / name / "labels", tmp_path / f"{name}.parquet")
    calm, wild = ((tmp_path / f"{name}.parquet").read_bytes() for name in ("calm", "wild"))
    assert calm == wild
    before = server.stats()["calls"]
    assert " 0 queried" in Job(videos, tmp_path / "wild", **words).finish()
    assert server.stats()["calls"] == before


def test_two_jobs_at_once_share_the_work(videos: Path, tmp_path: Path, server: Running) -> None:
    before = server.stats()["calls"]
    words = at(server, 2)
    corpus(videos, tmp_path)  # scanned once
    jobs = [Job(videos, tmp_path, **words) for _ in range(2)]
    assert all(f"{WINDOWS} of {WINDOWS}" in job.finish() for job in jobs)
    assert server.stats()["calls"] - before == WINDOWS


def filled(tmp_path: Path, videos: Path, **vlm: Any) -> Path:
    corpus(videos, tmp_path, **vlm).run(lambda _: None)
    return tmp_path / "labels"


def test_export_and_import_keep_everything(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = filled(tmp_path, videos)
    with_state = LabelStore(store, "state")
    key, label = next(with_state.ordered())
    hidden = np.arange(7, dtype=np.float16) / 3
    with_state.put({"0" * 32: label._replace(hidden=hidden)})
    file, other = tmp_path / "out/labels.parquet", tmp_path / "other"
    assert labels.main(["export", str(store), str(file)]) == 0
    assert labels.main(["import", str(file), str(other)]) == 0
    one, two = LabelStore(store, "r").items(), LabelStore(other, "r").items()
    assert list(one) == list(two)
    assert {k: v._replace(hidden=None) for k, v in one.items()} == {
        k: v._replace(hidden=None) for k, v in two.items()
    }
    np.testing.assert_array_equal(two["0" * 32].hidden, hidden)
    assert labels.import_labels(file, other) == (0, WINDOWS + 1, 0)
    labels.export_labels(other, tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == file.read_bytes()
    card = labels.read_card(file)
    assert card["labels"] == WINDOWS + 1
    assert sum(sum(c.values()) for c in card["describers"].values()) == WINDOWS + 1
    assert f"{WINDOWS + 1} labels" in file.with_suffix(".md").read_text()
    assert pq.read_table(file).column("key")[1].as_py() == key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "../../x"}, "a key must be 32 hexadecimal digits"),
        ({"status": "evil"}, "unknown status 'evil'"),
        ({"hidden": [float("nan")]}, "not finite"),
    ],
)
def test_forged_rows_are_refused(
    change: dict[str, object], message: str, videos: Path, tmp_path: Path
) -> None:
    file = tmp_path / "x.parquet"
    labels.export_labels(filled(tmp_path, videos), file)
    rows = pq.read_table(file).to_pylist()
    rows[3] |= change
    pq.write_table(labels.pa.Table.from_pylist(rows, schema=labels._SCHEMA), file)
    with pytest.raises(DescriberError, match=message):
        labels.import_labels(file, tmp_path / "other")


def test_long_and_hostile_words_are_cleaned(videos: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    labels.export_labels(filled(tmp_path, videos), file)
    rows = [r for r in pq.read_table(file).to_pylist() if r["status"] == "slots"][:1]
    rows[0] |= {"text": "\x1b[2J" + "x" * 9000, "target": "y\n" * 999, "source": "z" * 9000}
    pq.write_table(labels.pa.Table.from_pylist(rows, schema=labels._SCHEMA), file)
    labels.import_labels(file, tmp_path / "other")
    (label,) = LabelStore(tmp_path / "other", "r").items().values()
    assert (len(label.text), len(label.source)) == (256, 4096)
    assert label.phrase is not None
    assert len(label.phrase.target) <= 64
    assert "\n" not in label.phrase.target


def test_wrong_files_are_one_sentence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "x.parquet").write_bytes(b"nonsense")
    assert labels.main(["import", str(tmp_path / "x.parquet"), str(tmp_path / "s")]) == 2
    assert labels.main(["export", str(tmp_path), str(tmp_path / "y.parquet")]) == 2
    assert labels.main(["show", str(tmp_path / "gone.parquet")]) == 2
    said = [record.getMessage() for record in caplog.records]
    assert [line.startswith("error: ") for line in said] == [True] * 3
    assert "is not a label store" in said[1]
    assert not (tmp_path / "s").exists()


SPOILT = (
    "<think>[a][drops][b][up][9 m]",
    "I'm sorry, but I can't assist with that.",
    "",
    "[a][lif",
)


def test_labels_that_are_no_answers_are_found_removed_and_asked_again(
    videos: Path, tmp_path: Path, server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """A store of version 0.1.0, which kept whatever a server said."""
    vlm = at(server, 4)
    right = LabelStore(filled(tmp_path, videos, **vlm), "r").items()
    old = tmp_path / "old/labels"
    spoilt = dict(zip(list(right)[3:60:17], SPOILT, strict=True))
    for key, label in right.items():
        text = spoilt.get(key, label.text)
        phrase, status = parse_reply(text)
        changed = label._replace(text=text, phrase=phrase, status=status)
        LabelStore(old, f"w{len(text) % 2}").put({key: changed})
    caplog.set_level(logging.INFO)
    assert labels.main(["check", str(old)]) == 1
    assert f"{WINDOWS} labels, 4 of them are no answers" in caplog.text
    assert "1 by 'openai" in caplog.text
    assert "thoughts instead of an answer; such as " in caplog.text
    assert len(LabelStore(old, "r").items()) == WINDOWS  # nothing is changed yet
    assert labels.main(["check", str(old), "--remove"]) == 0
    assert "4 labels removed" in caplog.text
    assert set(LabelStore(old, "r").items()) == set(right) - set(spoilt)
    assert labels.main(["check", str(old), "--remove"]) == 0
    done = corpus(videos, tmp_path / "old", **vlm).run(lambda _: None)
    assert (done.missing, done.stats.asked) == (4, 4)
    assert LabelStore(old, "r").items() == right


def test_labels_that_are_no_answers_are_not_imported(videos: Path, tmp_path: Path) -> None:
    store, file = filled(tmp_path, videos), tmp_path / "x.parquet"
    label = next(iter(LabelStore(store, "r").items().values()))
    spoilt = {f"{n:032x}": label._replace(text=text) for n, text in enumerate(SPOILT)}
    LabelStore(store, "old").put(spoilt)
    labels.export_labels(store, file)
    assert labels.import_labels(file, tmp_path / "other") == (WINDOWS, 0, 4)
    assert not set(spoilt) & set(LabelStore(tmp_path / "other", "r").items())


def test_a_store_that_cannot_be_changed_is_named(tmp_path: Path) -> None:
    store = LabelStore(tmp_path, "w")
    store.put({"0" * 32: StoredLabel("", "unreadable", None, None, "d", "s")})
    with sqlite3.connect(tmp_path / "w.sqlite") as other:
        other.execute(
            "CREATE TRIGGER stop BEFORE DELETE ON labels BEGIN SELECT RAISE(FAIL, 'no'); END"
        )
    with pytest.raises(DescriberError, match=r"cannot remove labels from '.*w\.sqlite': no"):
        LabelStore(tmp_path, "x").remove(["0" * 32])


@pytest.mark.parametrize("shard", ["2/2", "x", "1", "-1/2", "0/0"])
def test_shards_are_checked(shard: str) -> None:
    with pytest.raises(ConfigError, match="shard must be i/n"):
        LabelConfig(shard=shard)


def test_card_is_plain_json(videos: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    labels.export_labels(filled(tmp_path, videos), file)
    assert json.loads(pq.read_metadata(file).metadata[b"mapo_label_card"])["format"] == 1
