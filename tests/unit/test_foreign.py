"""What a stranger's settings may choose: a list of what is taken, and sentences for the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from strangers import greedy_words, write_agent
from test_agent import CONF

from mapo_lightning.config.schema import lookup, section, walk
from mapo_lightning.run.config import RunConfig
from mapo_lightning.run.foreign import ALLOWED, REFUSED, bound_of, settings_of, taken
from mapo_lightning.run.from_checkpoint import agent_settings, configure, resumed
from mapo_lightning.types import CheckpointError, ConfigError, MapoError

LEAVES = sorted({leaf.key for leaf in walk(RunConfig)})
HERE = Path("theirs.ckpt")


def covering(key: str, listed: Any) -> list[str]:
    parts = key.split(".")
    return [p for end in range(1, len(parts) + 1) if (p := ".".join(parts[:end])) in listed]


@pytest.mark.slow
@pytest.mark.parametrize("key", LEAVES)
def test_every_setting_is_either_taken_or_refused(key: str) -> None:
    taken_by, refused_by = covering(key, ALLOWED), covering(key, REFUSED)
    assert bool(taken_by) != bool(refused_by), (
        f"{key} must be in ALLOWED or in REFUSED of run/foreign.py: may a strange file choose it?"
    )
    assert (bound_of(key) is not None) == bool(taken_by)


def test_no_listed_key_is_unknown() -> None:
    for key in [*ALLOWED, *REFUSED]:
        lookup(RunConfig, key)
    # A section that may grow settings of another kind is not taken as a whole.
    whole = {key for key in ALLOWED if section(lookup(RunConfig, key)) is not None}
    assert not whole & {"data", "env", "vlm", "evaluate", "callbacks", "tracking", "trainer"}


def plain(value: Any) -> dict[str, Any]:
    return {"world_model": {"head_units": value}}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (plain(10**9), "'world_model.head_units' is 1e\\+09, which is beyond 65536"),
        (plain("1000000000"), "beyond 65536"),
        (plain(float("nan")), "is nan"),
        (plain("${oc.env:HOME}"), "refers to something else"),
        (plain(["${a}"]), "refers to something else"),
        (plain({1, 2}), "neither text nor a number"),
        ({"env": {"name": "x\x1b[2J"}}, "'env.name' is no name"),
        ({"env": {"name": "x" * 201}}, "'env.name' is no name"),
        ({"data": {"classes": ["a"] * 1001}}, "has 1001 entries"),
        ({"method": "../../tmp/x"}, "'method' is no name"),
        ({"world_model": {"head_layers": 65}}, "beyond 64"),
        ({"agent": {"horizon": 10**9}}, "beyond 65536"),
    ],
)
def test_a_value_out_of_bounds_is_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence) as caught:
        taken(settings, HERE, {}, videos=False)
    assert str(caught.value).isprintable()
    words = {"world_model.head_units": "8"} if "head_units" in str(settings) else None
    if words:
        assert "head_units" not in taken(settings, HERE, words, False).get("world_model", {})


@pytest.mark.parametrize(
    "text",
    ["a: &x [1]\nb: *x\n", "[" * 30 + "]" * 30, "a: " + "9" * 5000, "a: 2001-99-99", "a: [",
     "? [1]\n", "x" * 1_000_001, "- 1", "5", "", "a: !!python/object/apply:os.system [touch x]"],
    ids=["alias", "deep", "digits", "date", "torn", "list as a key", "long", "list", "number",
         "nothing", "code"],
)  # fmt: skip
def test_settings_that_are_none_are_one_sentence(text: str, in_tmp: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        taken(settings_of(text, HERE), HERE, {}, False) if text != "? [1]\n" else settings_of(
            text, HERE
        )
    assert "\n" not in str(caught.value)
    assert list(in_tmp.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "words", "sentence"),
    [
        ({"vlm": {"kind": "openai"}}, {}, "add vlm.server.base_url=URL vlm.model=NAME"),
        ({"vlm": {"kind": "openai"}}, {"vlm.model": "x"}, "or vlm=none to act without"),
        ({"vlm": {"kind": "openai"}}, {"vlm.server.base_url": "http://127.0.0.1:9/v1"}, ""),
        ({"vlm": {"kind": "openai"}}, {"vlm": "none"}, ""),
        ({"vlm": {"kind": "transformers"}}, {}, "add vlm.model=NAME, or vlm=qwen2_5_vl_7b"),
        ({"vlm": {"kind": "transformers"}}, {"vlm": "qwen2_5_vl_7b"}, ""),
        ({"vlm": {"embed": {"encoder": "/x"}}}, {}, "add vlm.embed.encoder=NAME"),
        ({"vlm": {"embed": {"encoder": "wordllama"}}}, {}, ""),
        ({"env": {"kind": "gym", "name": "evil:T-v0"}}, {}, "add env.name=evil:T-v0"),
        ({"env": {"kind": "gym", "name": "evil:T-v0"}}, {"env.name": "Pendulum-v1"}, ""),
        ({"env": {"kind": "gym", "name": "Pendulum-v1"}}, {}, ""),
        (
            {"vlm": {"kind": "openai"}, "world_model": {"source": {"kind": "null"}}},
            {},
            "",
        ),
    ],
)
def test_what_a_file_may_not_choose_is_asked_for(
    settings: dict[str, Any], words: dict[str, str], sentence: str
) -> None:
    if not sentence:
        kept = taken(settings, HERE, words, False)
        assert "server" not in kept["vlm"]
        return
    with pytest.raises(ConfigError) as caught:
        taken(settings, HERE, words, False)
    assert sentence in str(caught.value)
    assert "a file that somebody else has made may not choose" in str(caught.value)


@pytest.mark.slow
def test_a_strangers_run_is_resumed_elsewhere_and_tracked_by_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAPO_CANARY", "x")
    words = greedy_words("http://127.0.0.1:9", tmp_path / "outside")
    words += ["method=contextwm", "seed=5", "trainer.devices=4", "finetune.agent_steps=7000"]
    path = write_agent(tmp_path / "run/finetune/last.ckpt", *words)
    cfg = configure([f"resume={tmp_path}/run", "work_dir=mine"], CONF).config
    assert (cfg.stage, cfg.method, cfg.seed) == ("finetune", "contextwm", 5)
    assert (cfg.finetune.agent_steps, cfg.callbacks.codebook) == (7000, False)
    assert (cfg.run_dir, cfg.work_dir, cfg.trainer.devices) == ("", "mine", 1)
    assert cfg.tracking == RunConfig().tracking
    assert cfg.vlm.kind == "none"  # no phrase reaches the networks of this method
    assert resumed(cfg).tracked("parent") is resumed(cfg).tracked("finetune") is None
    whole = configure([f"resume={path}", f"config={tmp_path}/run/config.yaml"], CONF).config
    assert whole.tracking.uri == "http://127.0.0.1:9/x"  # that word takes all of a file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tree", "refused"),
    [({"vlm": {"server": 5, "base_url": "x"}}, True), ({"vlm": 5}, False), ({"replay": 1}, True)],
)
def test_a_section_that_is_a_value_is_one_sentence(
    tree: dict[str, Any], refused: bool, tmp_path: Path
) -> None:
    path = write_agent(tmp_path / "run/finetune/last.ckpt")
    from mapo_lightning.training.checkpoint import read_checkpoint, write_checkpoint

    content = read_checkpoint(path)
    content["mapo"]["config"] = yaml.safe_dump(tree)
    write_checkpoint(content, path)
    words = ["stage=evaluate", f"checkpoint={path}"]
    if refused:
        with pytest.raises(MapoError) as caught:
            configure(words, CONF)
        assert "\n" not in str(caught.value)
    else:
        configure(words, CONF)
        assert agent_settings(path)[1]["vlm"] == {}
