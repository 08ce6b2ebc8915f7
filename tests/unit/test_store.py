from __future__ import annotations

import os
import pickle
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mapo_lightning.semantics.locks import WindowLocks
from mapo_lightning.semantics.phrase import Phrase
from mapo_lightning.semantics.store import LabelStore, StoredLabel
from mapo_lightning.types import DescriberError

PHRASE = Phrase("hand", "opens", 'the "big" door', "left", "10 cm")


def label(text: str = "x", phrase: Phrase | None = PHRASE) -> StoredLabel:
    hidden = np.arange(5, dtype=np.float16) / 3
    return StoredLabel(text, "slots", phrase, hidden, "test-v1", "a.mp4 frames 0..3 step 1")


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    LabelStore(tmp_path, "one").put({"a": label("\u00e9\u4e2d")})
    read = LabelStore(tmp_path, "two").get(["a", "b"])
    assert list(read) == ["a"]
    assert read["a"]._replace(hidden=None) == label("\u00e9\u4e2d")._replace(hidden=None)
    np.testing.assert_array_equal(read["a"].hidden, label().hidden)
    assert read["a"].hidden.dtype == np.float16


def test_null_has_no_phrase(tmp_path: Path) -> None:
    store = LabelStore(tmp_path, "one")
    store.put({"n": StoredLabel("null", "null", None, None, "t", "s")})
    assert LabelStore(tmp_path, "x").get(["n"])["n"] == StoredLabel(
        "null", "null", None, None, "t", "s"
    )


def test_reading_makes_nothing(tmp_path: Path) -> None:
    assert LabelStore(tmp_path / "none", "w").get(["a"]) == {}
    assert not (tmp_path / "none").exists()


def test_live_writers_see_each_other(tmp_path: Path) -> None:
    one, two = LabelStore(tmp_path, "one"), LabelStore(tmp_path, "two")
    one.put({"a": label("a")})
    two.put({"b": label("b")})
    assert two.get(["a"])["a"].text == "a"
    one.put({"c": label("c")})
    assert sorted(two.get(["a", "b", "c"])) == ["a", "b", "c"]
    assert sorted(one.items()) == ["a", "b", "c"]


def test_same_writer_name_gets_its_own_file(tmp_path: Path) -> None:
    one, two = LabelStore(tmp_path, "w"), LabelStore(tmp_path, "w")
    one.put({"a": label()})
    two.put({"b": label()})
    assert sorted(p.name for p in tmp_path.glob("*.sqlite")) == ["w-1.sqlite", "w.sqlite"]
    one.close()
    LabelStore(tmp_path, "w").put({"c": label()})
    assert len(list(tmp_path.glob("*.sqlite"))) == 2
    assert sorted(two.get("abc")) == ["a", "b", "c"]


def test_writer_name_cannot_leave_the_folder(tmp_path: Path) -> None:
    LabelStore(tmp_path / "in", "../../evil/x").put({"a": label()})
    assert {p.parent for p in tmp_path.rglob("*.sqlite")} == {tmp_path / "in"}


def test_pickled_store_opens_in_place(tmp_path: Path) -> None:
    store = LabelStore(tmp_path, "w")
    store.put({"a": label()})
    assert pickle.loads(pickle.dumps(store)).get(["a"])["a"].text == "x"


def test_many_keys_at_once(tmp_path: Path) -> None:
    store = LabelStore(tmp_path, "w")
    store.put({f"k{i}": label(str(i)) for i in range(1500)})
    found = LabelStore(tmp_path, "r").get([f"k{i}" for i in range(2000)])
    assert len(found) == 1500
    assert found["k1234"].text == "1234"


def test_no_pickle_in_the_files(tmp_path: Path) -> None:
    store = LabelStore(tmp_path, "w")
    store.put({"a": label()})
    store.close()
    with sqlite3.connect(tmp_path / "w.sqlite") as file:
        rows = file.execute("SELECT * FROM labels").fetchall()
    assert {type(value) for value in rows[0]} == {str, bytes}
    assert rows[0][4] == label().hidden.tobytes()


def test_foreign_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "junk.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(DescriberError, match=r"junk\.sqlite.*Move it away"):
        LabelStore(tmp_path, "w").get(["a"])


def test_forged_row_is_refused(tmp_path: Path) -> None:
    store = LabelStore(tmp_path, "w")
    store.put({"a": label()})
    store.close()
    with sqlite3.connect(tmp_path / "w.sqlite") as file:
        file.execute("UPDATE labels SET slots='[1,2]'")
    with pytest.raises(DescriberError, match="has no five slots"):
        LabelStore(tmp_path, "r").get(["a"])


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DescriberError, match="cannot write 1 labels"):
        LabelStore(tmp_path / "file", "w").put({"a": label()})


WRITER = """
import sys
from pathlib import Path
from mapo_lightning.semantics.store import LabelStore, StoredLabel
store = LabelStore(Path(sys.argv[1]), "victim")
for i in range(10**6):
    keys = [f"{i}-{k}" for k in range(5)]
    assert store.locks.take(keys) == keys
    store.put({k: StoredLabel("t" * 200, "null", None, None, "d", "s") for k in keys})
    print(i, flush=True)
    store.locks.release(keys)
"""


@pytest.mark.slow
def test_a_full_disk_is_reported_with_its_path_and_what_was_there_stays(tmp_path: Path) -> None:
    store = LabelStore(tmp_path, "w")
    store.put({"a": label()})
    (file,) = tmp_path.glob("*.sqlite")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size, limits[1]))  # stops root too
    try:
        with pytest.raises(DescriberError, match=rf"cannot write 500 labels .*{tmp_path}"):
            store.put({f"k{i}": label("t" * 200) for i in range(500)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert set(LabelStore(tmp_path, "x").get(["a", "k0"])) == {"a"}
    store.put({"b": label()})
    assert set(LabelStore(tmp_path, "x").get(["a", "b"])) == {"a", "b"}


@pytest.mark.slow
def test_killed_writer_loses_nothing_it_reported(tmp_path: Path) -> None:
    for turn in range(3):
        folder = tmp_path / str(turn)
        command = [sys.executable, "-c", WRITER, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(0.05 + 0.06 * turn)
            writer.send_signal(signal.SIGKILL)
            done = [int(line) for line in writer.stdout if line.endswith("\n")]
        last = done[-1] if done else 0
        store = LabelStore(folder, "reader")
        keys = [f"{i}-{k}" for i in range(last + 1) for k in range(5)]
        assert len(store.get(keys)) == len(keys)
        assert len(store.items()) % 5 == 0  # a commit is there as a whole or not at all
        left = [p.name for p in (folder / "locks").glob("[0-9]*")]
        for name in left:  # killed before it could sign: respected for five seconds
            if not (folder / "locks" / name).read_text():
                os.utime(folder / "locks" / name, (0, 0))
        assert store.locks.take(left) == left  # the dead hold nothing
        store.put({"new": label()})
        assert LabelStore(folder, "third").get(["new"])["new"].text == "x"


def test_claims_exclude_each_other(tmp_path: Path) -> None:
    one, two = WindowLocks(tmp_path), WindowLocks(tmp_path)
    assert one.take(["a", "b"]) == ["a", "b"]
    assert two.take(["a", "b", "c"]) == ["c"]
    one.release(["a"])
    assert two.take(["a", "b"]) == ["a"]


def test_claim_of_a_recycled_process_number_is_stale(tmp_path: Path) -> None:
    locks = WindowLocks(tmp_path)
    locks.take(["a"])
    host, pid, _ = (tmp_path / "a").read_text().split()
    (tmp_path / "a").write_text(f"{host} {pid} 1")  # same number, started at another time
    assert locks.take(["a"]) == ["a"]


def test_claim_without_a_name_is_respected_for_a_while(tmp_path: Path) -> None:
    locks = WindowLocks(tmp_path)
    (tmp_path / "a").write_text("")
    assert locks.take(["a"]) == []
    os.utime(tmp_path / "a", (0, 0))
    assert locks.take(["a"]) == ["a"]


def test_claim_of_another_machine_expires(tmp_path: Path) -> None:
    locks = WindowLocks(tmp_path)
    (tmp_path / "a").write_text("elsewhere 1 5")
    assert locks.take(["a"]) == []
    os.utime(tmp_path / "a", (0, 0))
    assert locks.take(["a"]) == ["a"]
