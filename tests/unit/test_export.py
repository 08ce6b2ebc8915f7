"""Exports: what is handed on, by whom it is read, and what is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_agent import CONF, SIDE, save

import mapo_lightning
from mapo_lightning.run import build
from mapo_lightning.run.export import main
from mapo_lightning.run.from_checkpoint import agent_settings, configure
from mapo_lightning.training import export as export_module
from mapo_lightning.training.checkpoint import read_checkpoint, write_checkpoint
from mapo_lightning.types import CheckpointError

CANARIES = ("canary-password", "canary-folder", "canary.example", "c0ffee")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a canary in every setting that must not be handed on."""
    path = tmp_path_factory.mktemp("canary-folder") / "finetune/last.ckpt"
    save(
        path, "stage=finetune", "vlm.server.base_url=http://canary.example:1/v1",
        "tracking.uri=http://me:canary-password@canary.example:2",
        "run_dir=canary-folder", "data.root=canary-folder", "vlm.store=canary-folder",
    )  # fmt: skip
    content = read_checkpoint(path)
    settings = yaml.safe_load(content["mapo"]["config"])
    settings["vlm"]["embed"]["encoder"] = "/models/canary-folder/minilm"
    content["mapo"]["config"] = yaml.safe_dump(settings)
    content["mapo"] |= {"mlflow_run": "c0ffee00" * 4, "mlflow_parent": "c0ffee00" * 4}
    content["optimizer_states"] = [{"exp_avg": torch.full((8,), 77.0)}]
    write_checkpoint(content, path)
    return path


@pytest.fixture
def exported(checkpoint: Path, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    assert main([f"checkpoint={checkpoint}", f"out={out}"]) == 0
    return out


def test_an_export_holds_the_model_and_nothing_of_its_machine(
    exported: Path, checkpoint: Path
) -> None:
    files = {path.name: path.read_bytes() for path in exported.iterdir()}
    assert sorted(files) == ["README.md", "card.json", "model.safetensors"]
    for canary in CANARIES:
        assert not any(canary.encode() in content for content in files.values()), canary
    card = json.loads(files["card.json"])
    assert (card["stage"], card["method"], card["action_dim"]) == ("finetune", "mapo", 2)
    assert card["settings"]["world_model"]["image"]["channels"] == [4]
    assert card["settings"]["vlm"]["embed"]["encoder"] == "minilm"
    assert "root" not in card["settings"]["data"]
    assert not {"tracking", "trainer", "run_dir", "work_dir"} & set(card["settings"])
    assert f"SHA-256 `{card['sha256']}`" in files["README.md"].decode()
    whole, found = read_checkpoint(checkpoint), read_checkpoint(exported)
    assert found["state_dict"].keys() == whole["state_dict"].keys()
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(found["state_dict"][name], tensor), name
    assert set(found) == {"state_dict", "mapo", "global_step"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "model.safetensors", "card.json"])
def test_every_reader_takes_an_export(tmp_path: Path, name: str) -> None:
    save(tmp_path / "last.ckpt", "vlm=none")
    assert main([f"checkpoint={tmp_path}/last.ckpt", f"out={tmp_path}/out"]) == 0
    path = tmp_path / "out" / name
    with mapo_lightning.load_agent(path) as agent:
        frame = torch.zeros(SIDE, SIDE, 3, dtype=torch.uint8).numpy()
        with mapo_lightning.load_agent(tmp_path / "last.ckpt") as original:
            assert (agent.act(frame) == original.act(frame)).all()
    cfg = configure(["stage=evaluate", f"checkpoint={path}"], CONF).config
    assert (cfg.env.kind, cfg.evaluate.num_envs) == ("toy", 1)
    _, metadata = build.load_finetuned(cfg, path)
    assert metadata["env_frames"] == 120
    assert agent_settings(path)[1]["method"] == "mapo"


def test_fine_tuning_starts_from_an_export_of_pre_training(tmp_path: Path) -> None:
    cfg = configure(["env=toy", "world_model.image.channels=[4]"], CONF)
    torch.manual_seed(1)
    module = build.build_pretrain(cfg.config)
    card = {"stage": "pretrain", "method": "mapo", "config": cfg.redacted_yaml}
    content = {"state_dict": module.state_dict(), "mapo": card}
    write_checkpoint(content, tmp_path / "last.ckpt")
    assert main([f"checkpoint={tmp_path}/last.ckpt", f"out={tmp_path}/out"]) == 0
    tuned, report = build.build_finetune(cfg.config, 2, tmp_path / "out")
    assert report is not None
    assert report.loaded == ("encoder", "context", "source", "lower", "decoder")
    weights = tuned.state_dict()
    for name, tensor in module.state_dict().items():
        assert torch.equal(weights[name], tensor), name


@pytest.mark.parametrize("name", ["", "model.safetensors", "card.json"])
def test_an_export_cannot_be_resumed(exported: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="is an export, which holds no state of an optimiser"):
        configure([f"resume={exported / name}"], CONF)


def rehashed(folder: Path, content: bytes) -> None:
    """Replace the tensors, and name them in the card, as an attacker would."""
    (folder / "model.safetensors").write_bytes(content)
    card = json.loads((folder / "card.json").read_text())
    card["sha256"] = export_module._hash(folder / "model.safetensors")
    (folder / "card.json").write_text(json.dumps(card))


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


HEADERS = {
    "a header of 100 TB": header(b"{}", 100 * 2**40),
    "a tensor of 100 TB": header(
        b'{"a":{"dtype":"F32","shape":[27487790694400],"data_offsets":[0,109951162777600]}}'
    ),
    "a size that overflows": header(
        b'{"a":{"dtype":"F32","shape":[9223372036854775807,9],"data_offsets":[0,4]}}'
    )
    + bytes(4),
    "offsets that overlap": header(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    + bytes(4),
    "no JSON": header(b"\xff\xfe{{"),
    "an unknown type": header(b'{"a":{"dtype":"EXEC","shape":[1],"data_offsets":[0,4]}}')
    + bytes(4),
    "nothing": b"",
    "a pickle": b"\x80\x04\x95" + bytes(60),
    "no tensors": header(b"{}"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", HEADERS)
def test_odd_headers_are_one_sentence(exported: Path, what: str) -> None:
    rehashed(exported, HEADERS[what])
    if what == "no tensors":
        assert read_checkpoint(exported)["state_dict"] == {}
        return
    with pytest.raises(CheckpointError, match="is damaged or not a file of safetensors") as caught:
        read_checkpoint(exported)
    assert "\n" not in str(caught.value)


def test_a_truncated_or_changed_file_is_not_the_one_that_the_card_names(exported: Path) -> None:
    whole = (exported / "model.safetensors").read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1])):
        (exported / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"is not the file that 'card\.json' names"):
            read_checkpoint(exported)
    (exported / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no 'model\.safetensors' to read"):
        read_checkpoint(exported)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"version": 2}, "a card of version 2, and this package reads version 1"),
        ({"version": True}, "a card of version True"),
        ({"version": None}, "a card of version None"),
        ({"run_id": "x"}, "has an unknown entry 'run_id'"),
        ({"\x1b[31m": 1}, r"has an unknown entry '\\x1b\[31m'"),
        ({"sha256": None}, "sha256 must be of type str"),
        ({"action_dim": 2.5}, "action_dim must be of type int"),
        ({"action_dim": -1}, "is negative"),
        ({"stage": "pretrain"}, "has an unknown entry 'action_dim'"),
        ({"stage": "other"}, "no such stage"),
        ({"settings": []}, "settings must be of type dict"),
        ({"settings": {"x": "y" * (1 << 20)}}, "larger than 1048576 bytes"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_odd_cards_are_one_sentence(exported: Path, change: dict[str, Any], sentence: str) -> None:
    card = json.loads((exported / "card.json").read_text()) | change
    (exported / "card.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=sentence) as caught:
        read_checkpoint(exported)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, '{"version": NaN}', "null", "\xff"], ids=lambda t: t[:9]
)
def test_a_card_that_is_no_json_is_one_sentence(exported: Path, text: str) -> None:
    (exported / "card.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"is no JSON|card of version None"):
        read_checkpoint(exported)
    (exported / "card.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no 'card\.json' to read"):
        read_checkpoint(exported)


def test_wrong_words_get_one_sentence(
    checkpoint: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, sentence in (
        (["checkpoint=x"], "needs out="),
        ([f"checkpoint={tmp_path}/gone.ckpt", "out=o"], "no checkpoint at"),
        ([f"checkpoint={checkpoint}", f"out={exported}"], "is there and not empty"),
        (["trust=true", "out=o", "checkpoint=x"], "has no word 'trust'"),
    ):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert sentence in said
        assert said.count("\n") == 1
    assert main(["--help"]) == 0
    assert "Usage: mapo-export" in capsys.readouterr().out


def test_what_serves_learning_only_is_not_exported(checkpoint: Path, tmp_path: Path) -> None:
    content = read_checkpoint(checkpoint)
    names = set(content["state_dict"])
    content["state_dict"]["agent._extra_state"] = {"moments": [1.0]}
    write_checkpoint(content, tmp_path / "odd.ckpt")
    assert main([f"checkpoint={tmp_path}/odd.ckpt", f"out={tmp_path}/o"]) == 0
    assert set(read_checkpoint(tmp_path / "o")["state_dict"]) == names
