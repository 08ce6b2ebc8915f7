"""mapo-gpu-check around its comparisons: without a GPU, with broken parts, and its report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from mapo_lightning.run import gpu_check, gpu_report
from mapo_lightning.run.gpu_check import in_process, main, parts
from mapo_lightning.run.gpu_parts import Part, Row
from mapo_lightning.run.step_check import all_cases

PART = Part("capture", ("mapo",), "tiny", 2, 12)


def test_without_a_gpu_it_says_so_in_one_sentence(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    command = [sys.executable, "-m", "mapo_lightning.gpu_check", "--quick"]
    here = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=here, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("mapo-gpu-check compares a CUDA GPU with the CPU, and torch")
    assert list(tmp_path.iterdir()) == []


def test_every_method_is_checked_and_every_one_that_can_be_captured_is() -> None:
    whole = parts(quick=False)
    assert whole[0] == Part("steps", (), "tiny", 2, 12)
    captured = {name for part in whole if part.kind == "capture" for name in part.methods}
    methods = {case.method for case in all_cases()}
    assert {name for part in (*whole, *parts(quick=True)) for name in part.methods} <= methods
    assert methods - captured == {"ivideogpt", "ivideogpt_fixed", "ivideogpt_semantic"}
    assert {part.size for part in whole if part.kind == "time"} == {"tiny", "paper"}
    assert whole[-1].kind == "compile"  # the least important is what the time runs out for


def found(script: str, seconds: float = 60.0) -> list[Row]:
    return list(in_process(PART, seconds, [sys.executable, "-c", script]))


def test_a_part_that_dies_or_hangs_keeps_its_findings_and_fails() -> None:
    row = Row("capture", "x", True, "fine", {"ms": 1.0})
    say = f"import os, sys; print('hello'); print('''{json.dumps(row._asdict())}''', flush=True); "
    assert found(say) == [row]
    rows = found(say + "print('{\"part'); sys.exit('illegal memory access')")
    assert rows[0] == row
    assert rows[1].ok is False
    assert rows[1].found == "the process ended with 1: illegal memory access"
    rows = found(say + "import time; time.sleep(60)", seconds=5.0)
    assert [one.ok for one in rows] == [True, False]
    assert rows[1].found == "stopped: the 8 minutes were over"
    assert [one.ok for one in found(say, seconds=0.0)] == [False]
    slow = PART._replace(kind="compile")
    assert [one.ok for one in in_process(slow, 0.0)] == [None]
    asked = "import os; assert '\"mapo\"' in os.environ['MAPO_GPU_CHECK_PART']; "
    assert found(asked + "assert os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'") == []


def test_findings_come_at_once_and_nothing_is_left_running() -> None:
    """Of a process whose own child holds its output, as inductor's compilers do."""
    script = (
        "import json, os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "ids = f'{os.getpid()} {child.pid}'\n"
        "print(json.dumps(dict(part='x', name=ids, ok=True, found='')), flush=True)\n"
    )
    for after in ("time.sleep(60)", "sys.exit(3)"):
        found = in_process(PART, 60.0, [sys.executable, "-c", script + after])
        ids = [int(number) for number in next(found).name.split()]
        processes = [psutil.Process(pid) for pid in ids]
        found.close()
        _, left = psutil.wait_procs(processes, timeout=30)  # killed, they take a moment to go
        assert [p for p in left if p.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.parametrize("fails", [False, True])
def test_the_report_shows_what_failed_and_stands_beside_the_computed_numbers(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = {
        "milliseconds": 51.25, "launches": 31, "kernels": 4800, "busy": 0.875, "gigabytes": 9.5,
        "reserved": 12.0,
    }  # fmt: skip
    rows = [
        Row("float32, smooth units", "mapo", not fails, "losses 1e-6 | gradients 1e-5"),
        Row("time", gpu_report.GOAL, True, "recorded: one graph is replayed", numbers),
        Row("time", "x, compiled, bf16", None, "not measured: no compiler"),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_report, "_machine", lambda seconds: ["- GPU: none"])
    monkeypatch.setattr(gpu_check, "parts", lambda quick: [PART])
    monkeypatch.setattr(gpu_check, "in_process", lambda part, seconds: iter(rows))
    out = tmp_path / "report.md"
    assert main(["--out", str(out)]) == int(fails)
    text = out.read_text()
    verdict = "1 checks failed" if fails else "everything agrees"
    assert text.startswith(f"# mapo-gpu-check: {verdict}\n")
    assert f"- {'**FAILED**' if fails else 'ok'} mapo: losses 1e-6 / gradients 1e-5" in text
    assert "| 51.25 | 31 | 4,800 | 88% | 9.50 | 12.00 | recorded: one graph is replayed |" in text
    assert "| captured update, ms | 51.25 | goal 45 on an H200" in text
    assert "| launches of an eager update | not measured | 4,752" in text
    assert "context, not a target" in text
