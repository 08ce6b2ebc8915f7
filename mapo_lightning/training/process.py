"""What is settled about the process itself before training starts."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from mapo_lightning.types import ConfigError

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # malloc.h
_MIB = 2**20


def keep_freed_memory() -> bool:
    """Let glibc keep the blocks that tensors free, instead of giving them back to the system.

    By default every large tensor is mapped when it is made and unmapped when it goes, and its pages
    are cleared and faulted in again at the next update: 17,000 page faults in a tiny update, none
    with this. Costs the peak of one update in resident memory, and concerns the CPU only.

    Returns:
        Whether this system's allocator took the settings (glibc does).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library, musl for example
        return False
    settings = (
        (_M_ARENA_MAX, 1),  # autograd's thread uses the main heap too
        (_M_MMAP_MAX, 0),  # no mapping of its own for any block
        (_M_TRIM_THRESHOLD, 2**31 - 1),
        (_M_TOP_PAD, 256 * _MIB),
    )
    taken = [mallopt(name, value) == 1 for name, value in settings]
    return all(taken)


def run_folder(name: str, given: str = "") -> Path:
    """Folder of this run; the same on every rank, whoever starts the ranks.

    Args:
        name: What to call it where none is given, after the time or the job.
        given: The folder that the user wants.

    Returns:
        Its absolute path, made if missing.
    """
    folder = given or os.environ.get("MAPO_RUN_DIR", "")
    if not folder:
        job = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")
        stamp = f"job{job}" if job and job != "none" else time.strftime("%Y%m%d-%H%M%S")
        folder = f"runs/{stamp}-{name}"
    path = Path(folder).absolute()
    os.environ["MAPO_RUN_DIR"] = str(path)  # ranks that this process starts share it
    path.mkdir(parents=True, exist_ok=True)
    return path


def check_origin(package: ModuleType, folder: Path) -> None:
    """Refuse a package of the same name from elsewhere.

    Raises:
        ConfigError: ``package`` does not lie in ``folder``.
    """
    found, wanted = Path(package.__file__ or "").resolve().parent, folder / package.__name__
    if found != wanted:
        raise ConfigError(
            f"'{package.__name__}' was imported from {found}, not from {wanted}: another installed "
            "package has the same name; uninstall it"
        )


def rank() -> int:
    """Number of this process among all of a job, right where no Trainer has counted them yet."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


COMPILED = ("encoder", "decoder")
"""Parts of a world model that the compiler speeds up."""


def compile_parts(
    parts: Mapping[str, nn.Module], backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Have torch compile the `COMPILED` ones of these, in place, when they are first called.

    Where the compiler fails (there is none on the machine, or it cannot take an operation), torch
    warns and the part runs as it is.
    """
    torch._dynamo.config.suppress_errors = True
    for name in COMPILED:
        if name in parts:
            parts[name].compile(backend=backend)
