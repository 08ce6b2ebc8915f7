"""The recurrence of the state-space model, with its backward through time written by hand.

Autograd would keep a node for each of thirty small operations of every step and add up every
weight's gradient step by step, reading and writing all weights each time. Here a sequence runs
without autograd, and one node gives it its backward: a step costs about twenty operations, and each
weight's gradient is one product over all steps (docs/performance.md).

Shapes: T steps, B rows, D deter, U hidden, S groups, K classes, X = S*K.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mapo_lightning.models.distributions import draw_one_hot

_aten = torch.ops.aten


class Weights(NamedTuple):
    """What a step multiplies with; matrices and their biases in the dtype of the products."""

    stoch: Tensor  # (U, X) input layer's part for the stochastic state
    gates: Tensor  # (3D, U + D)
    gates_bias: Tensor  # (3D,)
    gamma: Tensor  # (3D,) of the norm over the gates, float32
    beta: Tensor  # (3D,) float32
    deter: Tensor  # (U, D) first layer of prior or posterior, its part for the recurrent state
    logits: Tensor  # (X, U) its second layer
    logits_bias: Tensor  # (X,)


class Step(NamedTuple):
    """One step: where it went, and all that its backward needs."""

    stoch_in: Tensor  # (B, X) what was left of the last sample after forgetting
    deter_in: Tensor  # (B, D) the same of the last recurrent state
    entry: Tensor  # (B, U + D) input of the gates
    gates: Tensor  # (B, 3D) before the norm
    mean: Tensor  # (B, 1) of the norm
    rstd: Tensor  # (B, 1)
    reset: Tensor  # (B, D) gate in (0, 1)
    proposal: Tensor  # (B, D) candidate before the reset gate
    candidate: Tensor  # (B, D) in (-1, 1)
    update: Tensor  # (B, D) gate in (0, 1)
    deter: Tensor  # (B, D)
    hidden: Tensor  # (B, U) of prior or posterior
    probs: Tensor  # (B, S, K)
    logits: Tensor  # (B, X) float32
    stoch: Tensor  # (B, X) one-hot sample


NORM_EPS = 1e-3
_Inner = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def gru(entry: Tensor, deter_in: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, _Inner]:
    """Normed GRU: next state (B, D), and (gates, mean, rstd, reset, proposal, candidate, update).

    Source: facts 2.2. The update gate's bias of -1 makes a fresh cell remember.
    """
    matrix, bias, gamma, beta = weights
    gates = F.linear(entry, matrix, bias).float()
    normed, mean, rstd = torch.native_layer_norm(gates, gates.shape[-1:], gamma, beta, NORM_EPS)
    reset, proposal, update = normed.chunk(3, dim=-1)
    reset, update = torch.sigmoid(reset), torch.sigmoid(update - 1.0)
    candidate = torch.tanh(reset * proposal)
    deter = torch.lerp(deter_in, candidate, update)
    return deter, (gates, mean, rstd, reset, proposal, candidate, update)


def step(
    w: Weights,
    driven_BU: Tensor,
    seen_BU: Tensor,
    stoch_in_BX: Tensor,
    deter_in_BD: Tensor,
    noise_BS: Tensor,
) -> Step:
    """One step without autograd.

    Args:
        w: Weights.
        driven_BU: Input layer's part for the action, bias included.
        seen_BU: First layer's part for what was seen, bias included; the prior's bias alone, (U,).
        stoch_in_BX: Last sample, float32.
        deter_in_BD: Last recurrent state, float32.
        noise_BS: Uniform noise that draws the sample.
    """
    dtype = w.gates.dtype
    x_BU = F.elu(torch.addmm(driven_BU, stoch_in_BX.to(dtype), w.stoch.t()))
    entry = torch.cat([x_BU, deter_in_BD.to(dtype)], dim=1)
    deter_BD, inner = gru(entry, deter_in_BD, w[1:5])
    hidden_BU = F.elu(torch.addmm(seen_BU, deter_BD.to(dtype), w.deter.t()))
    logits_BX = F.linear(hidden_BU, w.logits, w.logits_bias).float()
    probs_BSK = logits_BX.view(*noise_BS.shape, -1).softmax(dim=-1)
    stoch_BX = draw_one_hot(probs_BSK, noise_BS).flatten(1)
    return Step(
        stoch_in_BX, deter_in_BD, entry, *inner, deter_BD, hidden_BU, probs_BSK, logits_BX, stoch_BX
    )


class _Gradients(NamedTuple):
    """Gradients of one step, each with respect to what its name says."""

    driven: Tensor  # (B, U)
    seen: Tensor  # (B, U)
    normed: Tensor  # (B, 3D) output of the norm
    gates: Tensor  # (B, 3D)
    logits: Tensor  # (B, X)
    stoch_in: Tensor  # (B, X)
    deter_in: Tensor  # (B, D)


def _step_backward(
    w: Weights, s: Step, deter_BD: Tensor, stoch_BX: Tensor, logits_BX: Tensor | None
) -> _Gradients:
    """Gradients of a step from those of its recurrent state, its sample and its logits."""
    dtype = w.gates.dtype
    # Straight-through: the sample's gradient is that of the probabilities.
    pulled = torch._softmax_backward_data(stoch_BX.view_as(s.probs), s.probs, -1, torch.float32)
    g_logits = pulled.view_as(s.logits)
    if logits_BX is not None:
        g_logits = g_logits + logits_BX
    g_logits = g_logits.to(dtype)
    g_seen = _aten.elu_backward(g_logits @ w.logits, 1.0, 1.0, 1.0, True, s.hidden)
    g_deter = deter_BD + g_seen @ w.deter
    kept = g_deter * s.update
    g_update = _aten.sigmoid_backward(g_deter * (s.candidate - s.deter_in), s.update)
    g_inner = _aten.tanh_backward(kept, s.candidate)
    g_reset = _aten.sigmoid_backward(g_inner * s.proposal, s.reset)
    g_normed = torch.cat([g_reset, g_inner * s.reset, g_update], dim=1)
    g_gates, _, _ = _aten.native_layer_norm_backward(
        g_normed, s.gates, s.gates.shape[-1:], s.mean, s.rstd, w.gamma, w.beta, [True, False, False]
    )
    g_gates = g_gates.to(dtype)
    g_entry = g_gates @ w.gates
    units = w.stoch.shape[0]
    g_driven = _aten.elu_backward(g_entry[:, :units], 1.0, 1.0, 1.0, True, s.entry[:, :units])
    g_deter_in = g_deter - kept + g_entry[:, units:]
    g_stoch_in = (g_driven @ w.stoch).float()
    return _Gradients(g_driven, g_seen, g_normed, g_gates, g_logits, g_stoch_in, g_deter_in)


class _Unrolled(torch.autograd.Function):
    """Gives steps that were taken without autograd their place in the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        steps: Sequence[Step],
        axis: int,
        keep: Tensor | None,
        driven: Tensor,
        seen: Tensor,
        stoch: Tensor,
        deter: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.axis, ctx.count, ctx.shared_seen = axis, len(steps), seen.ndim == 1
        ctx.save_for_backward(keep, *weights, *(x for one in steps for x in one))
        parts = ([one.deter for one in steps], [one.stoch for one in steps])
        return *(torch.stack(x, axis) for x in parts), torch.stack([s.logits for s in steps], axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        keep, *rest = ctx.saved_tensors
        w = Weights(*rest[: len(Weights._fields)])
        tensors, width = rest[len(Weights._fields) :], len(Step._fields)
        steps = [Step(*tensors[i * width : (i + 1) * width]) for i in range(ctx.count)]
        keeps = (None,) * ctx.count if keep is None else keep.unbind(ctx.axis)
        given = [(None,) * ctx.count if g is None else g.unbind(ctx.axis) for g in grads]
        carried_h = torch.zeros_like(steps[0].deter)
        carried_z = torch.zeros_like(steps[0].stoch)
        found: list[_Gradients] = []
        for one, keep_B1, g_deter, g_stoch, g_logits in reversed(
            list(zip(steps, keeps, *given, strict=True))
        ):
            g_deter = carried_h if g_deter is None else g_deter + carried_h
            g_stoch = carried_z if g_stoch is None else g_stoch + carried_z
            gone = _step_backward(w, one, g_deter, g_stoch, g_logits)
            carried_h, carried_z = gone.deter_in, gone.stoch_in
            if keep_B1 is not None:
                carried_h, carried_z = carried_h * keep_B1, carried_z * keep_B1
            found.append(gone)
        found.reverse()
        g_driven = torch.stack([g.driven for g in found], ctx.axis)
        g_seen: Tensor | None = None
        g_weights: tuple[Tensor | None, ...] = (None,) * len(w)
        if any(ctx.needs_input_grad[-len(w) :]):
            g_weights = _weight_gradients(w, steps, found)
        if ctx.needs_input_grad[4]:
            g_seen = torch.stack([g.seen for g in found], ctx.axis)
            g_seen = g_seen.flatten(0, 1).sum(0) if ctx.shared_seen else g_seen
        return None, None, None, g_driven, g_seen, carried_z, carried_h, *g_weights


def _weight_gradients(
    w: Weights, steps: Sequence[Step], found: Sequence[_Gradients]
) -> tuple[Tensor, ...]:
    """One product over all steps for each weight."""
    dtype = w.gates.dtype

    def of_steps(name: str) -> Tensor:
        return torch.cat([getattr(one, name) for one in steps])

    def of_gradients(name: str) -> Tensor:
        return torch.cat([getattr(one, name) for one in found])

    gates, logits = of_gradients("gates"), of_gradients("logits")
    _, gamma, beta = _aten.native_layer_norm_backward(
        of_gradients("normed"),
        of_steps("gates"),
        w.gamma.shape,
        of_steps("mean"),
        of_steps("rstd"),
        w.gamma,
        w.beta,
        [False, True, True],
    )
    return (
        of_gradients("driven").t() @ of_steps("stoch_in").to(dtype),
        gates.t() @ of_steps("entry"),
        gates.sum(0),
        gamma,
        beta,
        of_gradients("seen").t() @ of_steps("deter").to(dtype),
        logits.t() @ of_steps("hidden"),
        logits.sum(0),
    )


def unrolled(
    steps: Sequence[Step],
    axis: int,
    keep: Tensor | None,
    driven: Tensor,
    seen: Tensor,
    start: tuple[Tensor, Tensor],
    weights: Weights,
) -> tuple[Tensor, Tensor, Tensor]:
    """Recurrent states, samples and logits of ``steps`` with their gradients.

    Args:
        steps: What was taken without autograd from the same tensors.
        axis: Where the steps' axis goes in ``keep``, ``driven``, ``seen`` and the results: 0 or 1.
        keep: What each step left of the state before it, (..., 1); None: everything.
        driven: What drove each step, (T, B, U) or (B, T, U).
        seen: What each step saw, same shape; or the prior's bias, (U,).
        start: Sample (B, X) and recurrent state (B, D) before the first step.
        weights: Weights of every step; gradients reach those that require them.
    """
    out: tuple[Tensor, Tensor, Tensor] = _Unrolled.apply(  # type: ignore[no-untyped-call]
        steps, axis, keep, driven, seen, *start, *weights
    )
    return out
