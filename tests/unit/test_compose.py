from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mapo_lightning.config.compose import Composed, compose
from mapo_lightning.config.renamed import Renamed
from mapo_lightning.types import ConfigError


@dataclass
class Env:
    kind: Literal["toy", "dmc"] = "toy"
    """Which simulator."""
    camera: int | str | None = None
    """Camera by number or name."""
    steps: int = 50
    """Episode length, in agent steps."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")


@dataclass
class Train:
    updates: int = 100
    """Number of updates; a long description that needs more than one line on the help page, so
    that wrapping can be seen."""
    rate: float = 1e-3
    sizes: list[int] = field(default_factory=lambda: [8, 16])
    scales: dict[str, float] = field(default_factory=lambda: {"image": 1.0})
    """Loss scales, without unit."""
    note: str = ""
    stop: str | None = None


@dataclass
class Logger:
    uri: str = "sqlite:///runs/mlflow.db"
    api_key: str = ""


@dataclass
class Run:
    env: Env = field(default_factory=Env)
    train: Train = field(default_factory=Train)
    logger: Logger | None = None
    """Where runs go; null for nowhere."""
    seed: int = 0
    """Seed of everything."""
    label_seed: int = 0


SUITE = """\
# A suite of tasks
other: "any other task is env=suite env.camera=NAME"
env: {kind: dmc, steps: 30}
train: {rate: 0.25, note: suite}
variants:
  reach: {doc: Reach for it, env: {camera: corner}, train: {note: reach}}
  push-far: {env: {camera: 2}, defaults: {size: big}}
"""
CELLS = """\
# One run per cell
defaults: {env: toy, size: small}
seed: 5
variants:
  one: {defaults: {env: suite/reach}, train: {updates: 11}}
  two: {doc: 3.5 published, defaults: {size: big}, seed: 6}
"""


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    files = {
        "config.yaml": "defaults: {size: small, env: toy, logger: null}\nseed: 1\n",
        "env/toy.yaml": "# A disc on a pad\nenv: {kind: toy, steps: 20}\ntrain: {updates: 1e3}\n",
        "env/dmc.yaml": "# dm_control\nenv: {kind: dmc}\n",
        "size/small.yaml": "train: {sizes: [1], updates: 7, rate: 0.5}\n",
        "size/big.yaml": "train: {sizes: [1, 2, 3]}\n",
        "logger/mlflow.yaml": "logger: {uri: 'http://me:pw@host/x'}\n",
        "experiment/table1.yaml": "defaults: {env: dmc, size: big}\nseed: 7\ntrain: {note: e}\n",
        "experiment/cells.yaml": CELLS,
        "env/suite.yaml": SUITE,
    }
    for name, text in files.items():
        path = tmp_path / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "conf"


def test_later_sources_win_in_the_documented_order(conf: Path) -> None:
    run = compose([], Run, conf).config

    assert run.seed == 1  # config.yaml over the dataclass
    assert run.env == Env("toy", None, 20)
    assert run.train.updates == 1000  # env comes after size in `defaults`; 1e3 is a whole number
    assert run.train.rate == 0.5
    assert run.train.sizes == [1]  # replaced whole
    assert run.logger is None
    assert compose(["train.updates=3"], Run, conf).config.train.updates == 3


def test_an_experiment_chooses_groups_unless_the_command_line_does(conf: Path) -> None:
    run = compose(["experiment=table1"], Run, conf)
    assert run.config.env.kind == "dmc"
    assert run.config.train.sizes == [1, 2, 3]
    assert run.config.seed == 7
    assert run.groups == {"size": "big", "env": "dmc", "logger": None, "experiment": "table1"}

    mixed = compose(["env=toy", "experiment=table1", "seed=9"], Run, conf).config
    assert mixed.env.kind == "toy"
    assert mixed.train.sizes == [1, 2, 3]
    assert mixed.seed == 9


def test_a_group_file_may_choose_another_group_unless_anyone_else_does(conf: Path) -> None:
    (conf / "env/far.yaml").write_text("defaults: {size: big}\nenv: {kind: dmc}\n")
    assert compose(["env=far"], Run, conf).groups["size"] == "big"
    assert compose(["env=far", "size=small"], Run, conf).groups["size"] == "small"
    (conf / "experiment/near.yaml").write_text("defaults: {env: far, size: small}\n")
    assert compose(["experiment=near"], Run, conf).groups["size"] == "small"


def test_a_variant_takes_its_file_and_sets_its_own_keys_over_it(conf: Path) -> None:
    plain = compose(["env=suite"], Run, conf).config
    assert plain.env == Env("dmc", None, 30)
    assert (plain.train.rate, plain.train.note) == (0.25, "suite")
    run = compose(["env=suite/reach"], Run, conf)
    assert run.config.env == Env("dmc", "corner", 30)
    assert (run.config.train.rate, run.config.train.note) == (0.25, "reach")
    assert run.groups["env"] == "suite/reach"
    assert compose(["env=suite/reach", "train.note=mine"], Run, conf).config.train.note == "mine"
    assert compose(["env=suite/push-far"], Run, conf).groups["size"] == "big"
    assert compose(["env=suite/push-far", "size=small"], Run, conf).groups["size"] == "small"


def test_an_experiment_of_many_cells_is_chosen_with_its_cell(conf: Path) -> None:
    one = compose(["experiment=cells/one"], Run, conf)
    assert one.groups == {
        "size": "small",
        "env": "suite/reach",
        "logger": None,
        "experiment": "cells/one",
    }
    assert (one.config.seed, one.config.train.updates, one.config.env.camera) == (5, 11, "corner")
    two = compose(["experiment=cells/two", "env=dmc"], Run, conf)
    assert (two.config.seed, two.config.env.kind, two.groups["size"]) == (6, "dmc", "big")


def test_help_lists_few_variants_and_counts_many(conf: Path) -> None:
    text = compose(["env=suite/reach", "--help"], Run, conf).text or ""
    assert (
        "    suite                    A suite of tasks\n  * suite/reach              Reach" in text
    )
    assert "    suite/push-far           size=big\n" in text  # says what it chooses
    assert "    cells/...                One run per cell\n" in text
    rows = "".join(f"  task{n}: {{doc: number {n}}}\n" for n in range(20))
    (conf / "env/many.yaml").write_text("# Many\nother: none\nvariants:\n" + rows)
    text = compose(["env=many/task7", "--help"], Run, conf).text or ""
    assert "  * many/task7               number 7\n" in text
    assert "task8" not in text
    assert "(20 variants: --help env)" in text
    assert "number 19" in (compose(["--help", "env"], Run, conf).text or "")
    with pytest.raises(ConfigError, match=r"Variants of 'env=many': 20, listed by --help env\."):
        compose(["env=many/x"], Run, conf)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("env=suite/raech", "there is no 'env=suite/raech'. Did you mean 'env=suite/reach'? Var"),
        ("env=suite/hop", "Variants of 'env=suite': reach, push-far. Any other task is env=suite"),
        ("env=suite/hop", " env.camera=hop."),
        ("env=reach", "Did you mean 'suite/reach'? Files in conf/env: dmc, suite, toy."),
        ("env=suite_push_far", "Did you mean 'suite/push-far'?"),
        ("env=dmc/reach", "Did you mean 'env=suite/reach'? 'env=dmc' has no variants."),
        ("env=toy/x", "there is no 'env=toy/x'. 'env=toy' has no variants."),
        ("env=suite/", "there is no 'env=suite/'."),
        (
            "experiment=cells",
            "'experiment=cells' has 2 variants: choose one, such as experiment=ce",
        ),
        ("experiment=cells/tow", "Did you mean 'experiment=cells/two'? Variants of"),
        ("experiment=one", "Did you mean 'cells/one'?"),
    ],
)
def test_an_unknown_variant_is_refused_with_the_near_ones(
    conf: Path, word: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([word], Run, conf)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


RENAMED = Renamed(
    {"note": "train.note", "env": "env.kind", "train.lr": "train.rate"},
    {"env=cartoon": "env=suite/reach"},
    {"train.rate": {2: 3, True: 4}, "train.sizes": {1: 2}, "seed.no": {1: 2}},
)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["note=x=y"], "note is now train.note: write train.note=x=y"),
        (["train.lr=1"], "train.lr is now train.rate: write train.rate=1"),
        (["env=cartoon"], "'env=cartoon' is now 'env=suite/reach': write env=suite/reach"),
        (
            ["config=old.yaml"],
            "old.yaml: renamed: env is now env.kind, train.lr is now train.",
        ),
        (["experiment=old"], "conf/experiment/old.yaml: renamed: note is now train.note"),
        (["experiment=older"], "'env=cartoon' is now 'env=suite/reach'"),
        (["experiment=oldest"], "'seed' is a key, not a group: write it beside 'defaults', not"),
        (["experiment=rows/a"], "rows.yaml, variant 'a': renamed: train.lr is now train.rate"),
        (["--help", "train.lr"], "train.lr is now train.rate"),
    ],
)
def test_renamed_words_are_refused_with_their_successor(
    conf: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (conf / "experiment/old.yaml").write_text("note: x\n")
    (conf / "experiment/older.yaml").write_text("defaults: {env: cartoon}\n")
    (conf / "experiment/oldest.yaml").write_text("defaults: {seed: 3}\n")
    (conf / "experiment/rows.yaml").write_text("variants: {a: {train: {lr: 2}}}\n")
    monkeypatch.chdir(conf)
    Path("old.yaml").write_text("env: toy\ntrain: {lr: 2}\n")
    with pytest.raises(ConfigError) as caught:
        compose(words, Run, conf, renamed=RENAMED)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_renamed_keys_and_values_are_translated_and_new_ones_stay() -> None:
    old = {"env": "toy", "note": "x", "train": {"lr": 2, "sizes": [1]}}
    new = {"env": {"kind": "toy"}, "train": {"rate": 3, "sizes": [1], "note": "x"}}
    assert RENAMED.translate(old) == new == RENAMED.translate(new)
    assert old == {"env": "toy", "note": "x", "train": {"lr": 2, "sizes": [1]}}


def test_every_section_is_built_once(conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    monkeypatch.setattr(Env, "__post_init__", lambda self: built.append(self.steps))
    compose(["env.steps=17"], Run, conf)
    assert built.count(17) == 1


def test_null_chooses_no_file_and_empties_a_section_that_may_be_empty(conf: Path) -> None:
    assert compose(["size=null"], Run, conf).config.train.sizes == [8, 16]
    assert compose(["logger=mlflow"], Run, conf).config.logger is not None
    assert compose(["logger=mlflow", "logger=null"], Run, conf).config.logger is None
    assert compose(["logger.uri=here"], Run, conf).config.logger == Logger(uri="here")


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("train.updates=1e5", 100_000),
        ("train.rate=1e-4", 1e-4),
        ("train.rate=2", 2.0),
        ("train.sizes=[4, 1e2]", [4, 100]),
        ("train.scales={kl: 2}", {"image": 1.0, "kl": 2.0}),
        ("train.scales.kl=2", {"image": 1.0, "kl": 2.0}),
        ("train.note=1e5", "1e5"),
        ("train.note=a: b", "a: b"),
        ("train.note=x=y", "x=y"),
        ("train.note='null'", "null"),
        ('train.note=""', ""),
        ("train.stop=null", None),
        ("train.stop=yes", "yes"),
        ("env.camera=2", 2),
        ("env.camera=corner", "corner"),
        ("env.camera=null", None),
    ],
)
def test_values_are_read_as_the_schema_wants_them(conf: Path, word: str, value: object) -> None:
    run = compose([word], Run, conf).config
    section, name = word.partition("=")[0].split(".")[:2]
    found = getattr(getattr(run, section), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["env.stps=3"], "unknown configuration key 'env.stps'. Did you mean 'env.steps'? Keys"),
        (["updates=3"], "unknown configuration key 'updates'. Did you mean 'train.updates'?"),
        (["evn=toy"], "unknown configuration key 'evn'. Did you mean 'env'?"),
        (["seed.x=3"], "'seed' is a single value and has no keys below it."),
        (["env=toi"], "there is no 'env=toi'. Did you mean 'toy'? Files in conf/env: dmc, suite, "),
        (["env=../env/toy"], "there is no 'env=../env/toy'."),
        (["experiment=none"], "Files in conf/experiment: cells, table1."),
        (["train.updates=many"], "'train.updates' must be int, got 'many'."),
        (["train.updates=1.5"], "'train.updates' must be int, got 1.5."),
        (["train.updates=true"], "'train.updates' must be int, got True."),
        (["train.updates=null"], "'train.updates' must be int, got None."),
        (["train.sizes=[a]"], "'train.sizes' must be list of int, got ['a']."),
        (["train.sizes.0=1"], "'train.sizes' is a single value"),
        (["env.kind=toi"], "must be one of toy, dmc, got 'toi'. Did you mean 'toy'?"),
        (["env=null", "env.steps=0"], "env.steps must be at least 1, got 0"),
        (["env=3"], "there is no 'env=3'."),
        (["--amp"], "cannot read '--amp' on the command line: write amp=VALUE"),
        (["foo"], "cannot read 'foo' on the command line: write foo=VALUE"),
        (["+experiment=x"], "write experiment=x, without any sign before it"),
        (["--env=toy"], "write env=toy, without any sign before it"),
        (["seed="], "write seed=null to switch it off"),
        (["=3"], "cannot read '=3' on the command line: write name=value."),
        (["train.sizes=[1,"], "cannot read the value of 'train.sizes=[1,':"),
        (["train.rate=${nope}"], "cannot resolve 'train.rate': Interpolation key 'nope'"),
        (["train.rate=${oc.env:MAPO_NOT_SET}"], "cannot resolve 'train.rate': Environment"),
        (["config=missing.yaml"], "cannot read the configuration file 'missing.yaml':"),
        (["--help", "nothing"], "there is no group or key 'nothing'."),
    ],
)
def test_every_mistake_gets_one_clear_sentence(conf: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(words, Run, conf)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("env/toy.yaml", "env: {stps: 3}", "conf/env/toy.yaml: unknown configuration key"),
        ("env/toy.yaml", "env: {steps: x}", "conf/env/toy.yaml: 'env.steps' must be int"),
        ("env/toy.yaml", "env: 3", "conf/env/toy.yaml: 'env' must be a section of keys, got 3."),
        ("env/toy.yaml", "env: null", "'env' must be a section of keys, got None."),
        ("env/toy.yaml", "- 3", "must hold named keys at its root"),
        ("env/toy.yaml", "env: [", "cannot read the configuration file"),
        ("env/toy.yaml", "defaults: {sizes: big}", "unknown configuration group 'sizes'"),
        ("config.yaml", "defaults: {envs: toy}", "unknown configuration group 'envs'"),
        ("config.yaml", "defaults: [toy]", "must map groups to files"),
        ("env/toy.yaml", "variants: [a]", "must map names to blocks, got ['a']."),
        ("env/toy.yaml", "other: x\nvariants: {a: 3}", "variant 'a' in "),
        ("env/toy.yaml", "other: x\nvariants: {a: {defaults: 3}}", "must map groups to files"),
        ("config.yaml", "defaults: {env: gone}", "there is no 'env=gone'."),
    ],
)
def test_mistakes_in_files_name_the_file(conf: Path, name: str, text: str, message: str) -> None:
    (conf / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        compose(["env=toy"] if name != "config.yaml" else [], Run, conf)
    assert message in str(caught.value)


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration folder"):
        compose([], Run, tmp_path / "gone")


def test_help_lists_groups_files_and_documented_fields(conf: Path) -> None:
    text = compose(["env=dmc", "--help"], Run, conf).text or ""
    assert "  * dmc                      dm_control" in text
    assert "    toy                      A disc on a pad" in text
    assert "env.steps = 50   (int)\n      Episode length, in agent steps." in text
    assert "env.kind = dmc   (one of toy, dmc)" in text
    assert "train.stop = null   (str or null)" in text
    assert "that wrapping can be seen." in text
    assert max(map(len, text.splitlines())) <= 100


def test_help_can_be_narrowed(conf: Path) -> None:
    text = compose(["--help", "env"], Run, conf).text or ""
    assert "env.steps" in text
    assert "train.updates" not in text
    assert "  size\n" not in text
    assert "train.scales" in (compose(["-h", "train.scales"], Run, conf).text or "")


def test_show_prints_the_run_without_running(conf: Path) -> None:
    run = compose(["seed=5", "--show"], Run, conf)
    assert run.text == run.redacted_yaml
    assert "seed: 5" in run.redacted_yaml
    assert compose(["seed=5"], Run, conf).text is None


def test_a_saved_run_comes_back_identical(conf: Path, tmp_path: Path) -> None:
    words = ["experiment=table1", "label_seed=${seed}", "train.note='null'", "logger=mlflow"]
    first = compose([*words, "train.scales.kl=0.1"], Run, conf)
    first.save(tmp_path / "runs" / "config.yaml")

    again = compose([f"config={tmp_path}/runs/config.yaml"], Run, conf)

    assert again.config == first.config
    assert again.yaml == first.yaml
    assert first.config.label_seed == 7
    assert "label_seed: 7" in first.yaml
    changed = compose([f"config={tmp_path}/runs/config.yaml", "env=toy", "seed=3"], Run, conf)
    assert changed.config.env.steps == 20
    assert changed.config.seed == 3
    assert changed.config.train.scales == {"image": 1.0, "kl": 0.1}


def test_the_environment_is_used_but_never_written(
    conf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAPO_CANARY", "canary-1")
    key = "logger.api_key=${oc.env:MAPO_CANARY}"
    run = compose([key, "train.note=${logger.api_key}/x"], Run, conf)
    assert run.config.logger == Logger(api_key="canary-1")
    assert run.config.train.note == "canary-1/x"
    assert "canary" not in run.yaml + run.redacted_yaml + str(run.flat)
    assert run.flat["logger.api_key"] == "${oc.env:MAPO_CANARY}"


def _everything_shown(run: Composed[Run]) -> str:
    return run.redacted_yaml + str(run.flat) + (run.text or "")


@pytest.mark.parametrize("option", ["--show", "--help"])
def test_secrets_are_not_shown(conf: Path, option: str) -> None:
    words = ["logger=mlflow", "logger.api_key=canary-2", "train.note=hf_abcdefghijklmnopqrst"]
    run = compose([*words, option], Run, conf)
    shown = _everything_shown(run)
    assert "canary-2" not in shown
    assert "pw@" not in shown
    assert "hf_abc" not in shown
    assert run.flat["logger.uri"] == "http://***@host/x"


def test_a_saved_secret_is_private(conf: Path, tmp_path: Path) -> None:
    compose([], Run, conf).save(tmp_path / "open.yaml")
    compose(["logger.api_key=canary"], Run, conf).save(tmp_path / "secret.yaml")
    assert (tmp_path / "open.yaml").stat().st_mode & 0o077
    assert not (tmp_path / "secret.yaml").stat().st_mode & 0o077


@pytest.mark.slow
@settings(max_examples=50)
@given(text=st.text(min_size=1, max_size=30))
def test_any_word_is_read_or_refused_in_our_own_words(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "empty_conf"
    folder.mkdir(exist_ok=True)
    for word in (text, f"train.note={text}", f"env.camera={text}"):
        with contextlib.suppress(ConfigError):
            compose([word], Run, folder)
