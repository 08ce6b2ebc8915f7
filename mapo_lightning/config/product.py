"""Words that stand for several runs: ``method=mapo,apv seed=0..4`` is ten of them.

Commas and ``A..B`` divide a value only outside brackets and quotes, so that lists, sections, quoted
texts and paths such as ``../videos`` stay what they are.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mapo_lightning.types import ConfigError

MAX_POINTS = 1000
"""Runs that a product may have; SLURM's arrays have 1,001 tasks at most as it comes."""

_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"\\]|\\.)*\"")
_RANGE = re.compile(r"(-?[0-9]+)\.\.(-?[0-9]+)")
_BEFORE_QUOTES = ",[{(: "  # a quotation mark elsewhere is a sign like any other, as in it's


@dataclass(frozen=True)
class Product:
    """The words of a command line, some of which have several values.

    Attributes:
        words: All ``key=value`` words, as they were typed.
        axes: Key -> its values, for the keys that have several, in their order.
    """

    words: tuple[str, ...]
    axes: Mapping[str, tuple[str, ...]]

    @classmethod
    def read(cls, words: Sequence[str], whole: Collection[str] = ()) -> Product:
        """Find the words with several values.

        Args:
            words: Of the form ``key=value``.
            whole: Keys whose values have commas of their own.

        Raises:
            ConfigError: A value is empty or there twice, a key with several values is there twice,
                or there are more than `MAX_POINTS` runs.
        """
        axes: dict[str, tuple[str, ...]] = {}
        for word in words:
            key, _, value = word.partition("=")
            found = [value] if key in whole else alternatives(value)
            if found != [value]:
                axes[key] = _checked(key, value, found)
        for key in axes:
            if sum(word.partition("=")[0] == key for word in words) > 1:
                raise ConfigError(
                    f"{key}= has several values and stands on the command line twice: write all "
                    f"values in one word, {key}=A,B"
                )
        product = cls(tuple(words), axes)
        if len(product) > MAX_POINTS:
            lengths = " x ".join(f"{key} ({len(values)})" for key, values in axes.items())
            raise ConfigError(
                f"{lengths} are {len(product)} runs, and a sweep has at most {MAX_POINTS}: divide "
                "it into several"
            )
        return product

    def __len__(self) -> int:
        count = 1
        for values in self.axes.values():
            count *= len(values)
        return count

    def choices(self) -> Iterator[dict[str, str]]:
        """Yield each run's own values by key; the last key changes fastest."""
        for values in itertools.product(*self.axes.values()):
            yield dict(zip(self.axes, values, strict=True))

    def words_of(self, choice: Mapping[str, str]) -> list[str]:
        """The words of one run."""
        keys = [word.partition("=")[0] for word in self.words]
        return [
            f"{key}={choice[key]}" if key in choice else word
            for key, word in zip(keys, self.words, strict=True)
        ]


def alternatives(value: str) -> list[str]:
    """Divide the value of a word; a value that means one thing comes back as it is.

    Raises:
        ConfigError: ``A..B`` counts downwards, or far.
    """
    parts = _divided(value)
    return [single for part in parts for single in _counted(part, value)]


def _divided(value: str) -> list[str]:
    """Cut at the commas outside brackets and quotes."""
    cuts, depth, at = [-1], 0, 0
    while at < len(value):
        quoted = _QUOTED.match(value, at)
        if quoted and (at == 0 or value[at - 1] in _BEFORE_QUOTES):
            at = quoted.end()
            continue
        sign = value[at]
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0:
            cuts.append(at)
        at += 1
    if len(cuts) == 1 or depth != 0:  # brackets that do not match: the reader of values complains
        return [value]
    ends = [*cuts[1:], len(value)]
    return [value[start + 1 : end].strip() for start, end in zip(cuts, ends, strict=True)]


def _counted(part: str, value: str) -> list[str]:
    found = _RANGE.fullmatch(part)
    if found is None:
        return [part]
    first, last = int(found[1]), int(found[2])
    if last < first:
        raise ConfigError(f"'{part}' in '{value}' must count upwards: write {last}..{first}")
    if last - first >= MAX_POINTS:
        raise ConfigError(
            f"'{part}' in '{value}' are {last - first + 1} values, and a sweep has at most "
            f"{MAX_POINTS} runs"
        )
    return [str(number) for number in range(first, last + 1)]


def _checked(key: str, value: str, found: list[str]) -> tuple[str, ...]:
    """Refuse values that cannot be meant.

    Raises:
        ConfigError: One is empty, or there twice.
    """
    quoted = f"{key}=\"'{value}'\""
    if "" in found:
        raise ConfigError(
            f"a value of '{key}={value}' is empty: commas divide values of a sweep; write "
            f"{quoted} for a text with a comma in it"
        )
    for single in found:
        if found.count(single) > 1:
            raise ConfigError(
                f"'{key}={value}' has the value {single} twice: each run of a sweep is another; "
                f"write {quoted} for a text with a comma in it"
            )
    return tuple(found)
