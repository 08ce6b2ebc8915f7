"""Causal self-attention over the steps of a sequence, in one pass or one step after another.

One token stands for one step. Norms are before the layers, and positions are rotations of queries
and keys (RoPE, arXiv:2104.09864): what a query finds depends on distances only, so that an episode
may begin anywhere, and a window may slide.

Shapes: B batch, T time, L tokens that may be looked at, P of them from before, G heads, C width of
a head, X = G*C width of a token, J layers; M sequences that are remembered, R rows of each, N = M*R
rows of a dream, I tokens that a row has dreamt.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mapo_lightning.models.rssm_world.settings import LatentTransformerConfig

_ROTARY_BASE = 10_000.0


class Memory(NamedTuple):
    """What states can look back at: keys and values of whole sequences, each kept once.

    States with axes (B, T) share the tokens of their B sequences and differ in the stretch of them
    that they may look at. So a dream from each of these states costs no copy of the past. Rows of
    the same sequence stand together and are equally many for each, which `flatten` and `repeat`
    keep true.
    """

    tokens: Tensor  # (M, L, J, 2, X) keys, not yet turned, and values
    begin: Tensor  # (...) int64: first token of the state's episode
    end: Tensor  # (...) int64: the token after the state's own

    def at(self, t: int) -> Memory:
        """Of the states at one time: axes (B, T) -> (B,)."""
        return self._replace(begin=self.begin[:, t], end=self.end[:, t])

    def until(self, end: int) -> Memory:
        """Of the states before time ``end``: axes (B, T) -> (B, end)."""
        return self._replace(begin=self.begin[:, :end], end=self.end[:, :end])

    def flatten(self) -> Memory:
        """Merge batch and time: axes (B, T) -> (B*T,)."""
        return self._replace(begin=self.begin.flatten(0, 1), end=self.end.flatten(0, 1))

    def repeat(self, times: int) -> Memory:
        """Every row ``times`` times: axes (B,) -> (B*times,)."""
        return self._replace(
            begin=self.begin.repeat_interleave(times, dim=0),
            end=self.end.repeat_interleave(times, dim=0),
        )

    def detach(self) -> Memory:
        """The same values without their graph."""
        return self._replace(tokens=self.tokens.detach())

    def last(self, count: int) -> tuple[Tensor, Tensor]:
        """The newest tokens of every row, axes (N,), as sequences of their own.

        Args:
            count: How many at most; there are fewer where the sequences are shorter.

        Returns:
            Tokens (N, P, J, 2, X), of which those before the row's first one are of no meaning, and
            where in them the row's episode begins, (N,).
        """
        sequences, length = self.tokens.shape[:2]
        rows, kept = len(self.end), min(count, length)
        device = self.end.device
        place = (self.end - kept)[:, None] + torch.arange(kept, device=device)
        sequence = torch.arange(rows, device=device) // (rows // sequences)
        tokens = self.tokens[sequence[:, None], place.clamp(min=0)]
        return tokens, (self.begin - self.end + kept).clamp(min=0)


class Block(nn.Module):
    """One layer: attention, whose looking around is left to the caller, then a perceptron."""

    def __init__(self, cfg: LatentTransformerConfig) -> None:
        super().__init__()
        width = cfg.width
        self.norm_attention = nn.LayerNorm(width)
        self.ask = nn.Linear(width, 3 * width)
        self.answer = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(cfg.dropout)

    def asked(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of tokens (..., X)."""
        query, key, value = self.ask(self.norm_attention(x)).chunk(3, dim=-1)
        return query, key, value

    def forward(self, x: Tensor, found: Tensor) -> Tensor:
        """Next layer's tokens (..., X), from these and what each of them has found."""
        x = x + self.dropout(self.answer(found))
        out: Tensor = x + self.dropout(self.mlp(self.norm_mlp(x)))
        return out


class Attention(nn.Module):
    """All layers, over a whole sequence at once; `Recall` has them step by step.

    Args:
        cfg: Sizes.
    """

    def __init__(self, cfg: LatentTransformerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.norm = nn.LayerNorm(cfg.width)

    @property
    def stack(self) -> list[Block]:
        """The layers, the first one first."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def forward(self, x_BTX: Tensor, past_BPJ2X: Tensor, begin_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Let every token look at itself and those before it.

        Args:
            x_BTX: Tokens.
            past_BPJ2X: Keys and values of tokens before them.
            begin_BT: First token that each may look at, counted from the first one of the past.

        Returns:
            What they become (B, T, X), and their keys and values (B, T, J, 2, X).
        """
        past, steps = past_BPJ2X.shape[1], x_BTX.shape[1]
        place_L = torch.arange(past + steps, device=x_BTX.device)
        own_T1 = place_L[past:, None]
        near_TL = (place_L <= own_T1) & (place_L > own_T1 - self.cfg.window)
        seen_BTL = near_TL & (place_L >= begin_BT[..., None])
        turn_LC = turns(place_L, self.cfg, x_BTX.dtype)
        fresh: list[Tensor] = []
        for j, block in enumerate(self.stack):
            query, key, value = block.asked(x_BTX)
            fresh.append(torch.stack([key, value], dim=2))
            before = past_BPJ2X[:, :, j].to(key.dtype)
            keys = self.split(torch.cat([before[:, :, 0], key], dim=1))
            values = self.split(torch.cat([before[:, :, 1], value], dim=1))
            found_BGTC = F.scaled_dot_product_attention(
                turned(self.split(query), turn_LC[:, past:]).transpose(1, 2),
                turned(keys, turn_LC).transpose(1, 2),
                values.transpose(1, 2),
                attn_mask=seen_BTL[:, None],
                dropout_p=block.dropout.p if block.dropout.training else 0.0,
            )
            x_BTX = block(x_BTX, found_BGTC.transpose(1, 2).flatten(2))
        return self.norm(x_BTX), torch.stack(fresh, dim=2)

    def split(self, x: Tensor) -> Tensor:
        """Tokens (..., X) -> (..., G, C)."""
        return torch.unflatten(x, -1, (self.cfg.heads, -1))


class Recall:
    """The same attention for tokens that come one by one, after those of a memory.

    What the rows of one sequence look at in common is kept and read once for all of them; only what
    a row has dreamt itself is its own.

    Args:
        attention: Layers.
        memory: Of the rows' states, axes (N,).
        steps: How many tokens will come.
    """

    def __init__(self, attention: Attention, memory: Memory, steps: int) -> None:
        self.attention, self.window = attention, attention.cfg.window
        sequences, length = memory.tokens.shape[:2]
        device = memory.end.device
        self.shape = sequences, len(memory.end) // sequences  # M, and rows of each
        place_L = torch.arange(length + steps, device=device)
        known_NL = place_L[:length] < memory.end[:, None]
        known_NL &= place_L[:length] >= memory.begin[:, None]
        self.known_NL, self.end_N = known_NL, memory.end
        self.lag_NL = memory.end[:, None] - place_L[:length]  # of what comes next
        self.turn_LC = turns(place_L, attention.cfg, memory.tokens.dtype)
        self.keys_MGCL: list[Tensor] = []
        self.values_MGLC: list[Tensor] = []
        for key_value in memory.tokens.unbind(2):
            key, value = (attention.split(x) for x in key_value.unbind(2))
            self.keys_MGCL.append(turned(key, self.turn_LC[:, :length]).permute(0, 2, 3, 1))
            self.values_MGLC.append(value.transpose(1, 2))
        self.own: list[list[tuple[Tensor, Tensor]]] = [[] for _ in attention.blocks]
        self.taken = 0

    def step(self, x_NX: Tensor) -> Tensor:
        """What the next token of every row becomes, (N, X)."""
        near_NL = self.known_NL & (self.lag_NL + self.taken < self.window)
        seen_M1RL = near_NL.view(*self.shape, -1)[:, None]
        turn_NC = self.turn_LC[:, self.end_N + self.taken]
        for j, block in enumerate(self.attention.stack):
            query, key, value = map(self.attention.split, block.asked(x_NX))
            own = self.own[j]
            own.append((turned(key, turn_NC), value))
            del own[: -self.window]
            found_NGC = self._look(j, turned(query, turn_NC), seen_M1RL)
            x_NX = block(x_NX, found_NGC.flatten(1))
        self.taken += 1
        hidden: Tensor = self.attention.norm(x_NX)
        return hidden

    def _look(self, j: int, query_NGC: Tensor, seen_M1RL: Tensor) -> Tensor:
        """What queries find in the past that they share and in their own dream, (N, G, C)."""
        keys_NGIC, values_NGIC = (
            torch.stack(part, dim=2) for part in zip(*self.own[j], strict=True)
        )
        # Cast once: under autocast the products are of another dtype than the memory.
        self.keys_MGCL[j] = self.keys_MGCL[j].to(query_NGC.dtype)
        self.values_MGLC[j] = self.values_MGLC[j].to(query_NGC.dtype)
        shared_MGRC = torch.unflatten(query_NGC, 0, self.shape).transpose(1, 2)
        score_MGRL = shared_MGRC @ self.keys_MGCL[j]
        score_MGRL = score_MGRL.masked_fill(~seen_M1RL, -torch.inf)
        score_NGL = score_MGRL.transpose(1, 2).flatten(0, 1)
        score_NGI = (keys_NGIC @ query_NGC[..., None]).squeeze(-1)
        both = torch.cat([score_NGL, score_NGI], dim=-1) * query_NGC.shape[-1] ** -0.5
        sizes = score_NGL.shape[-1], score_NGI.shape[-1]
        weight_NGL, weight_NGI = both.softmax(dim=-1).to(query_NGC.dtype).split(sizes, dim=-1)
        weight_MGRL = torch.unflatten(weight_NGL, 0, self.shape).transpose(1, 2)
        found_MGRC = weight_MGRL @ self.values_MGLC[j]
        own_NGC = (weight_NGI[..., None, :] @ values_NGIC).squeeze(-2)
        both_NGC: Tensor = found_MGRC.transpose(1, 2).flatten(0, 1) + own_NGC
        return both_NGC


def turns(place: Tensor, cfg: LatentTransformerConfig, dtype: torch.dtype) -> Tensor:
    """Cosine and sine of the angles that belong to places (L,), (2, L, C); float32 or float64."""
    width = cfg.width // cfg.heads
    exact = torch.promote_types(dtype, torch.float32)
    half = torch.arange(0, width, 2, device=place.device, dtype=exact)
    angle = place[:, None].to(exact) * _ROTARY_BASE ** (-half / width)
    both = torch.cat([angle, angle], dim=-1)
    return torch.stack([both.cos(), both.sin()])


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """Turn pairs of entries, half a head apart: (..., L, G, C) by the angles of L places."""
    cos, sin = turn[:, :, None]
    first, second = x.chunk(2, dim=-1)
    out: Tensor = x * cos + torch.cat([-second, first], dim=-1) * sin
    return out.to(x.dtype)
