from __future__ import annotations

import json
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mapo_lightning.run import doctor
from mapo_lightning.run.doctor import Check
from mapo_lightning.types import EnvironmentSetupError


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({"mujoco": "3.17.0", "metaworld": "3.0.0"}, "breaks Meta-World"),
        ({"mujoco": "4.0.0"}, "mujoco 4 breaks dm_control"),
        ({"numpy": "2.4.6", "dm_control": "1.0.28"}, "before 1.0.36 fails"),
        ({"lightning": "2.6.2"}, "steals credentials"),
        ({"lightning": "2.6.3"}, "steals credentials"),
        ({"decord": "0.6.0", "decord2": "3.4.0"}, "keep one of them"),
        ({"torch": "2.9.1"}, "attacked through checkpoints"),
    ],
)
def test_combinations_known_to_fail(versions: dict[str, str], words: str) -> None:
    check = doctor.check_combinations(versions.get)
    assert check.verdict == "FAIL"
    assert words in check.do


def test_the_pinned_combination_is_fine() -> None:
    good = {"mujoco": "3.16.0", "metaworld": "3.0.0", "dm_control": "1.0.49", "numpy": "2.4.6"}
    good |= {"lightning": "2.6.6", "torch": "2.13.0", "decord": "0.6.0"}
    assert doctor.check_combinations(good.get).verdict == "ok"


@pytest.mark.parametrize(
    ("version", "verdict"),
    [("3.10.14", "FAIL"), ("3.11.2", "ok"), ("3.12.9", "ok"), ("3.13.0", "FAIL")],
)
def test_only_some_pythons_have_all_packages(
    version: str, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "supported_pythons", lambda: SpecifierSet(">=3.11,<3.13"))
    check = doctor.check_python(version)
    assert check.verdict == verdict
    assert ("labmaze" in check.do) == (verdict == "FAIL")


def test_declared_versions() -> None:
    assert doctor.check_versions([Requirement("numpy>=2")]).verdict == "ok"
    wrong = doctor.check_versions([Requirement("numpy<2"), Requirement("no-such-dist>=1")])
    assert wrong.verdict == "FAIL"
    assert "wants <2" in wrong.found
    assert "no-such-dist missing" in wrong.found
    assert doctor.check_versions([]).verdict == "WARN"


def test_pins_that_differ_are_told(tmp_path: Path) -> None:
    pins = tmp_path / "constraints.txt"
    pins.write_text("# a comment\nnumpy==1.0.0\nno-such-dist==1\n\n")
    check = doctor.check_pins(pins)
    assert check.verdict == "WARN"
    assert check.found.startswith("1 differ: numpy ")
    assert doctor.check_pins(tmp_path / "gone").verdict == "ok"


def test_disk_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, verdict in ((0, "ok"), (2**60, "WARN")):
        monkeypatch.setattr(doctor, "_DISK_FAIL", 0)
        monkeypatch.setattr(doctor, "_DISK_WARN", limit)
        assert doctor.check_disk(tmp_path).verdict == verdict
    monkeypatch.setattr(doctor, "_DISK_FAIL", 2**60)
    assert doctor.check_disk(tmp_path).verdict == "FAIL"


def test_a_check_that_breaks_is_a_finding() -> None:
    def ours() -> Check:
        raise EnvironmentSetupError("no renderer: install one")

    def theirs() -> Check:
        raise ZeroDivisionError("boom\nand more")

    assert doctor.run_check("x", ours) == Check("x", "FAIL", "no renderer: install one")
    broken = doctor.run_check("x", theirs)
    assert "ZeroDivisionError: boom" in broken.found
    assert "\n" not in broken.line()


def test_the_exit_code_and_the_two_forms_of_the_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = (("a", lambda: Check("a", "ok", "fine")), ("b", lambda: Check("b", "WARN", "hm", "x")))
    monkeypatch.setattr(doctor, "CHECKS", checks)
    assert doctor.main([]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok   a             fine",
        "WARN b             hm -> x",
    ]
    monkeypatch.setattr(doctor, "CHECKS", (*checks, ("c", lambda: Check("c", "FAIL", "no", "y"))))
    assert doctor.main(["--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert [check["verdict"] for check in told["checks"]] == ["ok", "WARN", "FAIL"]


@pytest.mark.slow
def test_this_machine_is_well(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert len(out.splitlines()) == len(doctor.CHECKS)
    assert list(in_tmp.iterdir()) == []  # looking leaves nothing behind
