"""Finds what no CUDA graph can hold, on a machine without CUDA too."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {
    "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "allclose", "masked_select",
    "bincount", "unique", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave",
}  # fmt: skip
"""Operations for which the host waits on CUDA; most give a result whose shape it must be told."""


class HostWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down what no CUDA graph can hold; works on every device, the CPU and meta too.

    Attributes:
        found: Names of operations, with what is wrong with them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at one operation, and carry it out."""
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name in WAITS and not (name == "repeat_interleave" and kwargs.get("output_size")):
            self.found.append(f"{name}: the host waits for the device")
        if name == "lift_fresh":
            self.found.append("lift_fresh: a constant is made on the host and copied")
        if kwargs.get("generator") is not None:
            self.found.append(f"{name}: draws from a generator that is not registered")
        chosen = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        if any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in chosen):
            self.found.append(f"{name}: a mask chooses, so the shape depends on the data")
        return func(*args, **kwargs)
