"""Finds stored labels that are no answers: thoughts, refusals, and answers that were cut.

Version 0.1.0 stored whatever a describer said. Removing such a label makes the next run that needs
it query the describer again.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from mapo_lightning.semantics.answers import stored_fault
from mapo_lightning.semantics.phrase import clean_text
from mapo_lightning.semantics.store import LabelStore
from mapo_lightning.types import DescriberError

_REASON = 40  # characters of a reason: what a refusal says differs from label to label


class Checked(NamedTuple):
    """What a check of a label store found."""

    labels: int
    faults: dict[str, str]
    """Key of a label that is no answer -> why."""
    counts: dict[tuple[str, str], int]
    """(describer, kind of fault) -> labels."""
    examples: dict[tuple[str, str], str]
    """(describer, kind of fault) -> one of them: its window and its text."""

    def lines(self) -> list[str]:
        """Return the findings for people."""
        found = [f"{self.labels} labels, {len(self.faults)} of them are no answers"]
        for (describer, why), count in sorted(self.counts.items()):
            found.append(f"  {count} by '{describer}': {why}; {self.examples[describer, why]}")
        return found


def check_labels(store: Path) -> Checked:
    """Look through all labels of a store; changes nothing.

    Raises:
        DescriberError: The folder holds no labels.
    """
    if not any(store.glob("*.sqlite")):
        raise DescriberError(f"'{store}' is not a label store: it holds no .sqlite file")
    labels, faults = 0, dict[str, str]()
    counts, examples = Counter[tuple[str, str]](), dict[tuple[str, str], str]()
    for key, label in LabelStore(store, "check").ordered(hidden=False):
        labels += 1
        why = stored_fault(label)
        if why is None:
            continue
        kind = clean_text(label.describer, 120), why.partition(":")[0][:_REASON]
        faults[key] = why
        counts[kind] += 1
        source, text = clean_text(label.source, 80), clean_text(label.text, 60)
        examples.setdefault(kind, f"such as {source}: '{text}'")
    return Checked(labels, faults, dict(counts), examples)
