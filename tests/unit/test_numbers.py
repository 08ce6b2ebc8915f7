"""Numbers of a configuration: whole ones are in base ten, and all of them are finite."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mapo_lightning.config.compose import compose, from_base, load_yaml
from mapo_lightning.config.schema import walk
from mapo_lightning.run.config import RunConfig, conf_folder
from mapo_lightning.training.settings import (
    EvaluateConfig,
    FinetuneConfig,
    OptimizerConfig,
    PretrainConfig,
)
from mapo_lightning.types import ConfigError

FLOATS = [f.key for f in walk(RunConfig) if "float" in str(f.type)]


def test_the_schema_has_settings_that_are_floats() -> None:
    assert len(FLOATS) > 30
    assert {"pretrain.lr", "finetune.objective.scales", "data.rate"} <= set(FLOATS)


ODD = [(key, "nan") for key in FLOATS]
ODD += [("pretrain.lr", word) for word in ("inf", "-inf", ".nan", "-.inf", "1e400", "NaN")]


@pytest.mark.slow
@pytest.mark.parametrize(("key", "word"), ODD)
def test_no_setting_takes_what_is_not_finite(key: str, word: str) -> None:
    value = f"{{image: {word}}}" if key.endswith(".scales") else word
    with pytest.raises(ConfigError, match=f"'?{key}'? must be a finite number, got -?(nan|inf)"):
        compose([f"{key}={value}"], RunConfig, conf_folder())


def test_a_file_and_a_reference_are_checked_as_well() -> None:
    for tree in ({"lr": math.nan}, {"lr": "${agent.entropy}"}):
        base: dict[str, Any] = {"pretrain": tree, "agent": {"entropy": math.inf}}
        with pytest.raises(ConfigError, match=r"must be a finite number, got (nan|inf)"):
            from_base(("old.yaml", base), RunConfig)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_learning_rates_of_settings_made_in_python_are_checked(value: float) -> None:
    for make in (
        lambda: PretrainConfig(lr=value),
        lambda: FinetuneConfig(lr_actor=value),
        lambda: OptimizerConfig(eps=value),
    ):
        with pytest.raises(ConfigError, match=r"must be positive and finite.*, got"):
            make()
    # A norm of zero means no clipping.
    norm = value or -1.0
    with pytest.raises(ConfigError, match="max_grad_norm must be finite and not negative, got"):
        OptimizerConfig(max_grad_norm=norm)


@dataclass
class Inner:
    count: int = 1
    rate: float = 1.0
    sizes: list[int] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    view: int | str | None = None
    note: str = ""


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)


WORDS = [
    ("count", "010", 10),
    ("count", "-010", -10),
    ("count", "+007", 7),
    ("count", "09", 9),
    ("count", "00", 0),
    ("count", "0_10", 10),
    ("count", "1_000", 1000),
    ("count", "1e3", 1000),
    ("rate", "010", 10.0),
    ("rate", "00.5", 0.5),
    ("sizes", "[010, 8, 020]", [10, 8, 20]),
    ("names", "{a: 010, '010': 3}", {"a": 10, "010": 3}),
    ("view", "010", 10),
    ("view", "'010'", "010"),
    ("note", "010", "010"),
    ("note", "1:30", "1:30"),
]


@pytest.mark.parametrize(("name", "word", "value"), WORDS)
def test_a_leading_zero_means_nothing(name: str, word: str, value: object, tmp_path: Path) -> None:
    """YAML 1.1 would read 010 as eight."""
    found = getattr(compose([f"inner.{name}={word}"], Outer, tmp_path).config.inner, name)
    assert (found, type(found)) == (value, type(value))
    if name == "note":
        return
    file = tmp_path / "saved.yaml"
    file.write_text(f"# a remark 010\ninner:\n  {name}: {word}\n")
    found = getattr(compose([f"config={file}"], Outer, tmp_path).config.inner, name)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("word", ["1:30", "0x10", "0b11", "0o17"])
def test_no_whole_number_is_read_in_another_base(word: str, tmp_path: Path) -> None:
    if word in ("0x10", "0b11"):  # written on purpose: YAML's own way to say sixteen and three
        run = compose([f"inner.count={word}"], Outer, tmp_path).config
        assert run.inner.count == {"0x10": 16, "0b11": 3}[word]
        return
    with pytest.raises(ConfigError, match=r"'inner.count' must be int, got"):
        compose([f"inner.count={word}"], Outer, tmp_path)


def test_the_shape_of_a_file_stays(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(
        "a: &x {n: 010, t: 'two\n\n  lines'}\nb: *x\nc: [1e5, 0.5, .5, yes, ~, 2026-01-02]\n"
        "d: |\n  kept 010\n  1:30\ne: ${a.n}\n"
    )
    assert load_yaml(file) == {
        "a": {"n": 10, "t": "two\nlines"},
        "b": {"n": 10, "t": "two\nlines"},
        "c": [1e5, 0.5, 0.5, True, None, "2026-01-02"],
        "d": "kept 010\n1:30\n",
        "e": "${a.n}",
    }
    file.write_text("a: 010\na: 2\n")
    with pytest.raises(ConfigError, match="duplicate key a"):
        load_yaml(file)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=-1"], r"seed must lie in \[0, 4294967296\), got -1"),
        (["seed=4294967296"], r"seed must lie in \[0, 4294967296\), got 4294967296"),
        (["evaluate.seed=-1"], r"evaluate.seed must lie in \[0, 4294967296 - episodes\]"),
        (["evaluate.seed=4294967296"], r"evaluate.seed must lie in.*got 4294967296"),
        (["evaluate.seed=4294967295"], "got 4294967295 with episodes=10"),
        (["env.seed=-1"], "unknown configuration key 'env.seed'"),
        (
            ["env=dmc/walker_run", "finetune.chunk_length=3"],
            "finetune.chunk_length must be at least world_model.bonus.window, got 3 and 5",
        ),
    ],
)
def test_seeds_and_chunks_out_of_range_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(words, RunConfig, conf_folder())


def test_the_largest_seeds_are_taken() -> None:
    cfg = compose([f"seed={2**32 - 1}"], RunConfig, conf_folder()).config
    assert cfg.seed == 2**32 - 1
    last = EvaluateConfig(seed=2**32 - 10, episodes=10)
    assert max(last.seeds) == 2**32 - 1
    for one in (last, EvaluateConfig(seed=2**32 - 15, episodes=10)):
        assert not set(one.unseen.seeds) & set(one.seeds)
