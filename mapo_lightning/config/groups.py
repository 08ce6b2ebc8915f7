"""The folder of YAML files: its groups, which file of each a run takes, and the help page."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mapo_lightning.config.schema import (
    Field,
    did_you_mean,
    hints,
    nearest,
    section,
    type_name,
    walk,
)
from mapo_lightning.types import ConfigError

EXPERIMENT = "experiment"
"""The group whose files are merged last and may choose files of the other groups."""

Load = Callable[[Path], dict[str, Any]]
"""Reads one YAML file as plain dicts, lists and leaves."""


class Groups:
    """Configuration groups: ``conf/<group>/<name>.yaml``; a name may lie in a subfolder.

    Args:
        folder: The ``conf`` folder.
        load: Reads a YAML file.
    """

    def __init__(self, folder: Path, load: Load) -> None:
        if not folder.is_dir():
            raise ConfigError(
                f"there is no configuration folder '{folder}': run from the checkout."
            )
        self.folder = folder
        self._load = load
        self.files: dict[str, list[str]] = {
            path.name: sorted(
                file.relative_to(path).with_suffix("").as_posix() for file in path.rglob("*.yaml")
            )
            for path in sorted(folder.iterdir())
            if path.is_dir() and not path.name.startswith((".", "_"))
        }

    def path(self, group: str, name: str) -> Path:
        """Return the file of a choice."""
        return self.folder / group / f"{name}.yaml"

    def check(self, group: str, name: str | None) -> None:
        """Refuse a group or a file that does not exist.

        Raises:
            ConfigError: Lists the ones there are.
        """
        if group not in self.files:
            raise ConfigError(
                f"unknown configuration group '{group}'.{did_you_mean(group, self.files)} "
                f"Groups: {', '.join(self.files)}."
            )
        if name is not None and name not in self.files[group]:
            raise ConfigError(
                f"there is no '{group}={name}'.{did_you_mean(name, self.files[group])} "
                f"Files in {self.folder.name}/{group}: {listed(self.files[group]) or 'none'}."
            )

    def choose(self, picked: Mapping[str, str | None], defaults: bool) -> dict[str, str | None]:
        """Settle the file of every group.

        Args:
            picked: Choices of the command line; these win over the ``defaults`` of the experiment,
                those over the ``defaults`` of a chosen group file, and those over the next.
            defaults: Whether the ``defaults`` of ``config.yaml`` count.

        Returns:
            Group -> file or None, in the order of merging: the experiment comes last.
        """
        chosen = self._defaults(self.folder / "config.yaml") if defaults else {}
        fixed = dict(picked)
        experiment = {**chosen, **picked}.get(EXPERIMENT)
        if experiment is not None:
            fixed = self._defaults(self.path(EXPERIMENT, experiment), fixed) | fixed
        chosen |= fixed
        chosen.pop(EXPERIMENT, None)
        for group, name in list(chosen.items()):
            wanted = self._defaults(self.path(group, name), fixed) if name is not None else {}
            chosen |= {other: file for other, file in wanted.items() if other not in fixed}
        if EXPERIMENT in self.files:
            chosen[EXPERIMENT] = experiment
        return chosen

    def values(self, path: Path) -> dict[str, Any]:
        """Return the keys that a file sets, without the groups that its ``defaults`` choose."""
        content = self._load(path)
        content.pop("defaults", None)
        return content

    def _defaults(self, path: Path, fixed: Collection[str] = ()) -> dict[str, str | None]:
        """What a file chooses; a choice that is overruled need not exist."""
        if not path.is_file():
            return {}
        block = self._load(path).get("defaults") or {}
        if not isinstance(block, dict):
            raise ConfigError(f"'defaults' in {path} must map groups to files, got {block!r}.")
        choices = {str(g): None if n is None else str(n) for g, n in block.items()}
        for group, name in choices.items():
            if group not in fixed:
                self.check(group, name)
        return choices


def listed(names: Sequence[str]) -> str:
    """Join the names of a group's files; those of a subfolder are only counted."""
    top = [name for name in names if "/" not in name]
    folders = Counter(name.partition("/")[0] for name in names if "/" in name)
    return ", ".join(top + [f"{folder}/ ({count} files)" for folder, count in folders.items()])


def describe_file(path: Path) -> str:
    """Return the first comment line of a YAML file, without its sign."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").rstrip()
    return ""


def help_text(
    groups: Groups,
    chosen: Mapping[str, str | None],
    schema: type,
    values: Mapping[str, Any],
    prefix: str = "",
) -> str:
    """Write the help page.

    Args:
        groups: All groups.
        chosen: The files of this run, marked with a star.
        schema: Root dataclass.
        values: Dotted key -> value of this run.
        prefix: Narrows the page to one group or one part of the tree; empty for all.

    Returns:
        The page, without a final newline.

    Raises:
        ConfigError: Nothing lies under ``prefix``.
    """
    shown = [g for g in groups.files if not prefix or g == prefix]
    leaves = [f for f in walk(schema) if not prefix or f"{f.key}.".startswith(f"{prefix}.")]
    if not shown and not leaves:
        known = {*groups.files, *(f.key for f in walk(schema)), *hints(schema)}
        raise ConfigError(f"nothing to help with under '{prefix}'.{did_you_mean(prefix, known)}")
    lines: list[str] = []
    if not prefix:
        lines += ["Usage: python train.py [group=file ...] [key=value ...] [experiment=name]"]
        lines += ["       [config=FILE] [--show] [--help [PREFIX]]", ""]
    if shown:
        lines.append("Groups (group=file; * is this run's choice)")
        for group in shown:
            lines += _group_lines(groups, group, chosen.get(group), whole=bool(prefix))
        lines.append("")
    if leaves:
        lines.append("Keys (key=value; the value is this run's)")
        for leaf in leaves:
            lines += _leaf_lines(leaf, values)
    return "\n".join(lines).rstrip()


def _group_lines(groups: Groups, group: str, choice: str | None, whole: bool) -> list[str]:
    """Files of one group; unless ``whole``, a subfolder takes one line."""
    names = groups.files[group]
    shown = [name for name in names if whole or "/" not in name or name == choice]
    lines = [f"  {group}"]
    for name in shown:
        star = "*" if name == choice else " "
        lines.append(f"  {star} {name:<24} {describe_file(groups.path(group, name))}".rstrip())
    folders = Counter(name.partition("/")[0] for name in names if name not in shown)
    for folder, count in folders.items():
        lines.append(f"    {f'{folder}/':<24} {count} files: --help {group}")
    return lines


def _leaf_lines(leaf: Field, values: Mapping[str, Any]) -> list[str]:
    value = values.get(leaf.key)
    text = "null" if value is None else str(value)
    lines = [f"  {leaf.key} = {text}   ({type_name(leaf.type)})"]
    if leaf.doc:
        lines += textwrap.wrap(leaf.doc, 94, initial_indent="      ", subsequent_indent="      ")
    return lines


def unknown_key(
    schema: type, key: str, known_part: str, where: str, groups: Mapping[str, Any]
) -> str:
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
    from mapo_lightning.config.schema import lookup

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
