"""The help page: groups with their files and variants, then keys with their values."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from mapo_lightning.config.groups import Block, Groups
from mapo_lightning.config.schema import Field, did_you_mean, hints, type_name, walk
from mapo_lightning.types import ConfigError

_FEW = 6  # variants of one file that the whole page lists


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
        chosen: The choices of this run, marked with a star.
        schema: Root dataclass.
        values: Dotted key -> value of this run.
        prefix: Narrows the page to one group or one part of the tree; empty for all.

    Returns:
        The page, without a final newline.

    Raises:
        ConfigError: Nothing lies under ``prefix``; names its successor where it was renamed.
    """
    shown = [g for g in groups.files if not prefix or g == prefix]
    leaves = [f for f in walk(schema) if not prefix or f"{f.key}.".startswith(f"{prefix}.")]
    if not shown and not leaves:
        groups.renamed.check_word(prefix, "VALUE")
        known = {*groups.files, *(f.key for f in walk(schema)), *hints(schema)}
        raise ConfigError(f"there is no group or key '{prefix}'.{did_you_mean(prefix, known)}")
    lines: list[str] = []
    if not prefix:
        lines += ["Usage: mapo-train [group=file[/variant] ...] [key=value ...]"]
        lines += [
            "       [experiment=name] [config=FILE] [--show] [--preflight] [--help [PREFIX]]",
            "",
        ]
        lines += [
            "--show prints the resolved run; --preflight measures a few updates of it and prints"
        ]
        lines += ["hours, memory and disk, and refuses what does not fit."]
        lines += ["Several values, group=a,b key=0..4, are one run for each combination.", ""]
    if shown:
        lines.append("Groups (group=file or group=file/variant; * is this run's choice)")
        for group in shown:
            lines += _group_lines(groups, group, chosen.get(group), whole=bool(prefix))
        lines.append("")
    if leaves:
        lines.append("Keys (key=value; the value is this run's)")
        for leaf in leaves:
            lines += _leaf_lines(leaf, values)
    return "\n".join(lines).rstrip()


def _group_lines(groups: Groups, group: str, choice: str | None, whole: bool) -> list[str]:
    """Files of one group; unless ``whole``, the variants of a file with many take one line."""
    lines = [f"  {group}"]

    def add(name: str, doc: str) -> None:
        star = "*" if name == choice else " "
        lines.append(f"  {star} {name:<24} {doc}".rstrip())

    for name in groups.files[group]:
        file = groups.file(group, name)
        add(name if file.stands_alone else f"{name}/...", file.doc)
        brief = not whole and len(file.variants) > _FEW
        for variant, block in file.variants.items():
            if not brief or f"{name}/{variant}" == choice:
                add(f"{name}/{variant}", _about(block))
        if brief:
            add("", f"({len(file.variants)} variants: --help {group})")
    return lines


def _about(block: Block) -> str:
    """What a variant says about itself, or else what it chooses."""
    return block.doc or " ".join(f"{group}={name}" for group, name in block.defaults.items())


def _leaf_lines(leaf: Field, values: Mapping[str, Any]) -> list[str]:
    value = values.get(leaf.key)
    text = "null" if value is None else str(value)
    lines = [f"  {leaf.key} = {text}   ({type_name(leaf.type)})"]
    if leaf.doc:
        lines += textwrap.wrap(leaf.doc, 94, initial_indent="      ", subsequent_indent="      ")
    return lines
