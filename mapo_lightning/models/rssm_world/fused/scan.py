"""The recurrence of the state-space model: a sequence runs without autograd, step by step.

A step costs sixteen operations and writes where the next step and the caller read. One node of the
graph, in `backward`, then gives the whole sequence its backward.

Shapes as in `tape`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mapo_lightning.models.distributions import draw_class
from mapo_lightning.models.rssm_world.fused.backward import ScanFunction
from mapo_lightning.models.rssm_world.fused.tape import Saved, Tape, Weights
from mapo_lightning.models.rssm_world.rssm import NORM_EPS

_aten = torch.ops.aten


def gru(
    gates_BG: Tensor, deter_in_BD: Tensor, norm: tuple[Tensor, Tensor], out: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Normed GRU from its gates on: next state (B, D), and (mean, rstd, normed, opened, candidate).

    The norm's offset holds the update gate's -1, see `update_bias`. Source: facts 2.2.
    """
    normed, mean, rstd = torch.native_layer_norm(gates_BG, gates_BG.shape[-1:], *norm, NORM_EPS)
    # One call for both gates; that of the proposal's part is not used.
    opened = torch.sigmoid(normed)
    reset, _, update = opened.chunk(3, dim=-1)
    candidate = torch.tanh(reset * normed.chunk(3, dim=-1)[1])
    deter = torch.lerp(deter_in_BD, candidate, update, out=out)
    return deter, (mean, rstd, normed, opened, candidate)


class Scan:
    """A sequence, computed step by step without autograd; then its states with their gradients.

    A state is a row (B, F), stochastic part first, float32. Rows lie side by side with what the
    gates read, so that a step writes its result where the next one multiplies it.

    Args:
        weights: Weights of every step.
        groups: (S, K).
        start_BF: State before the first step.
        count: Number T of steps.
        axis: Where the steps' axis goes in all inputs and results: 0 or 1.
        keep: What each step leaves of the state before it, (..., 1); None: everything.
        unimix: Share of the uniform distribution in what samples are drawn from.

    Attributes:
        states: States (..., F); without ``keep`` T + 1 of them, the start first.
        steps: What the backward needs of the steps taken so far.
        logits: What their samples were drawn from, (B, X) float32; empty without ``keep``.
    """

    def __init__(
        self,
        weights: Weights,
        groups: tuple[int, int],
        start_BF: Tensor,
        count: int,
        axis: int,
        keep: Tensor | None = None,
        unimix: float = 0.0,
    ) -> None:
        self.unimix = unimix
        self.weights, self.groups, self.start = weights, groups, start_BF
        self.axis, self.keep = axis, keep
        self.steps, self.logits = list[Saved](), list[Tensor]()
        self.classes = torch.arange(groups[1], device=start_BF.device)
        (batch, feat), units, dtype = start_BF.shape, *weights.stoch.shape[:1], weights.gates.dtype
        self.cast = dtype != start_BF.dtype  # bfloat16 products read rows of their own

        def rows(count: int, width: int, dtype: torch.dtype = start_BF.dtype) -> Tensor:
            lead = (batch, count) if axis else (count, batch)
            return start_BF.new_empty((*lead, width), dtype=dtype)

        wide = feat if self.cast else feat + units
        if keep is None:
            held = rows(count + 1, wide)
            self.states = held[..., :feat]
            self.states.select(axis, 0).copy_(start_BF)
            self.after = self.states.narrow(axis, 1, count)
        else:
            held = rows(count, wide)
            self.states = self.after = rows(count, feat)
        self.before = held.narrow(axis, 0, count)[..., :feat]
        self.entry = held.narrow(axis, 0, count)
        if self.cast:
            self.entry = rows(count, feat + units, dtype)

    @torch.no_grad()
    def step(self, driven_BU: Tensor, seen_BU: Tensor, noise_BS: Tensor) -> None:
        """Take one step.

        Args:
            driven_BU: Input layer's part for the action, bias included.
            seen_BU: First layer's part for what was seen, bias included; or a bias alone, (U,).
            noise_BS: Uniform noise that draws the sample; contiguous.
        """
        w, t = self.weights, len(self.steps)
        flat, feat = w.stoch.shape[1], self.before.shape[-1]
        before_BF, entry, after_BF = (
            x.select(self.axis, t) for x in (self.before, self.entry, self.after)
        )
        if self.keep is not None:
            last_BF = self.after.select(self.axis, t - 1) if t else self.start
            torch.mul(last_BF, self.keep.select(self.axis, t), out=before_BF)
        if self.cast:
            entry[:, :feat].copy_(before_BF)
        x_BU = torch.addmm(driven_BU, entry[:, :flat], w.stoch.t())
        _aten.elu.out(x_BU, out=entry[:, feat:])
        gates_BG = torch.addmm(w.gates_bias, entry[:, flat:], w.gates.t()).float()
        norm, deter_BD = (w.gamma, w.beta), after_BF[:, flat:]
        _, inner = gru(gates_BG, before_BF[:, flat:], norm, out=deter_BD)
        hidden_BU = F.elu(torch.addmm(seen_BU, deter_BD.to(w.deter.dtype), w.deter.t()))
        logits_BX = torch.addmm(w.logits_bias, hidden_BU, w.logits.t()).float()
        probs_BSK = logits_BX.view(-1, *self.groups).softmax(dim=-1)
        stoch_BSK = after_BF[:, :flat].view(-1, *self.groups)
        drawn_BSK = probs_BSK
        if self.unimix:
            drawn_BSK = probs_BSK * (1.0 - self.unimix) + self.unimix / self.groups[1]
        torch.eq(draw_class(drawn_BSK, noise_BS), self.classes, out=stoch_BSK)
        self.steps.append(Saved(gates_BG, *inner, hidden_BU, probs_BSK))
        if self.keep is not None:
            self.logits.append(logits_BX)

    def with_gradients(
        self, driven: Tensor, seen: Tensor, start_BF: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """States and logits of the steps, with the gradients that reach these inputs.

        Args:
            driven: What drove each step, (..., U).
            seen: What each step saw, (..., U); or the prior's bias, (U,).
            start_BF: State before the first step.

        Returns:
            ``states``, and the logits (..., X); None without ``keep``: a dream's are not used.
        """
        if not torch.is_grad_enabled():  # acting, which takes one step at a time
            return self.states, torch.stack(self.logits, self.axis) if self.logits else None
        rows = self.before, self.entry, self.after, self.states
        tape = Tape(self.axis, self.keep, *rows, self.steps, self.logits, self.unimix)
        out: tuple[Tensor, Tensor | None] = ScanFunction.apply(  # type: ignore[no-untyped-call]
            tape, driven, seen, start_BF, *self.weights
        )
        return out
