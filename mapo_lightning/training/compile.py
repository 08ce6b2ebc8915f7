"""Compiles parts of a model, where ``trainer.compile`` asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def compile_parts(
    parts: Iterable[nn.Module], backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Have torch compile these modules, in place, when they are first called.

    Where the compiler fails (there is none on the machine, or it cannot take an operation), torch
    warns and the part runs as it is.
    """
    torch._dynamo.config.suppress_errors = True
    for part in parts:
        part.compile(backend=backend)
