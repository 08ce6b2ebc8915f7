"""Backward through time of the state-space model, written by hand.

Autograd would keep a node for each of thirty small operations of every step and add up every
weight's gradient step by step, reading and writing all weights each time. Here a step costs eleven
operations in a dream and twelve in a scan (float32): the factors that do not depend on the gradient
are computed for all steps at once, and each weight's gradient is one product over all steps
(docs/performance.md).

Shapes as in `tape`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mapo_lightning.models.rssm_world.fused.tape import Saved, Tape, Weights

_aten = torch.ops.aten


class ScanFunction(torch.autograd.Function):
    """Gives a sequence that was computed without autograd its place in the graph."""

    @staticmethod
    def forward(
        ctx: Any, tape: Tape, driven: Tensor, seen: Tensor, start: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """See `Scan.with_gradients`."""
        ctx.set_materialize_grads(False)
        ctx.axis, ctx.shared_seen = tape.axis, seen.ndim == 1
        ctx.from_sample = 1.0 - tape.unimix
        rows = tape.keep, tape.before, tape.entry, tape.after
        ctx.save_for_backward(*rows, *weights, *(x for one in tape.steps for x in one))
        states = tape.states.view_as(tape.states)  # another object, or it would hold itself
        if tape.keep is None:
            return states, None
        return states, torch.stack(tape.logits, tape.axis)

    @staticmethod
    def backward(ctx: Any, states: Tensor | None, logits: Tensor | None) -> tuple[Any, ...]:
        """From the gradients of states and logits."""
        rows, rest = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        w, tensors = Weights(*rest[: len(Weights._fields)]), rest[len(Weights._fields) :]
        width = len(Saved._fields)
        steps = [Saved(*tensors[i : i + width]) for i in range(0, len(tensors), width)]
        _, _, wants_seen, wants_start, *wants_weights = ctx.needs_input_grad
        back = Backward(ctx.axis, w, steps, ctx.from_sample, *rows)
        start = back.run(states, logits, wants_start)
        seen = back.stacked([g.seen for g in back.found]) if wants_seen else None
        if seen is not None and ctx.shared_seen:
            seen = seen.flatten(0, 1).sum(0)
        weights = back.weights() if any(wants_weights) else (None,) * len(w)
        return None, back.driven, seen, start, *weights


class _Gradients(NamedTuple):
    """Gradients of one step, each with respect to what its name says."""

    seen: Tensor  # (B, U)
    normed: Tensor  # (B, 3D)
    gates: Tensor  # (B, 3D)
    logits: Tensor  # (B, X) through the sample


class Backward:
    """Goes back through one sequence."""

    def __init__(
        self,
        axis: int,
        w: Weights,
        steps: Sequence[Saved],
        from_sample: float,
        keep: Tensor | None,
        before: Tensor,
        entry: Tensor,
        after: Tensor,
    ) -> None:
        self.axis, self.w, self.steps = axis, w, steps
        self.keep, self.before, self.entry, self.after = keep, before, entry, after
        self.from_sample = from_sample  # the uniform part of a mixture has no gradient
        self.units, self.flat = w.stoch.shape
        self.driven = w.stoch.new_empty((*before.shape[:2], self.units))
        self.found: list[_Gradients] = []
        self.from_logits: Tensor | None = None

    def run(self, states: Tensor | None, logits: Tensor | None, wants_start: bool) -> Tensor | None:
        """Visit all steps, last one first; returns the start's gradient (B, F) if it is wanted."""
        count, axis, w = len(self.steps), self.axis, self.w
        outer: list[Tensor | None] = [None] * (count + 1)  # gradients given to the state before t
        if states is not None:
            outer[int(self.keep is not None) :] = states.unbind(axis)
        hidden: Sequence[Tensor | None] = [None] * count
        if logits is not None:
            self.from_logits = logits.to(w.logits.dtype)
            hidden = (self.from_logits @ w.logits).unbind(axis)
        factor, retained = self._factors()
        carried = outer[count]
        if carried is None:
            carried = torch.zeros_like(self.before.select(axis, 0))
        g_stoch, g_deter = carried[:, : self.flat], carried[:, self.flat :]
        for t in reversed(range(count)):
            one, entry = self.steps[t], self.entry.select(axis, t)
            # Straight-through: the sample's gradient is that of the probabilities.
            g_probs = g_stoch.view(one.probs.shape)
            pulled = torch._softmax_backward_data(g_probs, one.probs, -1, torch.float32)
            if self.from_sample != 1.0:
                pulled = pulled * self.from_sample
            g_logits = pulled.flatten(1).to(w.logits.dtype)
            g_hidden = _plus_product(hidden[t], g_logits, w.logits)
            g_seen = _elu_backward(g_hidden, one.hidden)
            g_deter = _plus_product(g_deter, g_seen, w.deter)
            g_normed = (g_deter[:, None] * factor.select(axis, t)).flatten(1)
            g_gates, _, _ = _aten.native_layer_norm_backward(
                g_normed, one.gates, w.gamma.shape, one.mean, one.rstd, w.gamma, w.beta,
                [True, False, False],
            )  # fmt: skip
            g_gates = g_gates.to(w.gates.dtype)
            self.found.append(_Gradients(g_seen, g_normed, g_gates, g_logits))
            g_entry, g_driven = g_gates @ w.gates, self.driven.select(axis, t)
            _elu_backward(g_entry[:, -self.units :], entry[:, -self.units :], out=g_driven)
            if t or wants_start:
                g_deter = torch.addcmul(
                    g_entry[:, : -self.units], g_deter, retained.select(axis, t)
                )
                g_stoch, g_deter = self._onto_previous(t, outer[t], g_driven, g_deter)
        self.found.reverse()
        return torch.cat([g_stoch, g_deter], dim=1) if wants_start else None

    def _factors(self) -> tuple[Tensor, Tensor]:
        """What a state's gradient is multiplied with.

        (..., 3, D) to reach the norm's output, in the gates' order, and (..., D) to reach the state
        before.
        """
        reset, update = (
            self.stacked([one.opened.chunk(3, dim=1)[i] for one in self.steps]) for i in (0, 2)
        )
        proposal = self.stacked([one.normed.chunk(3, dim=1)[1] for one in self.steps])
        candidate = self.stacked([one.candidate for one in self.steps])
        retained = 1.0 - update
        factor = reset.new_empty((*reset.shape[:2], 3, reset.shape[2]))
        to_reset, to_proposal, to_update = factor.unbind(-2)
        slope = torch.addcmul(update, update * candidate, candidate, value=-1.0)
        torch.mul(slope, reset, out=to_proposal)
        closed = torch.addcmul(proposal, proposal, reset, value=-1.0)
        torch.mul(to_proposal, closed, out=to_reset)
        torch.mul(candidate - self.before[..., self.flat :], update * retained, out=to_update)
        return factor, retained

    def _onto_previous(
        self, t: int, outer: Tensor | None, g_driven: Tensor, g_deter: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of sample and recurrent state after step t - 1, with those given to them."""
        if self.keep is None:
            if outer is None:
                return (g_driven @ self.w.stoch).float(), g_deter
            g_stoch = _plus_product(outer[:, : self.flat], g_driven, self.w.stoch)
            return g_stoch, g_deter + outer[:, self.flat :]
        kept, g_stoch = self.keep.select(self.axis, t), g_driven @ self.w.stoch
        if outer is None:
            return g_stoch * kept, g_deter * kept
        return (
            torch.addcmul(outer[:, : self.flat], g_stoch, kept),
            torch.addcmul(outer[:, self.flat :], g_deter, kept),
        )

    def stacked(self, parts: Sequence[Tensor]) -> Tensor:
        """Parts (B, ...) of all steps as one sequence."""
        return torch.stack(list(parts), self.axis)

    def weights(self) -> tuple[Tensor, ...]:
        """One product over all steps for each weight."""
        w, axis = self.w, self.axis
        seen, normed, gates, logits = (
            self.stacked(parts) for parts in zip(*self.found, strict=True)
        )
        if self.from_logits is not None:
            logits = logits + self.from_logits
        seen, gates, logits = (x.flatten(0, 1) for x in (seen, gates, logits))
        before, mean, rstd, hidden = (
            torch.stack([getattr(one, name) for one in self.steps], axis).flatten(0, 1)
            for name in ("gates", "mean", "rstd", "hidden")
        )
        _, gamma, beta = _aten.native_layer_norm_backward(
            normed.flatten(0, 1), before, w.gamma.shape, mean, rstd, w.gamma, w.beta,
            [False, True, True],
        )  # fmt: skip
        entry, deter = self.entry.flatten(0, 1), self.after[..., self.flat :].flatten(0, 1)
        return (
            self.driven.flatten(0, 1).t() @ entry[:, : self.flat],
            gates.t() @ entry[:, self.flat :],
            gates.sum(0),
            gamma,
            beta,
            seen.t() @ deter.to(seen.dtype),
            logits.t() @ hidden,
            logits.sum(0),
        )


def _plus_product(base: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """``base + a @ b``; a base in float32 stays so under products in bfloat16."""
    if base is None:
        return a @ b
    return torch.addmm(base, a, b) if base.dtype == a.dtype else base + a @ b


def _elu_backward(grad: Tensor, result: Tensor, out: Tensor | None = None) -> Tensor:
    if out is None:
        out = torch.empty_like(result)
    _aten.elu_backward.grad_input(grad, 1.0, 1.0, 1.0, True, result, grad_input=out)
    return out
