"""Turns phrases into vectors.

The vectors are fixed: the model learns a projection of them. Layout of `HashedSlots`,
V = 5 x dim_per_slot::

    body | action | target | direction: right, up, towards, clockwise, hashed words | displacement:
    log-magnitude, fraction, angle, length, hashed words

`WithDirection` joins the entries of direction and displacement to the vector of another encoder,
V = encoder's + 8.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mapo_lightning.semantics import vocabulary
from mapo_lightning.semantics.phrase import SLOTS, Phrase
from mapo_lightning.types import ConfigError, DescriberError

_RESERVED = 4  # leading entries of the direction and displacement slots with a fixed meaning
# Shares of encoder's vector, direction and displacement in a squared norm: the cosine of opposite
# directions is then at most 1 - 2 * 0.4 = 0.2.
_TEXT, _WAY, _FAR = 0.5, 0.4, 0.1
_SKIP = frozenset({"a", "an", "the", "of", "to", "is", "in", "at", "and", "with", "its", "it"})
_COUNTS = {"a": 1.0, "an": 1.0, "one": 1.0, "half": 0.5, "two": 2.0, "several": 3.0, "few": 3.0}
_COUNTS |= {"three": 3.0, "four": 4.0, "five": 5.0, "six": 6.0, "ten": 10.0}
_UNIT = {"percent": 1, "%": 1, "degree": 2, "degrees": 2, "deg": 2, "°": 2}  # anything else: 3


@runtime_checkable
class Encoder(Protocol):
    """Turns a describer's answer into the semantic vector of a batch."""

    semantic_dim: int
    """Width V of the vector."""

    def encode(self, phrase: Phrase, hidden: NDArray[np.float16] | None) -> NDArray[np.float32]:
        """Embed one action: the phrase, or the describer's hidden state of it, into (V,)."""
        ...


class HashedSlots:
    """Signed feature hashing of the words of each slot, with the meaning of motion kept.

    Needs no weights and is the same in every process and on every machine. Opposite directions
    have opposite vectors, and near distances near ones, which hashed words alone would lose.

    Args:
        dim_per_slot: Width of one slot, at least 16.
    """

    def __init__(self, dim_per_slot: int = 64) -> None:
        if dim_per_slot < 16:
            raise ConfigError(f"dim_per_slot must be at least 16, got {dim_per_slot}")
        self.dim_per_slot = dim_per_slot
        self.semantic_dim = len(SLOTS) * dim_per_slot
        first = SLOTS.index("direction") * dim_per_slot
        self.direction = slice(first, first + _RESERVED)
        """Entries that are opposite for opposite directions."""

    def encode(
        self, phrase: Phrase, hidden: NDArray[np.float16] | None = None
    ) -> NDArray[np.float32]:
        """Embed one phrase.

        Args:
            phrase: The action; empty slots become zeros.
            hidden: Ignored.

        Returns:
            (5 * dim_per_slot,) float32; each slot has norm 0 or 1, so the whole at most sqrt(5).
        """
        return _hash_phrase(phrase, self.dim_per_slot).copy()


class HiddenState:
    """The describer's own hidden state, scaled to unit root mean square.

    Args:
        dim: Width of the hidden state (3584 for Qwen2.5-VL-7B).
    """

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise ConfigError(f"dim must be positive, got {dim}")
        self.semantic_dim = dim

    def encode(self, phrase: Phrase, hidden: NDArray[np.float16] | None) -> NDArray[np.float32]:
        """Return the hidden state as (dim,) float32 of unit root mean square.

        Raises:
            DescriberError: There is no hidden state, it has another width, or it is not finite.
        """
        if hidden is None or hidden.shape != (self.semantic_dim,):
            found = "none" if hidden is None else f"shape {hidden.shape}"
            raise DescriberError(
                f"a hidden state of width {self.semantic_dim} is needed, found {found}. "
                "Use a describer that returns hidden states, or embed the words instead."
            )
        vector = hidden.astype(np.float32)
        scale = float(np.sqrt(np.mean(vector**2)))
        if not math.isfinite(scale):
            raise DescriberError("the hidden state is not finite; label this video again")
        return vector / max(scale, 1e-6)


class WithDirection:
    """The vector of another encoder, joined to the direction and the displacement of the phrase.

    Sentence encoders put "to the left" and "to the right" almost at the same place, and the hidden
    state of a model knows nothing of a direction that was measured. Layout::

        encoder's vector | right, up, towards, clockwise | log-magnitude, fraction, angle, length

    Args:
        encoder: Gives vectors of unit root mean square.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.plain_dim = encoder, encoder.semantic_dim
        self.semantic_dim = self.plain_dim + 2 * _RESERVED
        self.direction = slice(self.plain_dim, self.plain_dim + _RESERVED)
        """Entries that are opposite for opposite directions."""

    def encode(self, phrase: Phrase, hidden: NDArray[np.float16] | None) -> NDArray[np.float32]:
        """Embed one action.

        Returns:
            (plain_dim + 8,) float32, of norm at most sqrt(plain_dim). The cosine of two phrases
            that differ in opposite directions only is at most 0.2.

        Raises:
            DescriberError: As the encoder's `encode`.
        """
        plain = self.encoder.encode(phrase, hidden)
        way, far = _direction(phrase.direction), _displacement(phrase.displacement)
        far = far / max(float(np.linalg.norm(far)), 1.0)
        parts = (math.sqrt(_TEXT) * plain, self._part(_WAY) * way, self._part(_FAR) * far)
        return np.concatenate(parts, dtype=np.float32)

    def _part(self, share: float) -> float:
        """Norm of a part with this share of the squared norm."""
        return math.sqrt(share * self.plain_dim)


def needs_hidden(encoder: Encoder) -> bool:
    """Whether its vectors are the describer's hidden states, which words alone do not give."""
    return isinstance(getattr(encoder, "encoder", encoder), HiddenState)


@functools.lru_cache(maxsize=65536)
def _hash_phrase(phrase: Phrase, width: int) -> NDArray[np.float32]:
    slots = np.zeros((len(SLOTS), width), np.float32)
    for name, text, row in zip(SLOTS, phrase, slots, strict=True):
        fixed = {"direction": _direction, "displacement": _displacement}.get(name)
        if fixed is None:
            row += _hash_words(name, text, width)
        else:
            row[:_RESERVED] = fixed(text)
            row[_RESERVED:] = 0.5 * _hash_words(name, text, width - _RESERVED)
        row /= max(float(np.linalg.norm(row)), 1.0)
    return slots.reshape(-1)


def _hash_words(slot: str, text: str, width: int) -> NDArray[np.float32]:
    """Unit vector of the words of a slot; zero if it has none. Numbers are left out."""
    row = np.zeros(width, np.float32)
    for word in re.findall(r"[^\W\d_]+", text.lower()):
        if word in _SKIP:
            continue
        stem = vocabulary.VERBS.get(word, word.removesuffix("'s").removesuffix("s"))
        digest = hashlib.blake2b(f"{slot}:{stem}".encode(), digest_size=8).digest()
        # Two places per word: words that collide in one are still told apart by the other.
        for half in (digest[:4], digest[4:]):
            value = int.from_bytes(half, "little")
            row[(value >> 1) % width] += 1.0 if value & 1 else -1.0
    norm = float(np.linalg.norm(row))
    return row / norm if norm > 0 else row


def _direction(text: str) -> NDArray[np.float32]:
    """(right, up, towards the camera, clockwise), of norm 0 or 1; diagonals are sums."""
    known = [vocabulary.DIRECTIONS[word] for word in vocabulary.direction_words(text)]
    # "towards the right" means to the right: "towards" alone only says that a goal follows.
    planar = [k for k in known if k[0] or k[1]]
    total = np.sum(planar or known or [(0.0, 0.0, 0.0, 0.0)], axis=0, dtype=np.float32)
    norm = float(np.linalg.norm(total))
    return np.asarray(total / norm if norm > 0 else total, np.float32)


def _displacement(text: str) -> NDArray[np.float32]:
    """(log-magnitude in about [0, 1], and one of three unit flags); zeros if there is no number."""
    features = np.zeros(_RESERVED, np.float32)
    match = re.search(r"(\d{1,9}(?:\.\d{1,9})?|[a-z]+)\s*([a-z%°]*)", text.lower())
    while match and not match[1][0].isdigit() and match[1] not in _COUNTS:
        match = re.compile(r"(\d{1,9}(?:\.\d{1,9})?|[a-z]+)\s*([a-z%°]*)").search(
            text.lower(), match.end(1)
        )
    if match is None:
        return features
    amount = _COUNTS[match[1]] if match[1] in _COUNTS else float(match[1])
    features[0] = min(math.log1p(amount) / math.log(101.0), 2.0)
    features[_UNIT.get(match[2], 3)] = 0.5
    return features
