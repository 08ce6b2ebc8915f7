"""Whose settings are these: the key, its signatures, and what is no longer one's own."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mapo_lightning import ownership
from mapo_lightning.ownership import is_own, key_file, own_text, sign, signed

TEXT = "seed: 3\nmethod: mapo\n"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    ownership._complain.cache_clear()
    return tmp_path / "state"


def test_only_the_same_key_and_text_are_ones_own(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_own(TEXT, "0" * 64)
    assert not state.exists()  # looking makes no key
    signature = sign(TEXT)
    assert stat.S_IMODE(key_file().stat().st_mode) == 0o600
    assert is_own(TEXT, signature)
    assert not is_own(TEXT + " ", signature)
    assert not any(is_own(TEXT, other) for other in ("", "x", "ä", signature[:-1], "0" * 64))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "somebody else"))
    assert sign(TEXT) != signature
    assert not is_own(TEXT, signature)


def test_a_file_is_ones_own_until_it_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(signed(TEXT))
    assert path.read_text().startswith("# ")
    assert own_text(path) == TEXT
    path.write_text(signed(TEXT) + "run_dir: elsewhere\n")
    assert own_text(path) is None
    path.write_bytes(b"\xff\xfe")
    assert own_text(path) is None
    assert own_text(tmp_path) is own_text(tmp_path / "missing") is None


def test_many_first_signatures_at_once_use_one_key() -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(sign, [TEXT] * 16))) == 1


@pytest.mark.parametrize("fault", ["readable by others", "damaged", "no folder"])
def test_without_a_good_key_nothing_is_ones_own(
    fault: str, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if fault == "no folder":
        state.write_text("a file")
        assert sign(TEXT) == ""
    else:
        signature = sign(TEXT)
        if fault == "damaged":
            key_file().write_bytes(b"short")
        else:
            os.chmod(key_file(), 0o644)
        assert not is_own(TEXT, signature)
    assert not is_own(TEXT, "")
    assert caplog.text.count("settings cannot be signed") == 1
    assert own_text(state) is None
