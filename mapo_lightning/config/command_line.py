"""Takes a command line apart: ``key=value`` words and the options, such as ``--help [PREFIX]``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mapo_lightning.types import ConfigError, MapoError


@dataclass
class CommandLine:
    """The words of a command line, sorted."""

    overrides: list[str] = field(default_factory=list)
    """Words of the form ``name=value``, in their order."""

    help: str | None = None
    """What follows ``--help``; empty for the whole page, None where help is not wanted."""

    show: bool = False
    """Print the resolved run and stop."""

    preflight: bool = False
    """Measure the run in place of making it."""

    @classmethod
    def parse(cls, argv: Sequence[str]) -> CommandLine:
        """Sort the words.

        Raises:
            ConfigError: A word is neither an option nor ``name=value``.
        """
        words, rest = cls(), list(argv)
        while rest:
            word = rest.pop(0)
            if word in ("--help", "-h"):
                follows = bool(rest) and "=" not in rest[0] and not rest[0].startswith("-")
                words.help = rest.pop(0) if follows else ""
            elif word == "--show":
                words.show = True
            elif word == "--preflight":
                words.preflight = True
            else:
                words.overrides.append(_checked(word))
        return words


def _checked(word: str) -> str:
    key, equals, value = word.partition("=")
    bare = key.strip().lstrip("-+~")
    if equals and value and bare and bare == key:
        return word
    if equals and not value and bare == key and key:
        advice = f"write {key}=null to switch it off, or {key}=\"''\" for an empty text"
    elif bare and equals:
        advice = f"write {bare}={value}, without any sign before it"
    elif bare:
        advice = f"write {bare}=VALUE; the only options are --help [PREFIX], --show and --preflight"
    else:
        advice = "write name=value"
    raise ConfigError(f"cannot read '{word}' on the command line: {advice}.")


def checkpoints_of(words: Sequence[str], program: str, what: str) -> tuple[list[Path], list[str]]:
    """Take the words ``checkpoint=PATH`` out, which may be given several times.

    Args:
        words: Of the command line.
        program: Name of the command, for the message.
        what: What the checkpoint is to be of, for the message.

    Returns:
        The paths, and the other words.

    Raises:
        ConfigError: There is none.
    """
    paths = [Path(w.partition("=")[2]) for w in words if w.startswith("checkpoint=")]
    if not paths:
        raise ConfigError(f"{program} needs checkpoint=PATH of a {what} model")
    return paths, [word for word in words if not word.startswith("checkpoint=")]


def small_program(
    argv: Sequence[str] | None, usage: str, work: Callable[[list[str]], object]
) -> int:
    """Run a program that takes words and no options but ``--help``.

    Args:
        argv: Words without the program's name; None: those of this process.
        usage: What is printed where there is no word, or help is asked for.
        work: Gets the words.

    Returns:
        The exit code: 0, or 2 after a `MapoError`, which is printed as one sentence.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or {"-h", "--help"} & set(words):
        sys.stdout.write(usage)
        return 0
    try:
        work(words)
    except MapoError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0
