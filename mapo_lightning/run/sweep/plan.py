"""Reads the words of a sweep: its runs, which are called points, their names, and its own file."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mapo_lightning.config.command_line import CommandLine
from mapo_lightning.config.compose import Composed
from mapo_lightning.config.product import Product
from mapo_lightning.config.redact import redact_text
from mapo_lightning.files import atomic_write
from mapo_lightning.ownership import own_text, signed
from mapo_lightning.run.config import RunConfig, conf_folder
from mapo_lightning.run.from_checkpoint import configure
from mapo_lightning.run.sweep.sharing import shared
from mapo_lightning.types import ConfigError

FILE = "sweep.yaml"
"""What a sweep consists of, in its folder."""

WHOLE = ("vlm.server.base_url",)
"""Keys whose values have commas of their own: a pool of servers."""

UNFIT: Mapping[str, str] = {
    "stage": "one stage builds on another: sweep over the settings of one",
    "run_dir": "each point gets a folder of its own inside that of the sweep",
    "work_dir": "all points share the videos' scan and the labels",
    "resume": "one run goes on: give resume= the folder of the sweep",
    "checkpoint": "it is the agent of one run, with settings of its own: evaluate each by itself",
    "config": "it is the base of one run",
    "launch": "it says how all points are started",
    "tracking": "all points are recorded in one place",
    "trainer.num_nodes": "all points are started on the same machines",
}
"""Key or section that cannot have several values -> why."""

OF_THE_START = ("launch", "tracking", "vlm.server", "run_dir", "resume")
"""Keys and sections that each start of the same sweep may choose anew."""

_LONGEST = 100  # characters of a point's name


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str
    """Of its folder and its MLflow run."""
    choice: Mapping[str, str]
    """Its own values, by key."""
    words: tuple[str, ...]
    """All words of its settings, without those of launching and of folders."""
    composed: Composed[RunConfig]

    @property
    def setting(self) -> tuple[str, ...]:
        """Its own values but the seed, as words: points that share them are repetitions."""
        return tuple(f"{k}={v}" for k, v in self.choice.items() if k != "seed")


@dataclass(frozen=True)
class Sweep:
    """Several runs that one command asks for."""

    product: Product
    points: tuple[Point, ...]
    resumed: bool
    """Whether ``resume=`` has named its folder, which `folder_given` then is."""
    folder_given: str
    """Folder that the user has named; empty where none was."""
    text: str | None = None
    """What to print instead of running (``--help``, ``--show``); None for running."""

    @property
    def config(self) -> RunConfig:
        """Settings of the first point, for what is the same in all of them."""
        return self.points[0].composed.config

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys that have several values."""
        return tuple(self.product.axes)

    def settings(self) -> dict[tuple[str, ...], list[Point]]:
        """The points by their setting, in order."""
        found: dict[tuple[str, ...], list[Point]] = {}
        for point in self.points:
            found.setdefault(point.setting, []).append(point)
        return found

    def about(self) -> str:
        """Say how many points there are, and why."""
        sizes = [f"{len(values)} of {key}" for key, values in self.product.axes.items()]
        return f"a sweep of {len(self.points)} runs: {' x '.join(sizes)}"


def read_sweep(words: Sequence[str]) -> Sweep | None:
    """Read the words of a command line.

    Returns:
        The sweep; None where they ask for one run.

    Raises:
        MapoError: A key cannot be swept over, or the settings of a point are wrong.
    """
    line = CommandLine.parse(words)
    overrides, resumed = line.overrides, False
    given = dict(word.split("=", 1) for word in overrides)
    folder = given.get("run_dir", "")
    old = Path(given.get("resume", ""))
    if "resume" in given and (old / FILE).is_file():
        overrides, resumed, folder = _words_of(old, overrides), True, str(old)
    product = Product.read(overrides, WHOLE)
    if not product.axes:
        return None
    _refuse_unfit(product, resumed)
    sweep = Sweep(product, tuple(_points(product)), resumed, folder)
    if line.help is not None:
        words = [*sweep.points[0].words, "--help", *filter(None, [line.help])]
        return replace(sweep, text=configure(words, conf_folder()).text)
    return replace(sweep, text=_shown(sweep)) if line.show else sweep


def _shown(sweep: Sweep) -> str:
    """What ``--show`` prints: the points, and how to see the settings of one."""
    common = shared(sweep.points)
    lines = [f"{sweep.about()}; the same command without --show starts them:"]
    for point in sweep.points:
        words = [f"{key}={value}" for key, value in point.choice.items()]
        notes = [f"in {point.name}"] if point.name != "+".join(words) else []
        notes += [f"shares pre-training {common[point.name]}"] if point.name in common else []
        end = f"   ({', '.join(notes)})" if notes else ""
        lines.append(f"  {redact_text(' '.join(words))}{end}")
    lines.append("Commas and A..B outside brackets and quotes divide the values of a sweep.")
    lines.append("--show with one value of each key prints all settings of a run.")
    return "\n".join(lines)


def _refuse_unfit(product: Product, resumed: bool) -> None:
    for key in product.axes:
        for unfit, why in UNFIT.items():
            if key == unfit or key.startswith(f"{unfit}."):
                raise ConfigError(
                    f"{key}= cannot have several values, because {why}; write "
                    f"{key}=\"'A,B'\" for a text with a comma in it"
                )
    if not resumed and any(word.startswith("resume=") for word in product.words):
        raise ConfigError(
            "resume= goes on with one run, and there are words with several values; give one "
            f"value each, or resume= the folder of a sweep, which holds a file {FILE}"
        )


def _points(product: Product) -> Iterator[Point]:
    choices = list(product.choices())
    seen: dict[str, str] = {}
    for name, choice in zip(names(choices), choices, strict=True):
        words = [w for w in product.words_of(choice) if not w.startswith("resume=")]
        try:
            composed = configure(words, conf_folder())
        except ConfigError as error:
            shown = " ".join(f"{key}={value}" for key, value in choice.items())
            raise ConfigError(f"{error} (in {shown} of the sweep; nothing was started)") from error
        if composed.yaml in seen:
            raise ConfigError(
                f"'{seen[composed.yaml]}' and '{name}' are the same run: each run of a sweep must "
                "differ from every other"
            )
        seen[composed.yaml] = name
        own = tuple(word for word in words if not _is_of(word, ("launch", "run_dir")))
        yield Point(name, choice, own, composed)


def names(choices: Sequence[Mapping[str, str]]) -> list[str]:
    """Name each point after its values: ``method=mapo+seed=0``.

    No two names are the same, and none needs quoting in a shell. A key is shortened to its last
    part where that is clear.

    Args:
        choices: Each point's own values, by the same keys.
    """
    keys = list(choices[0]) if choices else []
    ends = Counter(key.rpartition(".")[2] for key in keys)
    short = {k: e if ends[e := k.rpartition(".")[2]] == 1 else k for k in keys}
    plain = ["+".join(f"{short[k]}={_plain(v)}" for k, v in one.items()) for one in choices]
    alike = Counter(name.lower() for name in plain)  # some file systems see no capitals
    found = []
    for name, one in zip(plain, choices, strict=True):
        if alike[name.lower()] > 1 or len(name) > _LONGEST:
            text = "\n".join(f"{k}={v}" for k, v in one.items())
            digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
            name = f"{name[: _LONGEST - 9]}-{digest}"
        found.append(name)
    return found


def _plain(value: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", value).strip("-") or "-"


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep."""
    return (folder / FILE).is_file()


def save(sweep: Sweep, folder: Path) -> None:
    """Write down what the sweep consists of, or see that the folder holds the same one.

    Raises:
        ConfigError: It holds another sweep, or a single run.
    """
    path = folder / FILE
    if path.is_file() and not sweep.resumed:
        _check_same(sweep, _read(path.read_text(encoding="utf-8"), path), folder)
    for result in (*sorted(folder.glob("*/*.ckpt")), *folder.glob("evaluation.json")):
        raise ConfigError(
            f"'{folder}' holds the results of a single run ({result.relative_to(folder)}): give "
            "the sweep another folder with run_dir=DIR"
        )
    tree = {
        "words": list(_own(sweep.product.words)),
        "axes": {key: list(values) for key, values in sweep.product.axes.items()},
        "points": {point.name: dict(point.choice) for point in sweep.points},
    }
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=10_000)
    with atomic_write(path, private=redact_text(text) != text) as draft:
        draft.write_text(signed(text), encoding="utf-8")


def _check_same(sweep: Sweep, saved: Mapping[str, Any], folder: Path) -> None:
    """See that a folder's sweep differs in nothing but the values of its axes."""

    def fixed(words: Sequence[str], axes: Mapping[str, Any]) -> set[str]:
        plain = [w for w in words if not _is_of(w, OF_THE_START)]
        keys = [w.partition("=")[0] for w in plain]
        return {f"{k}=(several)" if k in axes else w for k, w in zip(keys, plain, strict=True)}

    asked = fixed(sweep.product.words, sweep.product.axes)
    found = fixed(saved["words"], saved["axes"])
    if asked != found:
        differ = ", ".join(sorted(redact_text(word) for word in asked ^ found))
        raise ConfigError(
            f"'{folder}' holds a sweep with other settings ({differ}): give another folder with "
            f"run_dir=DIR, or go on with that one by resume={folder}"
        )


def _words_of(folder: Path, typed: Sequence[str]) -> list[str]:
    """The words of a sweep that goes on, with those that each start may choose anew.

    Raises:
        ConfigError: The file is not this user's own, or other words were typed.
    """
    path, more = folder / FILE, [word for word in typed if not word.startswith("resume=")]
    for word in more:
        if not _is_of(word, OF_THE_START) or word.startswith("run_dir="):
            raise ConfigError(
                f"'{folder}' is a sweep, which goes on with the settings it was begun with, and "
                f"cannot take {word}: leave it out, or begin another sweep"
            )
    text = own_text(path)
    if text is None:
        raise ConfigError(
            f"'{path}' is not as one of your own commands on this machine has written it, and "
            f"names what would be run: type the command of the sweep with run_dir={folder}"
        )
    chosen = {word.partition("=")[0] for word in more}
    kept = [w for w in _read(text, path)["words"] if w.partition("=")[0] not in chosen]
    return [*kept, *more]


def _read(text: str, path: Path) -> Mapping[str, Any]:
    try:
        tree = yaml.safe_load(text)
        words, axes = tree["words"], tree["axes"]
    except (yaml.YAMLError, TypeError, KeyError):
        words, axes = None, None
    if not isinstance(axes, dict) or not isinstance(words, list):
        raise ConfigError(f"'{path}' is damaged: delete it, and type the sweep's command again")
    return {"words": [str(word) for word in words], "axes": axes}


def _own(words: Sequence[str]) -> Iterator[str]:
    return (word for word in words if not _is_of(word, ("launch", "run_dir", "resume")))


def _is_of(word: str, sections: Sequence[str]) -> bool:
    key = word.partition("=")[0]
    return any(key == section or key.startswith(f"{section}.") for section in sections)
