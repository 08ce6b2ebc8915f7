"""Words that have a new name: they are refused with their successor, or translated."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mapo_lightning.types import ConfigError


@dataclass(frozen=True)
class Renamed:
    """Old names and their successors."""

    keys: Mapping[str, str] = field(default_factory=dict)
    """Old dotted key -> new dotted key. An old key may be the name of a new section."""
    choices: Mapping[str, str] = field(default_factory=dict)
    """Old ``group=file`` -> new ``group=file/variant``."""
    values: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    """Dotted key, as it is now -> old value -> new value."""

    def check_word(self, key: str, value: str) -> None:
        """Refuse an old key, or an old value, on the command line.

        Raises:
            ConfigError: Names the successor.
        """
        for old, successor in self.values.get(key, {}).items():
            if value.strip().lower() == str(old).lower():
                raise ConfigError(f"{key}={value} is now {key}={successor}")
        new = self.keys.get(key)
        if new is not None and not (_is_section(key, new) and value.lstrip().startswith("{")):
            raise ConfigError(f"{key} is now {new}: write {new}={value}")

    def check_choice(self, group: str, name: str) -> None:
        """Refuse an old choice.

        Raises:
            ConfigError: Names the successor.
        """
        new = self.choices.get(f"{group}={name}")
        if new is not None:
            raise ConfigError(f"'{group}={name}' is now '{new}': write {new}")

    def check_file(self, content: Mapping[str, Any], origin: str) -> None:
        """Refuse a file with old keys or values.

        Raises:
            ConfigError: Names all of them with their successors.
        """
        found = [f"{old} is now {self.keys[old]}" for old in self._found(content)]
        for key, old, new in self._old_values(content):
            found.append(f"{key}: {str(old).lower()} is now {new}")
        if found:
            raise ConfigError(f"{origin}: renamed: {', '.join(found)}")

    def translate(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Copy nested keys with the old ones moved to their successors, and values with a new name.

        What is new already stays.

        Raises:
            ConfigError: A section is a single value.
        """
        tree: dict[str, Any] = _copy(content)
        moved = {self.keys[old]: _take(tree, old) for old in self._found(content)}
        for key, value in moved.items():
            *parents, name = key.split(".")
            owner = tree
            for parent in parents:
                owner = owner.setdefault(parent, {})
                if not isinstance(owner, dict):
                    raise ConfigError(f"{key} cannot be set, because {parent} is a single value")
            owner.setdefault(name, value)
        for key, _, new in list(self._old_values(tree)):
            owner, name = _owner(tree, key)
            owner[name] = new
        return tree

    def _old_values(self, content: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
        """Keys whose value has a new name, that value, and its successor."""
        for key, successors in self.values.items():
            owner, name = _owner(content, key)
            value = None if owner is None else owner.get(name)
            if isinstance(value, Hashable) and value in successors:
                yield key, value, successors[value]

    def _found(self, content: Mapping[str, Any]) -> Iterator[str]:
        for old, new in self.keys.items():
            owner, name = _owner(content, old)
            if owner is None or name not in owner:
                continue
            if not (_is_section(old, new) and isinstance(owner[name], Mapping)):
                yield old


def _owner(content: Any, key: str) -> tuple[Any, str]:
    """The section that a dotted key lies in, None without one, and the key's last part."""
    *parents, name = key.split(".")
    for parent in parents:
        content = content.get(parent) if isinstance(content, Mapping) else None
    return (content if isinstance(content, Mapping) else None), name


def _is_section(old: str, new: str) -> bool:
    return new.startswith(f"{old}.")


def _copy(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {name: _copy(item) for name, item in content.items()}
    return content


def _take(tree: dict[str, Any], key: str) -> Any:
    *parents, name = key.split(".")
    for parent in parents:
        tree = tree[parent]
    return tree.pop(name)
