"""The report of ``mapo-gpu-check``: markdown that says on what machine which check came out how."""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from collections.abc import Sequence

import torch

from mapo_lightning.run.gpu_parts import Row
from mapo_lightning.tracking.versions import installed

GOAL = "contextwm, finetune, size=paper, captured, bf16"
EAGER = "contextwm, finetune, size=paper, eager, bf16"
COMPUTED: tuple[tuple[str, str, str, str], ...] = (
    ("launches of an eager update", EAGER, "launches", "4,752 and Adam's few (counted on a CPU)"),
    ("eager update, ms", EAGER, "milliseconds", "24 at least, at 5 us a launch (computed)"),
    ("captured update, ms", GOAL, "milliseconds", "goal 45 on an H200; 15 to 22 of it arithmetic"),
    ("the device works, captured", GOAL, "busy", "goal 0.85"),
    ("peak of tensors, GB", GOAL, "gigabytes", "not computed"),
)
"""Lines of docs/performance.md: what, of which row, which number of it, what the page says."""
CONTEXT = (
    "JAX DreamerV3 takes 22 ms per update on a GB200 (TorchRL's measurement). That is another "
    "model of another size on another GPU: context, not a target."
)


def report(rows: Sequence[Row], seconds: float) -> str:
    """All of it, as markdown."""
    failed = [row for row in rows if row.ok is False]
    verdict = f"{len(failed)} checks failed" if failed else "everything agrees"
    lines = [f"# mapo-gpu-check: {verdict}", "", *_machine(seconds)]
    for part in dict.fromkeys(row.part for row in rows):
        lines += ["", f"## {part}", ""]
        lines += (_times if part == "time" else _findings)([r for r in rows if r.part == part])
    lines += ["", "## Against docs/performance.md", "", *_against(rows), "", CONTEXT, ""]
    return "\n".join(lines)


def _machine(seconds: float) -> list[str]:
    properties = torch.cuda.get_device_properties(0)
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return [
        f"- {time.strftime('%Y-%m-%d %H:%M')}, {seconds / 60:.1f} minutes",
        f"- GPU: {properties.name}, {properties.total_memory / 1e9:.0f} GB, compute capability "
        f"{properties.major}.{properties.minor}, {torch.cuda.device_count()} in the machine",
        f"- driver {_driver()}, CUDA {torch.version.cuda}, cuDNN {cudnn}",
        f"- torch {torch.__version__}, lightning {installed('lightning')}, mapo-lightning "
        f"{installed('mapo-lightning')}",
        f"- {platform.platform()}, Python {platform.python_version()}",
        f"- bf16 in hardware: {torch.cuda.is_bf16_supported(including_emulation=False)}",
    ]


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown (no nvidia-smi)"
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False)
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


def _findings(rows: Sequence[Row]) -> list[str]:
    said = {True: "ok", False: "**FAILED**", None: "-"}
    return [f"- {said[row.ok]} {row.name}: {_cell(row.found)}" for row in rows]


def _times(rows: Sequence[Row]) -> list[str]:
    heads = ["step", "ms", "launches", "kernels", "busy", "peak GB", "reserved GB", "state"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        n = row.numbers
        cells = [""] * 6
        if n:
            cells = [
                f"{n['milliseconds']:.2f}", f"{n['launches']:,}", f"{n['kernels']:,}",
                f"{n['busy']:.0%}", f"{n['gigabytes']:.2f}", f"{n['reserved']:.2f}",
            ]  # fmt: skip
        state = f"**FAILED** {row.found}" if row.ok is False else row.found
        lines.append(f"| {row.name} | " + " | ".join([*cells, _cell(state)]) + " |")
    return lines


def _against(rows: Sequence[Row]) -> list[str]:
    measured = {row.name: row.numbers for row in rows if row.part == "time"}
    lines = ["| what | measured here | docs/performance.md |", "|---|---|---|"]
    for what, name, key, said in COMPUTED:
        number = measured.get(name, {}).get(key)
        shown = "not measured" if number is None else f"{number:,.4g}"
        lines.append(f"| {what} | {shown} | {said} |")
    return lines


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")
