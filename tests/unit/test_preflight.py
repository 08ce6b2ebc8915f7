"""What cannot run is told before anything is written, in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from program import SMALL
from test_agent import save

from mapo_lightning.config.compose import compose
from mapo_lightning.data.video import write_mp4
from mapo_lightning.ownership import sign
from mapo_lightning.run.build import build_pretrain
from mapo_lightning.run.config import RunConfig, conf_folder
from mapo_lightning.run.main import main
from mapo_lightning.run.preflight import check_run
from mapo_lightning.training.checkpoint import write_checkpoint

Refused = Callable[..., str]


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """Start the program in an empty folder, which must stay empty; returns what it says."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MAPO_RUN_DIR", raising=False)

    def start(*words: str) -> str:
        assert main([*words, "tracking.enabled=true"]) == 2
        assert list(folder.iterdir()) == []
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        return line

    return start


def pretrained(path: Path, *words: str) -> Path:
    """Write a pre-training checkpoint as training would."""
    composed = compose([*SMALL, *words], RunConfig, conf_folder())
    module = build_pretrain(composed.config)
    metadata = {"stage": "pretrain", "method": composed.config.method, "config": composed.yaml}
    metadata["config_signature"] = sign(composed.yaml)
    content = {"mapo": metadata, "state_dict": module.state_dict(), "global_step": 1}
    write_checkpoint(content, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trainer.accelerator=gpu"], "trainer.accelerator=gpu, but there is no GPU"),
        (["trainer.accelerator=abacus"], "'trainer.accelerator' must be one of auto, cpu"),
        (["trainer.strategy=dpp"], "Did you mean 'ddp'?"),
        (["trainer.capture=true"], "records the work of one GPU"),
        (["trainer.capture=true", "finetune.agent_updates=2"], "finetune.agent_updates is 2"),
        (
            ["trainer.capture=true", "world_model.image.recompute=cheap"],
            "cannot record world_model",
        ),
        (
            ["trainer.capture=true", "vlm=qwen2_5_vl_7b", "trainer.deterministic=false"],
            "labels in a thread on it",
        ),
        (["trainer.capture=true", "method=ivideogpt"], "world_model.kind=tokens"),
        (["data=folder", "data.root=nowhere"], "data.root must be a folder with videos"),
        (["data=folder", "data.root=..", "stage=label"], "no video found in '..'"),
        (["data=ssv2", "data.root=.."], "is not Something-Something V2"),
        (["demo.scenes=[toy]"], "demo.scenes must hold kind/name, got 'toy'"),
        (["demo.scenes=[toy/dsic]"], "toy has no task 'dsic'"),
        (["data=metaworld_experts", "demo.scenes=[toy/disc]"], "must hold metaworld/TASK"),
        (["vlm.captions=said.csv"], "vlm.captions='said.csv' is read by vlm=templates only"),
        (["vlm.reviews=nowhere.json"], "vlm.reviews='nowhere.json'"),
        (["stage=label", "vlm=none"], "stage=label needs a describer"),
        (["finetune.objective.scales.kl_uper=1"], "kl_uper"),
        (["pretrain.objective.scales.imag=1"], "imag"),
        (["finetune.freeze=[decodr]"], "finetune.freeze names decodr"),
        (["finetune.load=[encoder,upper]"], "the checkpoint has no 'upper."),
        (["finetune.load=[foo]"], "finetune.load names foo, which is no part of a world model"),
        (["stage=finetune", "checkpoint=a.ckpt"], "stage=finetune does not read it; resume="),
        (["init_from=a.ckpt"], "stage=all does not read it; add stage=finetune"),
        (["method=dreamerv2", "stage=pretrain"], "nothing to pre-train"),
        (["env.name=dsic"], "toy has no task 'dsic'"),
        (["env.kind=gym", "env.name=Nothing-v9"], "Nothing-v9"),
        (["stage=finetune", "init_from=gone.ckpt"], "no checkpoint at 'gone.ckpt'"),
        (["stage=evaluate", "checkpoint=gone.ckpt"], "no checkpoint at 'gone.ckpt'"),
        (["resume=gone.ckpt"], "no checkpoint at 'gone.ckpt'"),
    ],
)
def test_nothing_is_written_by_a_run_that_cannot_be_made(
    words: list[str], sentence: str, refused: Refused
) -> None:
    assert sentence in refused(*SMALL, *words)


@pytest.mark.parametrize("key", ["run_dir", "work_dir"])
def test_a_folder_that_cannot_be_made(key: str, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert f"{key}='../file/deep' cannot be made" in refused(*SMALL, f"{key}=../file/deep")


def test_a_model_of_the_describer_that_is_not_there(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "model").mkdir()
    words = ["vlm=qwen2_5_vl_7b", f"vlm.model={tmp_path}/model"]
    assert f"{tmp_path}/model" in refused(*SMALL, *words)


def test_a_checkpoint_of_other_sizes_is_not_fine_tuned(tmp_path: Path, refused: Refused) -> None:
    path = pretrained(tmp_path / "pre.ckpt", "world_model.lower.deter=24")
    said = refused(*SMALL, "stage=finetune", f"init_from={path}")
    assert "in the checkpoint and" in said
    assert "use the same method=, size= and vlm=" in said


def test_a_checkpoint_of_other_sizes_is_not_resumed(tmp_path: Path, refused: Refused) -> None:
    path = pretrained(tmp_path / "pre.ckpt")
    said = refused(f"resume={path}", "world_model.lower.deter=24")
    assert "brings its own settings along" in said


@pytest.mark.slow
def test_an_agent_is_not_played_or_resumed_as_another_method(
    tmp_path: Path, refused: Refused
) -> None:
    path = tmp_path / "last.ckpt"
    save(path)
    said = refused("stage=evaluate", f"checkpoint={path}", "method=apv", "trainer=cpu")
    assert "was trained with method=mapo and cannot be evaluated as method=apv" in said
    said = refused(f"resume={path}", "method=apv", "trainer=cpu")
    assert "was trained with method=mapo and cannot continue as method=apv" in said


def test_an_agent_is_no_start_of_fine_tuning(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "last.ckpt"
    save(path)
    said = refused(*SMALL, "stage=finetune", f"init_from={path}")
    assert "takes a checkpoint of pre-training, and this one was made by fine-tuning" in said


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["all", "finetune", "evaluate"])
def test_results_of_an_earlier_run_are_not_overwritten(
    stage: str, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "run/finetune").mkdir(parents=True)
    path = tmp_path / "run/finetune/last.ckpt"
    save(path)
    before = path.read_bytes()
    words = [f"checkpoint={path}"] if stage == "evaluate" else SMALL
    said = refused(*words, f"stage={stage}", "run_dir=../run", "trainer=cpu")
    assert "run_dir='../run' holds the results of an earlier run (finetune/last.ckpt)" in said
    assert "resume=../run continues it, or give another folder" in said
    assert path.read_bytes() == before
    assert list((tmp_path / "run").iterdir()) == [path.parent]


@pytest.mark.slow
def test_an_agent_is_not_played_where_actions_are_others(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "last.ckpt"
    save(path)
    words = ["env.kind=gym", "env.name=InvertedPendulum-v5", "trainer.accelerator=cpu"]
    said = refused("stage=evaluate", f"checkpoint={path}", *words)
    assert "acts with 2 numbers, but gym/InvertedPendulum-v5 takes 1" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["data=folder", "data.root=../videos"],
        ["data=folder", "data.root=../videos", "stage=label"],
        ["stage=finetune", "init_from=../pre.ckpt"],
        ["method=dreamerv2", "trainer.compile=true"],
    ],
    ids=str,
)
def test_a_run_that_can_be_made_is_let_through_without_a_trace(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mp4(tmp_path / "videos/a.mp4", np.zeros((30, 64, 64, 3), np.uint8), 25.0)
    pretrained(tmp_path / "pre.ckpt")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    cfg = compose([*SMALL, *words], RunConfig, conf_folder()).config
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    check_run(cfg)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # type: ignore[arg-type]
    assert list(work.iterdir()) == []
    assert [path.name for path in (tmp_path / "videos").iterdir()] == ["a.mp4"]
