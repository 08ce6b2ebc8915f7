"""Compiles parts of a model, where ``trainer.compile`` asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

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
