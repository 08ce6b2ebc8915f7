"""Composes a run from dataclasses, YAML files and ``key=value`` words: the only door to OmegaConf.

Order, later wins: dataclass defaults < ``conf/config.yaml`` < chosen group files in the order of
its ``defaults`` < experiment file < overrides on the command line; a variant comes right after its
file. Every file holds keys from the root, so a group file may also set keys outside its own
section. Lists are replaced whole.
"""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from mapo_lightning.config.command_line import CommandLine
from mapo_lightning.config.groups import Groups, Keys
from mapo_lightning.config.help_page import help_text
from mapo_lightning.config.redact import redact
from mapo_lightning.config.renamed import Renamed
from mapo_lightning.config.schema import (
    as_integers,
    did_you_mean,
    fits,
    flatten,
    hints,
    lookup,
    may_be_null,
    not_finite,
    only_keys,
    section,
    type_name,
    unknown_key,
    unwrap,
)
from mapo_lightning.files import atomic_write
from mapo_lightning.ownership import signed
from mapo_lightning.types import ConfigError

T = TypeVar("T")

_YAML_INT = "tag:yaml.org,2002:int"
_OCTAL = re.compile(r"[-+]?0[0-9_]+")
_ODD_NUMBER = re.compile(r"(?<![0-9.])0[0-9_]|[0-9]:[0-9]")


@dataclass(frozen=True)
class Composed(Generic[T]):
    """A run, composed.

    Attributes:
        config: The typed tree, every range check passed.
        yaml: The tree as text that :func:`compose` can read back with ``config=FILE``. References
            between keys are resolved, references to the environment are not.
        redacted_yaml: The same without secrets: the one to print, log and track.
        flat: Dotted key -> value, without secrets: what trackers call parameters.
        groups: Group -> chosen file or file/variant, None where none was.
        overrides: The ``key=value`` words of the command line, in their order.
        text: What to print instead of running (``--help``, ``--show``); None for a run.
    """

    config: T
    yaml: str
    redacted_yaml: str
    flat: dict[str, Any]
    groups: dict[str, str | None]
    overrides: tuple[str, ...]
    text: str | None = None

    def save(self, path: Path) -> None:
        """Write :attr:`yaml`, signed, at once or not at all.

        Only the user may read it where it holds a secret.
        """
        with atomic_write(path, private=self.yaml != self.redacted_yaml) as draft:
            draft.write_text(signed(self.yaml), encoding="utf-8")


Base = Keys
"""Origin, for messages, and the keys of a run that another one builds upon."""


def compose(
    argv: Sequence[str],
    schema: type[T],
    conf_dir: Path,
    base: Base | None = None,
    renamed: Renamed | None = None,
) -> Composed[T]:
    """Compose a run from the words of a command line.

    Args:
        argv: Words without the program's name: ``group=file[/variant]``, ``a.b=value``,
            ``config=FILE`` (a saved run as the base), ``--show``, ``--help [PREFIX]``.
        schema: Root dataclass; every field has a default.
        conf_dir: Folder with ``config.yaml`` and one folder per group.
        base: An earlier run, in place of ``config.yaml``; ``config=FILE`` wins over it.
        renamed: Words that have a new name.

    Returns:
        The run, with :attr:`Composed.text` set where the words ask to print rather than to run.

    Raises:
        ConfigError: An unknown or renamed key or file, a wrong type, a value out of range, or a
            word that is none of these; in one sentence.
    """
    words, renamed = CommandLine.parse(argv), renamed or Renamed()
    groups = Groups(conf_dir, load_yaml, renamed, hints(schema))
    chosen, leaves, base = _sort_words(words.overrides, groups, schema, base, renamed)
    tree = _tree(schema)
    for origin, content in _sources(groups, chosen, base):
        renamed.check_file(content, origin)
        for key, value in _leaves(schema, content, origin):
            _set(tree, schema, key, value, origin)
    for key, raw in leaves:
        _set(tree, schema, key, _read_value(key, raw, lookup(schema, key)), "")
    resolved = _resolved(tree)
    safe = redact(resolved)
    if words.help is not None:
        config, page = schema(), dict(flatten(safe))
        text: str | None = help_text(groups, chosen, schema, page, words.help)
    else:
        config, text = _build(tree, schema), _dump(safe) if words.show else None
    return Composed(
        config=config,
        yaml=_dump(resolved),
        redacted_yaml=_dump(safe),
        flat=dict(flatten(safe)),
        groups=chosen,
        overrides=tuple(words.overrides),
        text=text,
    )


def _tree(schema: type) -> DictConfig:
    """A tree of all defaults to write into."""
    return copy.deepcopy(_defaults(schema))


@cache
def _defaults(schema: type) -> DictConfig:
    """Read the defaults once: that takes three times as long as copying them."""
    tree: DictConfig = OmegaConf.structured(schema)
    return tree


def from_base(base: Base, schema: type[T]) -> T:
    """Build a run from another one's keys alone, where no configuration folder is at hand.

    Raises:
        ConfigError: A key is unknown, or a value of the wrong type or out of range.
    """
    tree = _tree(schema)
    for key, value in _leaves(schema, base[1], base[0]):
        _set(tree, schema, key, value, base[0])
    return _build(tree, schema)


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file as plain dicts, lists and leaves, references unresolved.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or does not hold keys at its root.
    """
    try:
        content = OmegaConf.load(io.StringIO(_in_base_ten(path.read_text(encoding="utf-8"))))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"cannot read the configuration file '{path}': {reason}") from error
    plain = OmegaConf.to_container(content)
    if not isinstance(plain, dict) or not all(isinstance(key, str) for key in plain):
        raise ConfigError(f"'{path}' must hold named keys at its root, not a list or a value.")
    return {str(key): value for key, value in plain.items()}


def _in_base_ten(text: str) -> str:
    """Rewrite YAML 1.1's octal numbers, such as 010, and leave its 1:30 for ninety a text."""
    root = yaml.compose(text, Loader=yaml.SafeLoader) if _ODD_NUMBER.search(text) else None
    if root is None:
        return text
    nodes, seen = [root], set[int]()
    while nodes:
        node = nodes.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            nodes += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif node.tag == _YAML_INT and ":" in node.value:
            node.tag, node.style = "tag:yaml.org,2002:str", "'"
        elif node.tag == _YAML_INT and _OCTAL.fullmatch(node.value):
            node.value = str(int(node.value))
    return str(yaml.serialize(root, Dumper=yaml.SafeDumper))


def _sort_words(
    overrides: Sequence[str],
    groups: Groups,
    schema: type,
    base: Base | None,
    renamed: Renamed,
) -> tuple[dict[str, str | None], list[tuple[str, str]], Base | None]:
    """Tell group choices, leaf overrides and the base file apart; refuse unknown keys."""
    picked: dict[str, str | None] = {}
    leaves: list[tuple[str, str]] = []
    for word in overrides:
        key, _, value = word.partition("=")
        if key == "config" and key not in hints(schema):
            base = value, load_yaml(Path(value))
        elif key in groups.files:
            picked[key] = None if value == "null" else value
            groups.check(key, picked[key])
        else:
            renamed.check_word(key, value)
            _check_key(schema, key, "", groups.files)
            leaves.append((key, value))
    # `group=null` also empties the section of that name, where the schema lets it be empty.
    off = [(g, "null") for g, name in picked.items() if name is None and may_be_null(schema, g)]
    return groups.choose(picked, defaults=base is None), off + leaves, base


def _sources(groups: Groups, chosen: Mapping[str, str | None], base: Base | None) -> Iterator[Base]:
    """Yield (name for messages, content) of every file, in the order of merging."""
    first = base or groups.root()
    if first is not None:
        yield first
    for group, name in chosen.items():
        if name is not None:
            yield from groups.values(group, name)


def _leaves(
    schema: type, content: Mapping[str, Any], origin: str, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield what a file sets, one leaf of the schema at a time."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        _check_key(schema, key, origin, {})
        if isinstance(value, dict) and section(lookup(schema, key)) is not None:
            yield from _leaves(schema, value, origin, f"{key}.")
        else:
            yield key, value


def _check_key(schema: type, key: str, origin: str, groups: Mapping[str, Any]) -> None:
    try:
        lookup(schema, key)
    except KeyError as error:
        message = unknown_key(schema, key, str(error.args[0]), origin, groups)
        raise ConfigError(message) from None


def _read_value(key: str, raw: str, hint: Any) -> Any:
    """Read the text of an override as the schema's type wants it."""
    inner, optional = unwrap(hint)
    if raw in get_args(inner):  # one of the words of a Literal, "null" among them
        return raw
    if inner is str and raw[:1] not in ("'", '"'):  # a path such as `a: b` or a name such as 1e5
        return None if optional and raw in ("null", "None") else raw
    try:
        plain = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={_in_base_ten(raw)}"]))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"cannot read the value of '{key}={raw}': {reason}") from error
    return plain["value"] if isinstance(plain, dict) else None


def _set(tree: DictConfig, schema: type, key: str, value: Any, origin: str) -> None:
    """Put one value into the tree; whole numbers written as 1e5 are welcome where an int is."""
    hint = lookup(schema, key)
    _wake_parents(tree, schema, key)
    try:  # merge: dicts grow, lists are replaced
        if not fits(value, hint):
            raise ValidationError
        OmegaConf.update(tree, key, as_integers(value, hint), merge=isinstance(value, dict))
    except OmegaConfBaseException as error:
        place = f"{origin}: " if origin else ""
        close = did_you_mean(str(value), type_name(hint).removeprefix("one of ").split(", "))
        raise ConfigError(
            f"{place}'{key}' must be {type_name(hint)}, got {value!r}."
            f"{close if type_name(hint).startswith('one of ') else ''}"
        ) from error


def _wake_parents(tree: DictConfig, schema: type, key: str) -> None:
    """Turn sections on the way to ``key`` that are null into sections with their defaults."""
    parts = key.split(".")[:-1]
    for end in range(1, len(parts) + 1):
        parent = ".".join(parts[:end])
        cls = section(lookup(schema, parent))
        if cls is not None and OmegaConf.select(tree, parent) is None:
            OmegaConf.update(tree, parent, OmegaConf.structured(cls))


def _build(tree: DictConfig, schema: type[T], prefix: str = "") -> T:
    """Make the dataclasses, innermost first, so that a range error can be told its section."""
    values: dict[str, Any] = {}
    try:
        for name, hint in hints(schema).items():
            key, cls = f"{prefix}{name}", section(hint)
            value = OmegaConf.select(tree, key, throw_on_missing=True)
            if cls is not None and value is not None:
                values[name] = _build(tree, cls, f"{key}.")
            elif OmegaConf.is_config(value):
                values[name] = OmegaConf.to_container(value, resolve=True)
            else:
                values[name] = value
            odd = not_finite(values[name])
            if odd is not None:
                raise ConfigError(f"'{key}' must be a finite number, got {odd}.")
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0].rpartition("interpolation: ")[2].strip('"')
        raise ConfigError(f"cannot resolve '{error.full_key or key}': {reason}.") from error
    try:
        return schema(**values)
    except ConfigError as error:
        first = str(error).partition(" ")[0].strip("'\"`").partition(".")[0]
        raise ConfigError(f"{prefix}{error}" if first in hints(schema) else str(error)) from error


def _resolved(tree: DictConfig) -> Any:
    """Copy the tree to plain values; what depends on the environment keeps its ``${...}``."""
    raw = OmegaConf.to_container(tree, resolve=False)

    def visit(node: Any, key: str) -> Any:
        if isinstance(node, dict):
            return {
                name: visit(item, f"{key}.{name}" if key else name) for name, item in node.items()
            }
        if isinstance(node, list):
            return [visit(item, f"{key}[{index}]") for index, item in enumerate(node)]
        if isinstance(node, str) and "${" in node and only_keys(raw, node):
            try:
                return OmegaConf.select(tree, key)
            except OmegaConfBaseException as error:
                reason = str(error).splitlines()[0]
                raise ConfigError(f"cannot resolve '{key}': {reason}.") from error
        return node

    return visit(raw, "")


def _dump(tree: Any) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(tree))
