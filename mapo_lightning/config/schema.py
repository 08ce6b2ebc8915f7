"""Reads a configuration schema: a tree of plain dataclasses, each field with a docstring under it.

Knows nothing of files or of OmegaConf; :mod:`mapo_lightning.config.compose` builds on it.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import math
import re
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
_LAST_PART = re.compile(r"[./]")  # of a dotted key, or of file/variant


class Field(NamedTuple):
    """One leaf of the schema."""

    key: str
    """Dotted path from the root, such as ``data.clip_length``."""

    type: Any
    """Its annotation, evaluated."""

    doc: str
    """The docstring under the field, on one line; empty where there is none."""


def unwrap(hint: Any) -> tuple[Any, bool]:
    """Split ``Optional[X]`` into ``(X, True)``; anything else is ``(hint, False)``."""
    if get_origin(hint) in (Union, types.UnionType):
        rest = tuple(a for a in get_args(hint) if a is not type(None))
        optional = len(rest) < len(get_args(hint))
        return (rest[0] if len(rest) == 1 else Union[rest]), optional  # noqa: UP007
    return hint, False


def section(hint: Any) -> type | None:
    """Return the dataclass that an annotation names, or None for a leaf."""
    inner, _ = unwrap(hint)
    return inner if isinstance(inner, type) and is_dataclass(inner) else None


def hints(cls: type) -> dict[str, Any]:
    """Return the evaluated annotations of a dataclass, in the order of its fields."""
    return _hints(cls)


@cache
def _hints(cls: type) -> dict[str, Any]:
    resolved = get_type_hints(cls)
    return {f.name: resolved[f.name] for f in fields(cls)}


def lookup(schema: type, key: str) -> Any:
    """Return the annotation of a dotted key.

    Args:
        schema: The root dataclass.
        key: Dotted path; below a ``dict`` field any name is known.

    Returns:
        The annotation.

    Raises:
        KeyError: There is no such key; the argument is the longest known part of the path.
    """
    hint: Any = schema
    done: list[str] = []
    for part in key.split("."):
        owner, _ = unwrap(hint)
        cls = section(owner)
        if cls is not None and part in hints(cls):
            hint = hints(cls)[part]
        elif get_origin(owner) is dict or owner is dict:
            hint = (get_args(owner) or (str, Any))[1]
        else:
            raise KeyError(".".join(done))
        done.append(part)
    return hint


def walk(schema: type, prefix: str = "") -> Iterator[Field]:
    """Yield every leaf of the schema, sections in the order of their fields."""
    docs = field_docs(schema)
    for name, hint in hints(schema).items():
        key = f"{prefix}{name}"
        cls = section(hint)
        if cls is None:
            yield Field(key, hint, docs.get(name, ""))
        else:
            yield from walk(cls, f"{key}.")


@cache
def field_docs(cls: type) -> dict[str, str]:
    """Read the string literals that stand under the fields of a dataclass and of its bases."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):  # no source at hand: typed in at a prompt
            continue
        body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef))
        for above, below in itertools.pairwise(body):
            if not (isinstance(above, ast.AnnAssign) and isinstance(above.target, ast.Name)):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                docs[above.target.id] = " ".join(str(below.value.value).split())
    return docs


def type_name(hint: Any) -> str:
    """Say an annotation in the words of a message: ``one of a, b``, ``list of int``, ``int``."""
    inner, optional = unwrap(hint)
    origin, args = get_origin(inner), get_args(inner)
    if origin is Literal:
        name = "one of " + ", ".join(str(a) for a in args)
    elif origin in (list, tuple, dict) and args:
        item = args[1] if origin is dict else args[0]
        name = f"{origin.__name__} of {type_name(item)}"
    elif origin is Union:
        name = " or ".join(type_name(a) for a in args)
    elif section(inner) is not None:
        name = "a section of keys"
    else:
        name = getattr(inner, "__name__", str(inner))
    return f"{name} or null" if optional else name


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word most like ``word``, by its whole path or by its last part."""
    tail = _LAST_PART.split(word)[-1]

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, word, candidate).ratio()
        last = difflib.SequenceMatcher(None, tail, _LAST_PART.split(candidate)[-1]).ratio()
        return max(whole, 0.95 * last)

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best) >= 0.6 else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` with a leading space, or nothing."""
    close = nearest(word, known)
    return f" Did you mean '{close}'?" if close else ""


def unknown_key(schema: type, key: str, known_part: str, where: str, groups: Iterable[str]) -> str:
    """Write the message for a key that does not exist.

    Args:
        schema: Root dataclass.
        key: The dotted key.
        known_part: Its longest part that exists; may be empty.
        where: File that sets it; empty for the command line.
        groups: Group names, which count as near words at the root.

    Returns:
        One sentence with the nearest known key and the keys next to it.
    """
    owner = section(lookup(schema, known_part)) if known_part else schema
    prefix = f"{known_part}." if known_part else ""
    siblings = [f"{prefix}{name}" for name in hints(owner)] if owner else []
    known = {*(f.key for f in walk(schema)), *siblings, *(() if known_part else groups)}
    close = nearest(key, siblings) or nearest(key, known)
    hint = f" Did you mean '{close}'?" if close else ""
    beside = f" Keys next to it: {', '.join(siblings)}." if siblings else ""
    if known_part and not owner:
        beside = f" '{known_part}' is a single value and has no keys below it."
    place = f"{where}: " if where else ""
    return f"{place}unknown configuration key '{key}'.{hint}{beside}"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of every leaf of nested dicts; an empty dict is a leaf."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def nested(leaves: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Put dotted keys and their values into nested dicts: the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for key, value in leaves:
        *parents, name = key.split(".")
        owner = tree
        for parent in parents:
            owner = owner.setdefault(parent, {})
        owner[name] = value
    return tree


def only_keys(raw: Any, text: str, depth: int = 0) -> bool:
    """Tell whether a text with references leads to other keys only, however indirectly."""
    for reference in _REFERENCE.findall(text):
        target: Any = raw
        for part in reference.split("."):
            target = target.get(part) if isinstance(target, dict) else None
        if ":" in reference or reference.startswith(".") or depth > 16:
            return False
        if isinstance(target, dict | list) or not only_keys(raw, str(target), depth + 1):
            return False
    return True


def may_be_null(schema: type, name: str) -> bool:
    """Tell whether the schema lets the section ``name`` be empty."""
    return name in hints(schema) and unwrap(hints(schema)[name])[1]


def fits(value: Any, hint: Any) -> bool:
    """Tell whether a value fits where OmegaConf would take more than it should.

    It reads every number as true or false, and lets a section stand for a number or a text in a
    dict.
    """
    inner, _ = unwrap(hint)
    if inner is bool:
        return not isinstance(value, int | float) or isinstance(value, bool)
    item = getattr(inner, "__args__", (None,))[-1]
    if get_origin(inner) is dict and item in (int, float, str) and isinstance(value, dict):
        other = dict | list if item is str else dict | list | bool
        return not any(isinstance(x, other) for x in value.values())
    return True


def as_integers(value: Any, hint: Any) -> Any:
    """Turn whole numbers written as 1e5 into integers where the schema wants integers."""
    inner, _ = unwrap(hint)
    if inner is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list) and getattr(inner, "__args__", None):
        return [as_integers(item, inner.__args__[0]) for item in value]
    if isinstance(value, dict) and len(getattr(inner, "__args__", ())) == 2:
        return {name: as_integers(item, inner.__args__[1]) for name, item in value.items()}
    return value


def not_finite(value: Any) -> float | None:
    """Return the first number in a value, however nested, that is infinite or not a number."""
    if isinstance(value, float) and not math.isfinite(value):
        return value
    items = value.values() if isinstance(value, dict) else value
    nested = map(not_finite, items if isinstance(value, list | tuple | dict) else ())
    return next((found for found in nested if found is not None), None)
