"""Layers that more than one network is made of.

Initialisation follows the published code: Xavier-uniform weights and zero biases for layers that a
network creates directly, PyTorch's defaults inside residual stacks, attention and the GRU
(facts 3.5). Deviation: prelar-init. PreLAR's own code starts all of its layers but norms with
Xavier; here it starts like the systems that it is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from mapo_lightning.models.settings import MLPStyle, Recompute

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d, nn.ConvTranspose2d)

RESAMPLE = 2
"""Factor by which every stage of an image network halves or doubles the resolution."""


def xavier(layer: Layer) -> Layer:
    """Give ``layer`` Xavier-uniform weights and a zero bias, and return it."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def mlp(
    inputs: int, units: int, layers: int, outputs: int, style: MLPStyle = "elu"
) -> nn.Sequential:
    """Multi-layer perceptron, (..., inputs) -> (..., outputs).

    Hidden layers are followed by ELU (``elu``: DreamerV2), or by RMS norm and SiLU (``rms_silu``:
    DreamerV3).
    """
    modules: list[nn.Module] = []
    for width in [inputs] + [units] * (layers - 1):
        modules.append(xavier(nn.Linear(width, units)))
        if style == "elu":
            modules.append(nn.ELU())
        else:
            modules += [nn.RMSNorm(units, eps=1e-4), nn.SiLU()]
    return nn.Sequential(*modules, xavier(nn.Linear(units, outputs)))


def zeroed(network: nn.Sequential) -> nn.Sequential:
    """Let ``network`` say 0 for every input at first, and return it."""
    last = network[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return network


def transposed(layer: nn.ConvTranspose2d, x_NCHW: Tensor) -> Tensor:
    """``layer(x_NCHW)`` of stride 2, on a CPU as a product or a convolution that is shuffled.

    Every second row and column of the result is a convolution of its own, with every second row
    and column of the kernel. Equal within rounding. On a CPU the product, for maps of one pixel,
    takes a third of the layer's time; the shuffled convolution gains only on some machines.
    """
    if x_NCHW.device.type != "cpu":
        return layer(x_NCHW)  # type: ignore[no-any-return]
    weight, bias, pad = layer.weight, layer.bias, int(layer.padding[0])
    assert bias is not None
    count, inputs, side, _ = x_NCHW.shape
    outputs, kernel = weight.shape[1:3]
    if side == 1 and not pad:
        flat = x_NCHW.flatten(1) @ weight.flatten(1)
        return flat.view(count, outputs, kernel, kernel) + bias[:, None, None]
    half = (kernel + 1) // 2
    even = F.pad(weight, (0, 2 * half - kernel, 0, 2 * half - kernel))
    split = even.view(inputs, outputs, half, 2, half, 2).flip(2, 4)
    small = split.permute(1, 3, 5, 0, 2, 4).reshape(4 * outputs, inputs, half, half)
    four = F.conv2d(x_NCHW, small, bias.repeat_interleave(4), padding=half - 1)
    whole = F.pixel_shuffle(four, 2)
    end = pad + 2 * (side - 1) + kernel - 2 * pad
    return whole[..., pad:end, pad:end]


class ResidualLayer(nn.Module):
    """Two 3x3 convolutions with batch norm; (N, Cin, H, W) -> (N, Cout, H, W).

    Source: facts 3.1.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip: nn.Module = nn.Identity()
        if inputs != outputs:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x_NCHW: Tensor, attended_NCHW: Tensor | None = None) -> Tensor:
        """Skip of ``x_NCHW`` plus residual of what attention made of it, if there was any."""
        inner_NCHW = x_NCHW if attended_NCHW is None else attended_NCHW
        # In place: the norms' outputs are needed by nobody else, and small maps stay in the cache.
        out_NCHW = self.residual(inner_NCHW).add_(self.skip(x_NCHW))
        return F.relu(out_NCHW, inplace=True)


_DEAR = {torch.ops.aten.convolution.default, torch.ops.aten.addmm.default}


def recomputed(
    what: Recompute,
    modules: Sequence[nn.Module],
    run: Callable[..., Tensor],
    *inputs: Tensor,
) -> Tensor:
    """``run(*inputs)``, of which the backward computes a part again instead of keeping it.

    The batch norms of ``modules`` count the batch once, and random numbers are drawn again as they
    were: the result and its gradients are the same to the bit.

    Args:
        what: ``all``: only the inputs are kept; ``cheap``: also what convolutions and linear
            layers gave; ``none``: everything.
        modules: All that ``run`` uses.
        run: Part of a network.
        inputs: What it reads.
    """
    if what == "none" or not torch.is_grad_enabled():
        return run(*inputs)
    norms = [m for one in modules for m in one.modules() if isinstance(m, nn.BatchNorm2d)]

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        if what == "all":
            return nullcontext(), _still(norms)
        forward, again = create_selective_checkpoint_contexts(_keep_what_is_dear)  # type: ignore[no-untyped-call]
        return forward, _both(_still(norms), again)

    out: Tensor = checkpoint(run, *inputs, use_reentrant=False, context_fn=contexts)
    return out


def _keep_what_is_dear(
    _context: Any, operation: Any, *_args: Any, **_kwargs: Any
) -> CheckpointPolicy:
    if operation in _DEAR:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield


@contextmanager
def _still(norms: Sequence[nn.BatchNorm2d]) -> Iterator[None]:
    """Leave the running statistics of these norms as they are."""
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in kept:
            norm.momentum, norm.num_batches_tracked = momentum, count


def residual_stack(inputs: int, outputs: int, layers: int, change_last: bool) -> nn.ModuleList:
    """``layers`` residual layers; the channels change in the first one, or in the last one."""
    widths = [inputs] * layers + [outputs] if change_last else [inputs] + [outputs] * layers
    return nn.ModuleList(ResidualLayer(before, after) for before, after in pairwise(widths))


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of a tensor over all processes that train together; itself where there is one."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    dist.all_reduce(x)
    return x / dist.get_world_size()


def position_code(position: Tensor, width: int) -> Tensor:
    """Sine-cosine code of integer positions, (...) -> (..., width), base 10000.

    Source: ``pos_i`` of Algorithm 1, line 10; base and index as in facts O9.
    """
    half = torch.arange(0, width, 2, device=position.device, dtype=torch.float32)
    angle = position[..., None].float() * torch.exp(half * (-math.log(1e4) / width))
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)[..., :width]


@contextmanager
def evaluation_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put modules, but not their children, into evaluation mode; their own modes come back."""
    modules = [module for module in modules if module.training]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


class HasParameters(Protocol):
    """Anything with parameters."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of them."""
        ...


@contextmanager
def frozen(*modules: HasParameters) -> Iterator[None]:
    """Let gradients flow *through* these modules but not *into* their parameters.

    Used while the actor's imagination is built: the published code computes the world model's
    gradients there and throws them away.
    """
    params = [p for module in modules for p in module.parameters() if p.requires_grad]
    for p in params:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in params:
            p.requires_grad_(True)
