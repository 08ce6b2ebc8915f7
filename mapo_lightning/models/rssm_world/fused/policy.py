"""A policy in a fused dream: asked step by step without autograd, differentiated in one go.

Shapes: I imagined steps, B rows, F feat, A action.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mapo_lightning.models.interfaces import DreamPolicy


@runtime_checkable
class NetworkPolicy(Protocol):
    """A policy that is one multi-layer perceptron and a differentiable draw from its output."""

    network: nn.Sequential
    """An `mlp` from features to the raw output that ``sample`` reads."""

    def __call__(self, feat: Tensor) -> Tensor:
        """Action (B, A) of the next step, in plain autograd."""
        ...

    def sample(self, raw: Tensor, step: int) -> Tensor:
        """Action (B, A) of one step."""
        ...

    def sample_all(self, raw: Tensor) -> Tensor:
        """Actions (I, B, A) of all steps from raw outputs with their graph, (I, B, ...)."""
        ...


class RecordedNetwork(Protocol):
    """A network on its way through a dream."""

    def __call__(self, x_BF: Tensor) -> Tensor:
        """Output (B, outputs) of one step, without autograd."""
        ...

    def outputs(self) -> Tensor:
        """Outputs of all steps in a graph, (I, B, outputs)."""
        ...


def remembered(policy: DreamPolicy, actions: list[Tensor]) -> DreamPolicy:
    """The same policy, which also writes its actions of each step down, without their graph."""
    kind = _RememberedNetwork if isinstance(policy, NetworkPolicy) else _Remembered
    return kind(policy, actions)


class _Remembered:
    """A policy, and what it did."""

    def __init__(self, policy: Any, actions: list[Tensor]) -> None:
        self.policy, self.actions = policy, actions

    def __call__(self, feat: Tensor) -> Tensor:
        """Action (B, A) of the next step."""
        return self._noted(self.policy(feat))

    def _noted(self, action: Tensor) -> Tensor:
        self.actions.append(action.detach())
        return action


class _RememberedNetwork(_Remembered):
    """The same for a `NetworkPolicy`."""

    @property
    def network(self) -> nn.Sequential:
        """As of the policy."""
        network: nn.Sequential = self.policy.network
        return network

    def sample(self, raw: Tensor, step: int) -> Tensor:
        """Action (B, A) of one step."""
        return self._noted(self.policy.sample(raw, step))

    def sample_all(self, raw: Tensor) -> Tensor:
        """Actions (I, B, A) of all steps, which are known by now."""
        actions: Tensor = self.policy.sample_all(raw)
        return actions


def recorded(network: nn.Sequential) -> RecordedNetwork:
    """The cheapest way to run ``network`` step by step and to differentiate all steps together."""
    plain = all(isinstance(layer, nn.Linear | nn.ELU) for layer in network)
    return RecordedMLP(network) if plain else RunAgain(network)


class RunAgain:
    """Runs any network step after step, and once more over all steps for their graph."""

    def __init__(self, network: nn.Sequential) -> None:
        self.network = network
        self.inputs: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, x_BF: Tensor) -> Tensor:
        """Output (B, outputs) of one step."""
        self.inputs.append(x_BF)
        out: Tensor = self.network(x_BF)
        return out

    def outputs(self) -> Tensor:
        """Outputs of all steps in a graph, (I, B, outputs)."""
        out: Tensor = self.network(torch.stack(self.inputs))
        return out


class RecordedMLP:
    """Runs an `mlp` step after step without autograd, and gives all steps one backward together.

    Step by step, autograd would add up every weight's gradient once per step. Inputs are data: no
    gradient reaches them.
    """

    def __init__(self, network: nn.Sequential) -> None:
        self.layers = [layer for layer in network if isinstance(layer, nn.Linear)]
        # Under autocast once for all steps: Lightning keeps no cast weights from call to call.
        with torch.no_grad():
            self.cast = [
                (x.weight.to(product_dtype(x.weight)), x.bias.to(product_dtype(x.bias)))
                for x in self.layers
            ]
        self.values: list[list[Tensor]] = []  # step -> input of every layer, and the output

    @torch.no_grad()
    def __call__(self, x_BF: Tensor) -> Tensor:
        """Output (B, outputs) of one step."""
        values: list[Tensor] = []
        for i, (weight, bias) in enumerate(self.cast):
            values.append(F.elu(x_BF) if i else x_BF)
            x_BF = F.linear(values[-1], weight, bias)
        self.values.append([*values, x_BF])
        return x_BF

    def outputs(self) -> Tensor:
        """Outputs of all steps in a graph, (I, B, outputs)."""
        values = [torch.stack(parts) for parts in zip(*self.values, strict=True)]
        weights = [p for layer in self.layers for p in (layer.weight, layer.bias)]
        out: Tensor = _RecordedFunction.apply(values, *weights)  # type: ignore[no-untyped-call]
        return out


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast gives to products with ``x``; its own where autocast is off."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


class _RecordedFunction(torch.autograd.Function):
    """Gradients of a recorded network's weights: one product per layer."""

    @staticmethod
    def forward(ctx: Any, values: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.save_for_backward(*values[:-1], *weights[::2])
        return values[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        half = len(ctx.saved_tensors) // 2
        values, weights = ctx.saved_tensors[:half], ctx.saved_tensors[half:]
        grad = grads[0].flatten(0, -2)
        found: list[Tensor] = []
        for i in reversed(range(half)):
            value = values[i].flatten(0, -2).to(grad.dtype)
            found = [grad.t() @ value, grad.sum(0), *found]
            if i:
                grad = grad @ weights[i].to(grad.dtype)
                grad = torch.ops.aten.elu_backward(grad, 1.0, 1.0, 1.0, True, value)
        return None, *found
