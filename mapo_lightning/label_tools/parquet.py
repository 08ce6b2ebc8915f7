"""Exports labels to one Parquet file, to keep, share and read with other tools; imports and checks.

mapo-labels export runs/cache/labels labels.parquet
mapo-labels import labels.parquet runs/cache/labels
mapo-labels show labels.parquet
mapo-labels check runs/cache/labels            finds labels that are no answers; exit code 1 if any
mapo-labels check runs/cache/labels --remove   removes them: the next run asks about them again
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mapo_lightning.files import atomic_write
from mapo_lightning.label_tools.check import check_labels
from mapo_lightning.semantics.answers import stored_fault
from mapo_lightning.semantics.phrase import (
    MAX_SLOT,
    MAX_SOURCE,
    MAX_TEXT,
    PROMPT,
    SLOTS,
    Phrase,
    clean_text,
)
from mapo_lightning.semantics.store import LabelStore, StoredLabel
from mapo_lightning.types import DescriberError, MapoError

log = logging.getLogger("mapo")

_ROWS = 4096  # labels in one group of rows: bounds memory
_CARD = b"mapo_label_card"
_WORDS = ["key", "describer", "source", "status", "text", *SLOTS]
_SCHEMA = pa.schema(
    [pa.field(name, pa.string()) for name in _WORDS] + [pa.field("hidden", pa.list_(pa.float16()))]
)
_STATUSES = ("slots", "prose", "null", "unreadable")


def export_labels(store: Path, file: Path) -> int:
    """Write all labels of a store into one Parquet file, by key, and a data card beside it.

    The same labels give the same bytes, in whatever order they were made.

    Args:
        store: Folder of the label store.
        file: Written as a whole; the data card is ``file`` with the suffix ``.md``.

    Returns:
        Number of labels.

    Raises:
        DescriberError: The folder holds no labels.
    """
    if not any(store.glob("*.sqlite")):
        raise DescriberError(f"'{store}' is not a label store: it holds no .sqlite file")
    counts = Counter[tuple[str, str]]()
    with (
        atomic_write(file) as draft,
        pq.ParquetWriter(draft, _SCHEMA, compression="zstd") as writer,
    ):
        labels = LabelStore(store, "export").ordered()
        while group := list(islice(labels, _ROWS)):
            counts.update((label.describer, label.status) for _, label in group)
            rows = [_to_row(key, label) for key, label in group]
            writer.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))
        card = _card(counts)
        writer.add_key_value_metadata({_CARD: json.dumps(card, sort_keys=True)})
    file.with_suffix(".md").write_text(_card_text(card, file.name), encoding="utf-8")
    return counts.total()


class Imported(NamedTuple):
    """Numbers of labels in an imported file."""

    new: int
    known: int
    """The store had a label of the same window; it stays."""
    no_answer: int
    """Thoughts, refusals and the like, which are left out."""


def import_labels(file: Path, store: Path) -> Imported:
    """Put the labels of a Parquet file into a store; those already in it stay unchanged.

    Nothing in the file is trusted: texts are cleaned and bounded, everything else is checked.

    Returns:
        What became of them.

    Raises:
        DescriberError: The file is not a label file, or holds a row that is not a label.
    """
    try:
        table = pq.ParquetFile(file)
        missing = set(_SCHEMA.names) - set(table.schema_arrow.names)
        if missing:
            raise DescriberError(f"'{file}' holds no labels: it has no column {min(missing)}")
        target, counts = LabelStore(store, "import"), np.zeros(3, int)
        for group in table.iter_batches(_ROWS, columns=_SCHEMA.names):
            rows = dict(_from_row(row) for row in group.to_pylist())
            labels = {key: label for key, label in rows.items() if stored_fault(label) is None}
            known = target.get(labels)
            target.put({key: label for key, label in labels.items() if key not in known})
            counts += len(labels) - len(known), len(known), len(rows) - len(labels)
        target.close()
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        raise DescriberError(f"cannot read labels from '{file}': {error}") from error
    return Imported(*counts.tolist())


def read_card(file: Path) -> dict[str, Any]:
    """Return the data card of a label file.

    Raises:
        DescriberError: It has none.
    """
    try:
        metadata = pq.read_metadata(file).metadata or {}
        card: dict[str, Any] = json.loads(metadata[_CARD])
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise DescriberError(f"'{file}' is not a label file: {error}") from error
    return card


def _to_row(key: str, label: StoredLabel) -> dict[str, Any]:
    slots = label.phrase or (None,) * len(SLOTS)
    return {
        "key": key, "describer": label.describer, "source": label.source, "status": label.status,
        "text": label.text, **dict(zip(SLOTS, slots, strict=True)),
        "hidden": None if label.hidden is None else label.hidden,
    }  # fmt: skip


def _from_row(row: dict[str, Any]) -> tuple[str, StoredLabel]:
    """Check one row.

    Raises:
        ValueError: It is not a label.
    """
    key, status = str(row["key"]), row["status"]
    if not re.fullmatch(r"[0-9a-f]{32}", key):
        raise ValueError(f"a key must be 32 hexadecimal digits, got {key[:40]!r}")
    if status not in _STATUSES:
        raise ValueError(f"label {key} has the unknown status {str(status)[:40]!r}")
    slots = [row[name] for name in SLOTS]
    phrase = None
    if status in ("slots", "prose"):
        phrase = Phrase(*(clean_text(str(slot or ""), MAX_SLOT) for slot in slots))
    hidden = None if row["hidden"] is None else np.asarray(row["hidden"], np.float16)
    if hidden is not None and not np.isfinite(hidden).all():
        raise ValueError(f"label {key} has a hidden state that is not finite")
    text, describer = (clean_text(str(row[name]), MAX_TEXT) for name in ("text", "describer"))
    source = clean_text(str(row["source"]), MAX_SOURCE)
    return key, StoredLabel(text, status, phrase, hidden, describer, source)


def _card(counts: Counter[tuple[str, str]]) -> dict[str, Any]:
    describers: dict[str, dict[str, int]] = {}
    for (describer, status), count in sorted(counts.items()):
        describers.setdefault(describer, dict.fromkeys(_STATUSES, 0))[status] = count
    return {"format": 1, "labels": counts.total(), "describers": describers, "prompt": PROMPT}


def _card_text(card: dict[str, Any], name: str) -> str:
    lines = [
        f"# {name}", "",
        f"{card['labels']} labels: what a describer says happens in windows of video.", "",
        "| describer | slots | prose | null | unreadable |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for describer, by_status in card["describers"].items():
        counts = " | ".join(str(by_status[status]) for status in _STATUSES)
        lines.append(f"| {clean_text(describer, MAX_TEXT).replace('|', ' ')} | {counts} |")
    lines += ["", "Columns: `key` names the frames and the describer (a hash); `source` is for"]
    lines += ["people; the five slots; `text` is the raw answer, cleaned; `hidden` the describer's"]
    lines += [
        "mean hidden state, where it has one. The labels are a model's guesses, not ground truth."
    ]
    return "\n".join([*lines, "", f"Prompt: {card['prompt']}", ""])


def _check(store: Path, remove: bool) -> int:
    """Report labels that are no answers, and remove them if asked to; returns the exit code."""
    found = check_labels(store)
    for line in found.lines():
        log.info("%s", line)
    if not found.faults:
        return 0
    if not remove:
        log.info("--remove removes them: the next run that needs these labels asks for them again")
        return 1
    labels = LabelStore(store, "check")
    log.info("%d labels removed", labels.remove(found.faults))
    labels.close()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(prog="mapo-labels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    for command, places in (
        ("export", ("store", "file")), ("import", ("file", "store")), ("show", ("file",)),
        ("check", ("store",)),
    ):  # fmt: skip
        added = commands.add_parser(command)
        for place in places:
            added.add_argument(place, type=Path)
        if command == "check":
            added.add_argument("--remove", action="store_true", help="so that they are asked again")
    words = parser.parse_args(argv)
    try:
        if words.command == "check":
            return _check(words.store, words.remove)
        if words.command == "export":
            log.info("%d labels -> %s", export_labels(words.store, words.file), words.file)
        elif words.command == "import":
            found = import_labels(words.file, words.store)
            log.info(
                "%d new labels, %d known before, %d left out because they are no answers -> %s",
                *found,
                words.store,
            )
        else:
            log.info("%s", _card_text(read_card(words.file), words.file.name))
    except MapoError as error:
        log.error("error: %s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
