"""What a sequence that was computed without autograd leaves behind for its backward.

Shapes: T steps, B rows, D deter, U hidden, S groups, K classes, X = S*K, F = X + D. The lead axes
"..." of a whole sequence are (T, B) or (B, T).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Weights(NamedTuple):
    """What a step multiplies with; matrices and their biases in the dtype of the products."""

    stoch: Tensor  # (U, X) input layer's part for the stochastic state
    gates: Tensor  # (3D, D + U) for recurrent state and input layer, in this order
    gates_bias: Tensor  # (3D,)
    gamma: Tensor  # (3D,) of the norm over the gates, float32
    beta: Tensor  # (3D,) float32
    deter: Tensor  # (U, D) first layer of prior or posterior, its part for the recurrent state
    logits: Tensor  # (X, U) its second layer
    logits_bias: Tensor  # (X,)


class Saved(NamedTuple):
    """What the backward of one step needs beside the rows that the sequence keeps."""

    gates: Tensor  # (B, 3D) before the norm
    mean: Tensor  # (B, 1) of the norm
    rstd: Tensor  # (B, 1)
    normed: Tensor  # (B, 3D)
    opened: Tensor  # (B, 3D) sigmoid of `normed`: reset gate, nothing of use, update gate
    candidate: Tensor  # (B, D) in (-1, 1)
    hidden: Tensor  # (B, U) of prior or posterior
    probs: Tensor  # (B, S, K)


class Tape(NamedTuple):
    """A whole sequence, after its forward."""

    axis: int  # where the steps' axis lies: 0 or 1
    keep: Tensor | None  # what each step leaves of the state before it, (..., 1)
    before: Tensor  # (..., F) state before each step
    entry: Tensor  # (..., F + U) the same beside the input layer, in the dtype of the products
    after: Tensor  # (..., F) state after each step
    states: Tensor  # `after`, or in a dream the start and `after`
    steps: list[Saved]
    logits: list[Tensor]  # (B, X) float32 of each step; empty without ``keep``
    unimix: float  # share of the uniform distribution in what was drawn from
