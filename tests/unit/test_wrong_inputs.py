"""Every setting given wrong values: one sentence, exit code 2, and nothing left behind.

The values follow from the schema, so that a new setting is tested without a line here. Files,
checkpoints and environments that cannot be used are in test_preflight and test_from_checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest

from mapo_lightning.config.schema import unwrap, walk
from mapo_lightning.run.config import RunConfig
from mapo_lightning.run.main import main


def wrong(hint: Any) -> Iterator[str]:
    """Texts that are no value of a setting of this type."""
    inner, optional = unwrap(hint)
    kinds = get_args(inner) if get_origin(inner) is not None else (inner,)
    if not optional and inner is not str and "null" not in kinds:
        yield "null"
    if inner is bool:
        yield from ("maybe", "2")
    elif inner is int:
        yield from ("many", "1.5", "-999999999")
    elif inner is float:
        yield from ("some", "nan", "inf", "-999999999")
    elif get_origin(inner) is list:
        yield from ("{a: 1}", "[[1]]")
    elif get_origin(inner) is dict:
        yield from ("[1]", "{a: {b: 1}}")
        if str not in kinds[1:]:  # as a text, nan is as good as any
            yield "{a: nan}"
    elif inner is not str and str not in kinds:  # the words of a Literal
        yield from ("zzz", "-1")


pytestmark = pytest.mark.slow  # hundreds of compositions

CASES = [f"{setting.key}={text}" for setting in walk(RunConfig) for text in wrong(setting.type)]
SLIPS = {setting.key.rpartition(".")[0]: setting.key + "x" for setting in walk(RunConfig)}
CASES += [f"{key}=1" for key in SLIPS.values()]  # one misspelt key of each section


def test_there_are_more_than_three_hundred() -> None:
    assert len(set(CASES)) == len(CASES) > 300


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_value_is_one_sentence_and_leaves_nothing_behind(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["env=toy", "trainer=cpu", case]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    assert case.partition("=")[0].split(".")[-1].removesuffix("x") in line, line
    assert list(tmp_path.iterdir()) == []
