"""Files appear whole or not at all, and locks hold between processes."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mapo_lightning.files import DRAFT, FileLock, atomic_write


def drafts(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix == DRAFT]


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("sole_writer", [False, True])
def test_the_new_content_replaces_the_old(tmp_path: Path, durable: bool, sole_writer: bool) -> None:
    path = tmp_path / "new" / "file.txt"
    for text in ("first", "second"):
        with atomic_write(path, durable=durable, sole_writer=sole_writer) as draft:
            assert draft.parent == path.parent
            assert draft != path
            draft.write_text(text)
        assert path.read_text() == text
        assert drafts(path.parent) == []


def test_a_reader_sees_the_old_content_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with atomic_write(path) as draft:
        draft.write_text("half")
        assert path.read_text() == "old"
    assert path.read_text() == "half"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_removes_the_draft(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail() -> None:
        with atomic_write(path) as draft:
            draft.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert drafts(tmp_path) == []


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    (tmp_path / f"file.txt{DRAFT}").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space"), atomic_write(path, sole_writer=True) as draft:
        draft.write_bytes(b"x" * 100_000)
    assert path.read_text() == "old"
    assert drafts(tmp_path) == []


@pytest.mark.parametrize("sole_writer", [False, True])
def test_a_private_file_is_private_from_the_start(tmp_path: Path, sole_writer: bool) -> None:
    path = tmp_path / "secret.yaml"
    (tmp_path / f"secret.yaml{DRAFT}").touch(mode=0o644)  # left over from a killed process
    with atomic_write(path, private=True, sole_writer=sole_writer) as draft:
        assert stat.S_IMODE(draft.stat().st_mode) == 0o600
        draft.write_text("key")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_ordinary_file_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "file.txt") as draft:
            draft.write_text("x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == 0o640


def test_a_durable_file_is_on_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls, flush, replace = tmp_path / "file.txt", [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("flush"), flush(handle)))
    monkeypatch.setattr(os, "replace", lambda *args: (calls.append("rename"), replace(*args)))
    with atomic_write(path, durable=True) as draft:
        draft.write_text("x")
    with atomic_write(path) as draft:
        draft.write_text("y")
    assert calls == ["flush", "rename", "rename"]


KILLED = """
import os, signal, sys
from pathlib import Path
from mapo_lightning.files import atomic_write
with atomic_write(Path(sys.argv[1]), sole_writer=True) as draft:
    draft.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert len(drafts(tmp_path)) == 1
    with atomic_write(path, sole_writer=True) as draft:
        draft.write_text("new")
    assert path.read_text() == "new"
    assert drafts(tmp_path) == []


HOLDER = """
import sys
from pathlib import Path
from mapo_lightning.files import FileLock
with FileLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
    Path(sys.argv[2]).write_text("done")
"""


def test_a_second_process_waits_for_the_lock(tmp_path: Path) -> None:
    path, proof = tmp_path / "folder" / ".lock", tmp_path / "proof"
    command = [sys.executable, "-c", HOLDER, str(path), str(proof)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        lock = FileLock(path)
        assert not lock.acquire(wait=False)
        holder.stdin.write("go on\n")
        holder.stdin.flush()
        with lock:  # only once the other has let go, and that is after its last write
            assert proof.read_text() == "done"


def test_a_dead_holder_frees_the_lock(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    command = [sys.executable, "-c", HOLDER, str(path), str(tmp_path / "proof")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        holder.kill()
        with FileLock(path):
            pass
    assert not (tmp_path / "proof").exists()


def test_a_lock_can_be_taken_again(tmp_path: Path) -> None:
    one, two = FileLock(tmp_path / ".lock"), FileLock(tmp_path / ".lock")
    assert one.acquire(wait=False)
    assert not two.acquire(wait=False)
    one.release()
    one.release()
    assert two.acquire(wait=False)
    two.release()


def test_a_forked_child_does_not_free_the_lock_of_its_parent(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / ".lock")
    lock.acquire()
    child = os.fork()
    if child == 0:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert not FileLock(lock.path).acquire(wait=False)
    lock.release()
