"""The folder of a run: one for all of its ranks, and never that of another run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mapo_lightning.config.compose import compose
from mapo_lightning.run import session
from mapo_lightning.run.config import RunConfig, conf_folder
from mapo_lightning.run.from_checkpoint import Resumed
from mapo_lightning.run.session import Session, opened, run_folder
from mapo_lightning.types import ConfigError


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MAPO_RUN_DIR", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(session.time, "strftime", lambda _: "20260102-030405")


def test_runs_that_start_in_one_second_have_folders_of_their_own(tmp_path: Path) -> None:
    found = [run_folder("mapo-disc").relative_to(tmp_path).as_posix() for _ in range(3)]
    name = "runs/20260102-030405-mapo-disc"
    assert found == [name, f"{name}-2", f"{name}-3"]


def test_a_given_folder_wins_then_that_of_the_first_rank_then_that_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert run_folder("x") == run_folder("x") == tmp_path / "runs/job77-x"
    monkeypatch.setenv("MAPO_RUN_DIR", str(tmp_path / "first"))
    assert run_folder("x") == tmp_path / "first"
    assert run_folder("x", "mine") == tmp_path / "mine"
    assert not (tmp_path / "mine").exists()


def test_the_next_run_of_a_process_has_a_folder_of_its_own(tmp_path: Path) -> None:
    composed = compose(["env=toy", "tracking.enabled=false"], RunConfig, conf_folder())
    folders = []
    for _ in range(2):
        with opened(composed) as opened_session:
            assert os.environ["MAPO_RUN_DIR"] == str(opened_session.folder)
            folders.append(opened_session.folder)
        assert "MAPO_RUN_DIR" not in os.environ
    assert folders[0] != folders[1]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(session.ConfigError, match="give another with run_dir=DIR"):
        run_folder("mapo-disc")


def test_a_phase_that_was_killed_before_its_first_checkpoint_keeps_its_mlflow_run(
    tmp_path: Path,
) -> None:
    composed = compose(["env=toy"], RunConfig, conf_folder())
    begun = Session(composed, tmp_path, "parent", Resumed(), None, False, {})
    begun.note("parent", "a")
    begun.note("pretrain", "b")
    begun.note("finetune", "c")
    begun.note("evaluate", None)  # no tracking, or another rank
    earlier = Resumed(tmp_path / "pretrain/last.ckpt", "pretrain", 9, {"mlflow_run": "b"})
    again = begun._replace(resumed=earlier, continues=True)
    assert [again.tracked(name) for name in ("pretrain", "finetune", "evaluate")] == [
        "b",
        "c",
        None,
    ]
    assert begun.tracked("finetune") is None  # a run of its own, in a folder that is used again
    (tmp_path / "mlflow.json").write_text("[")
    with pytest.raises(ConfigError, match=r"mlflow\.json' is damaged: delete it"):
        again.tracked("finetune")
