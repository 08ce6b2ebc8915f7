"""Checkpoints: exact hand-over, a report, and no code."""

from __future__ import annotations

import errno
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import token_world
from safetensors.torch import save_file
from tiny_models import save_bert

from mapo_lightning.config.compose import compose
from mapo_lightning.models.token_world.published import published_names
from mapo_lightning.models.token_world.tokenizer import Tokenizer
from mapo_lightning.models.token_world.transformer import TokenTransformer
from mapo_lightning.run.build import build_finetune, build_pretrain, hand_over
from mapo_lightning.run.config import RunConfig
from mapo_lightning.training.checkpoint import LoadReport, load_pretrained, read_checkpoint
from mapo_lightning.training.published_weights import FILES
from mapo_lightning.types import CheckpointError
from tests.contract.throwaways import CopyLastFrame

CONF = Path(__file__).parents[2] / "conf"
PARTS = ["encoder", "context", "source", "lower", "decoder"]


def configured(*words: str) -> RunConfig:
    return compose(["env=toy", "world_model.image.channels=[4]", *words], RunConfig, CONF).config


def pretrained(*words: str) -> dict[str, Any]:
    torch.manual_seed(1)
    module = build_pretrain(configured(*words))
    return {"state_dict": module.state_dict(), "mapo": {"method": "mapo"}}


def test_hand_over_takes_every_tensor_and_says_so() -> None:
    torch.manual_seed(2)
    content = pretrained()
    module, _ = build_finetune(configured(), 2, None)
    report = load_pretrained(module.world_model, content, PARTS)
    assert report.loaded == tuple(PARTS)
    assert report.fresh == ("upper", "heads")
    assert report.ignored == ()
    assert str(report) == (
        "loaded encoder, context, source, lower, decoder; fresh upper, heads; ignored nothing"
    )
    state = module.state_dict()
    for key, tensor in content["state_dict"].items():
        assert torch.equal(state[key], tensor), key


def test_parts_that_are_not_asked_for_stay_fresh() -> None:
    module, _ = build_finetune(configured(), 2, None)
    report = load_pretrained(module.world_model, pretrained(), ["encoder"])
    assert report.loaded == ("encoder",)
    assert "lower" in report.fresh
    assert "lower" in report.ignored


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["world_model.lower.deter=64"], r"is \(.*\) in the checkpoint and \(.*\) in the model"),
        (["world_model.image.size=64"], r"the checkpoint has no 'encoder\.layers\.3\.weight'"),
        (["method=contextwm"], r"the model has no|in the checkpoint and"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(words: list[str], sentence: str) -> None:
    module, _ = build_finetune(configured(*words), 2, None)
    with pytest.raises(CheckpointError, match=sentence) as error:
        load_pretrained(module.world_model, pretrained(), PARTS)
    assert "use the same method=, size= and vlm=" in str(error.value)


@pytest.mark.slow
def test_vectors_with_another_layout_are_refused(tmp_path: Path) -> None:
    plain = f"vlm.embed.encoder={save_bert(tmp_path)}"
    joined = (plain, "vlm.embed.direction=true")
    module, _ = build_finetune(configured(*joined), 2, None)
    assert load_pretrained(module.world_model, pretrained(*joined), PARTS).loaded == tuple(PARTS)
    with pytest.raises(CheckpointError, match=r"32\) in the checkpoint and .*40\) in the"):
        load_pretrained(module.world_model, pretrained(plain), PARTS)


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


def test_a_checkpoint_that_holds_code_is_refused(tmp_path: Path) -> None:
    path, target = tmp_path / "bomb.ckpt", tmp_path / "went_off"
    torch.save({"state_dict": {}, "mapo": Bomb(target)}, path)
    with pytest.raises(CheckpointError, match="is refused"):
        read_checkpoint(path)
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "no checkpoint at"),
        (b"", "is damaged"),
        (b"not a checkpoint at all", "is refused|is damaged"),
    ],
)
def test_files_that_are_no_checkpoints(
    content: bytes | None, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "some.ckpt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=sentence):
        read_checkpoint(path)


def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"somebody else's")

    def refuse(file: Path) -> None:  # root may read everything
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    with pytest.raises(CheckpointError, match=r"last.ckpt' cannot be read \(Permission denied\)"):
        read_checkpoint(path)


def test_a_checkpoint_of_another_program_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="no entry 'mapo'"):
        read_checkpoint(tmp_path / "other.ckpt")


@pytest.mark.slow
def test_published_weights_of_ivideogpt_are_handed_over(tmp_path: Path) -> None:
    torch.manual_seed(0)
    published, ours = token_world(None, "both"), token_world(2)
    for name, file in FILES.items():
        part = published.parts()[name]
        assert isinstance(part, Tokenizer | TokenTransformer)
        names = published_names(part)
        (tmp_path / name).mkdir()
        stored = {names[n]: x.contiguous() for n, x in part.state_dict().items()}
        save_file(stored, tmp_path / name / file)
    report = hand_over(ours, tmp_path, ["tokenizer"])
    assert report == LoadReport(("tokenizer", "transformer"), ("control",), ())
    for name in FILES:
        for key, tensor in published.parts()[name].state_dict().items():
            assert torch.equal(tensor, ours.parts()[name].state_dict()[key]), key
    with pytest.raises(CheckpointError, match="weights of iVideoGPT: add method=ivideogpt"):
        hand_over(CopyLastFrame(), tmp_path, [])
    (tmp_path / "transformer" / FILES["transformer"]).write_bytes(b"x" * 20)
    with pytest.raises(CheckpointError, match=r"model\.safetensors' cannot be read"):
        hand_over(ours, tmp_path, [])
