"""The folder of YAML files: its groups, their variants, and which of them a run takes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mapo_lightning.config.renamed import Renamed
from mapo_lightning.config.schema import did_you_mean
from mapo_lightning.types import ConfigError

EXPERIMENT = "experiment"
"""The group whose files are merged last and may choose files of the other groups."""

Load = Callable[[Path], dict[str, Any]]
"""Reads one YAML file as plain dicts, lists and leaves."""

Keys = tuple[str, Mapping[str, Any]]
"""Where keys were read, for messages, and the keys."""

FEW = 12
"""Variants that a message names; more are counted."""


@dataclass(frozen=True)
class Block:
    """A group file, or one of its variants, taken apart."""

    doc: str = ""
    """One line for the help page."""
    defaults: Mapping[str, str | None] = field(default_factory=dict)
    """Files that it chooses in other groups."""
    keys: Mapping[str, Any] = field(default_factory=dict)
    """Keys that it sets."""


@dataclass(frozen=True)
class GroupFile(Block):
    """A group file with its variants.

    A file may hold, beside the keys that it sets: ``defaults``, the files that it chooses in other
    groups; ``variants``, a table from a name to a block with ``doc``, ``defaults`` and keys of its
    own, which win over those of the file; and ``other``, which says how to get what no variant
    offers (``NAME`` stands for what was asked for). ``group=file/variant`` takes file and variant.
    A file with variants but without ``other`` cannot be taken alone.
    """

    variants: Mapping[str, Block] = field(default_factory=dict)
    other: str = ""

    @property
    def stands_alone(self) -> bool:
        """Whether ``group=file`` is a complete choice."""
        return not self.variants or bool(self.other)


class Groups:
    """Configuration groups: ``conf/<group>/<file>.yaml``; a file may have variants.

    Args:
        folder: The ``conf`` folder.
        load: Reads a YAML file.
        renamed: Choices that have a new name.
        keys: Names of the keys at the root, which are no groups.
    """

    def __init__(
        self,
        folder: Path,
        load: Load,
        renamed: Renamed | None = None,
        keys: Collection[str] = (),
    ) -> None:
        if not folder.is_dir():
            raise ConfigError(
                f"there is no configuration folder '{folder}': reinstall the package."
            )
        self.folder, self._load = folder, load
        self.renamed, self._keys = renamed or Renamed(), keys
        self._read: dict[tuple[str, str], GroupFile] = {}
        self.files: dict[str, list[str]] = {
            path.name: sorted(file.stem for file in path.glob("*.yaml"))
            for path in sorted(folder.iterdir())
            if path.is_dir() and not path.name.startswith((".", "_"))
        }

    def path(self, group: str, file: str) -> Path:
        """Return where a file lies."""
        return self.folder / group / f"{file}.yaml"

    def file(self, group: str, file: str) -> GroupFile:
        """Return a file, read once.

        Raises:
            ConfigError: It cannot be read, or one of its blocks is not what it should be.
        """
        if (group, file) not in self._read:
            path = self.path(group, file)
            content = self._load(path)
            table = content.pop("variants", None) or {}
            if not isinstance(table, dict):
                raise ConfigError(f"'variants' in {path} must map names to blocks, got {table!r}.")
            other = str(content.pop("other", None) or "")
            whole = _block(content, str(path))
            self._read[group, file] = GroupFile(
                _first_comment(path), whole.defaults, whole.keys,
                {str(n): _block(b or {}, f"variant '{n}' in {path}") for n, b in table.items()},
                other,
            )  # fmt: skip
        return self._read[group, file]

    def names(self, group: str) -> list[str]:
        """Return every choice of a group: its files and their variants."""
        found = []
        for name in self.files[group]:
            file = self.file(group, name)
            found += [name] if file.stands_alone else []
            found += [f"{name}/{variant}" for variant in file.variants]
        return found

    def check(self, group: str, name: str | None) -> None:
        """Refuse a group, a file or a variant that does not exist.

        Raises:
            ConfigError: Lists the ones there are.
        """
        if group not in self.files:
            raise ConfigError(self._unknown_group(group))
        if name is None:
            return
        self.renamed.check_choice(group, name)
        stem, slash, variant = name.partition("/")
        if stem not in self.files[group]:
            raise ConfigError(
                f"there is no '{group}={name}'.{did_you_mean(name, self.names(group))} "
                f"Files in {self.folder.name}/{group}: {', '.join(self.files[group]) or 'none'}."
            )
        file = self.file(group, stem)
        if slash and variant not in file.variants:
            raise ConfigError(self._unknown_variant(group, stem, variant))
        if not slash and not file.stands_alone:
            raise ConfigError(
                f"'{group}={stem}' has {len(file.variants)} variants: choose one, such as "
                f"{group}={stem}/{next(iter(file.variants))}. --help {group} lists them."
            )

    def _unknown_group(self, group: str) -> str:
        if group in self._keys:
            return f"'{group}' is a key, not a group: write it beside 'defaults', not in it."
        return (
            f"unknown configuration group '{group}'.{did_you_mean(group, self.files)} "
            f"Groups: {', '.join(self.files)}."
        )

    def _unknown_variant(self, group: str, stem: str, variant: str) -> str:
        file, said = self.file(group, stem), f"there is no '{group}={stem}/{variant}'."
        # Within the file first: `dmc/` alone makes every variant look like every other.
        close = did_you_mean(variant, file.variants).replace("mean '", f"mean '{group}={stem}/")
        if not close:
            elsewhere = [n for n in self.names(group) if n.rpartition("/")[2] == variant]
            close = f" Did you mean '{group}={elsewhere[0]}'?" if elsewhere else ""
        if not file.variants:
            return f"{said}{close} '{group}={stem}' has no variants."
        other = f" {file.other[:1].upper()}{file.other[1:]}." if file.other else ""
        return (
            f"{said}{close} Variants of '{group}={stem}': {listed(list(file.variants), group)}."
            f"{other.replace('NAME', variant)}"
        )

    def choose(self, picked: Mapping[str, str | None], defaults: bool) -> dict[str, str | None]:
        """Settle the file of every group.

        Args:
            picked: Choices of the command line; these win over the ``defaults`` of the experiment,
                those over the ``defaults`` of a chosen group file, and those over the next. The
                ``defaults`` of a variant win over those of its file.
            defaults: Whether the ``defaults`` of ``config.yaml`` count.

        Returns:
            Group -> file, file/variant or None, in the order of merging: the experiment comes last.
        """
        root = self.folder / "config.yaml"
        chosen: dict[str, str | None] = {}
        if defaults and root.is_file():
            chosen = dict(_block(self._load(root), str(root)).defaults)
            self._check_all(chosen, ())
        fixed = dict(picked)
        experiment = {**chosen, **picked}.get(EXPERIMENT)
        if experiment is not None:
            fixed = self._defaults(EXPERIMENT, experiment, fixed) | fixed
        chosen |= fixed
        chosen.pop(EXPERIMENT, None)
        for group, name in list(chosen.items()):
            wanted = self._defaults(group, name, fixed) if name is not None else {}
            chosen |= {other: file for other, file in wanted.items() if other not in fixed}
        if EXPERIMENT in self.files:
            chosen[EXPERIMENT] = experiment
        return chosen

    def root(self) -> Keys | None:
        """Return the keys that ``config.yaml`` sets; None where there is none."""
        path = self.folder / "config.yaml"
        if not path.is_file():
            return None
        return f"{self.folder.name}/{path.name}", _block(self._load(path), str(path)).keys

    def values(self, group: str, name: str) -> Iterator[Keys]:
        """Yield the keys that a choice sets: those of the file, then those of its variant."""
        stem, _, variant = name.partition("/")
        file, place = self.file(group, stem), f"{self.folder.name}/{group}/{stem}.yaml"
        yield place, file.keys
        if variant:
            yield f"{place}, variant '{variant}'", file.variants[variant].keys

    def _defaults(
        self, group: str, name: str, fixed: Collection[str] = ()
    ) -> dict[str, str | None]:
        """What a choice chooses itself; a choice that is overruled need not exist."""
        stem, _, variant = name.partition("/")
        file = self.file(group, stem)
        choices = {**file.defaults, **(file.variants[variant].defaults if variant else {})}
        self._check_all(choices, fixed)
        return choices

    def _check_all(self, choices: Mapping[str, str | None], fixed: Collection[str]) -> None:
        for group, name in choices.items():
            if group not in fixed:
                self.check(group, name)


def listed(variants: Sequence[str], group: str) -> str:
    """Join the names of a file's variants; many are only counted."""
    if len(variants) <= FEW:
        return ", ".join(variants)
    return f"{len(variants)}, listed by --help {group}"


def _block(content: Any, place: str) -> Block:
    """Take a block apart.

    Raises:
        ConfigError: It does not map names to values, or its ``defaults`` do not.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"{place} must hold named keys, got {content!r}.")
    keys = dict(content)
    doc, chosen = keys.pop("doc", None) or "", keys.pop("defaults", None) or {}
    if not isinstance(chosen, dict):
        raise ConfigError(f"'defaults' in {place} must map groups to files, got {chosen!r}.")
    defaults = {str(g): None if n is None else str(n) for g, n in chosen.items()}
    return Block(str(doc), defaults, keys)


def _first_comment(path: Path) -> str:
    """Return the first comment line of a YAML file, without its sign."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").rstrip()
    return ""
