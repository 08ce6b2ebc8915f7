"""The real program in its own process: what a user types, and what must be there afterwards."""

from __future__ import annotations

import hashlib
import json
import socket
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from miniatures import write_ssv2
from networks import METHODS, TOKEN_METHODS, image
from program import DREAMS, EXPORT, ROOT, SMALL, TOLD, TRAIN, end, start, train
from safetensors.torch import save_file

from mapo_lightning.config.compose import compose
from mapo_lightning.data.video import probe_video
from mapo_lightning.models.token_world.published import published_names
from mapo_lightning.models.token_world.tokenizer import Tokenizer
from mapo_lightning.models.token_world.transformer import TokenTransformer
from mapo_lightning.run.build import build_finetune
from mapo_lightning.run.config import RunConfig
from mapo_lightning.training.checkpoint import read_checkpoint
from mapo_lightning.training.published_weights import FILES


@pytest.fixture(scope="module")
def toy_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight short videos of the toy world, rendered by the program itself."""
    folder = tmp_path_factory.mktemp("videos")
    train(
        folder, *SMALL, "stage=pretrain", f"data.root={folder}/toy", "demo.clips_per_scene=8",
        "demo.frames=30", "run_dir=first",
    )  # fmt: skip
    return folder


def with_videos(folder: Path) -> list[str]:
    return [*SMALL, f"data.root={folder}/toy", "demo.clips_per_scene=8", "demo.frames=30"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_all_stages(method: str, toy_videos: Path, tmp_path: Path) -> None:
    said = train(tmp_path, *with_videos(toy_videos), f"method={method}", "run_dir=run")
    assert "random" in said
    if method == "dreamerv2":
        assert "nothing to pre-train" in said
    elif method in TOKEN_METHODS:
        assert "loaded tokenizer; fresh transformer" in said
        assert "fresh control" in said
        steps = {
            p: read_checkpoint(tmp_path / f"run/{p}/last.ckpt") for p in ("tokenizer", "pretrain")
        }
        assert [(c["mapo"]["stage"], c["global_step"]) for c in steps.values()] == [
            ("tokenizer", 4), ("pretrain", 4),
        ]  # fmt: skip
        drawn = [
            "world_model.tokenizer.context_codes.codes",
            "world_model.tokenizer.patch_in.weight",
        ]
        for name in drawn:  # the transformer's phase leaves the tokenizer alone
            one, two = (c["state_dict"][name] for c in steps.values())
            assert bool((one == two).all()), name
    else:
        new = "source" if method.startswith("prelar") else "upper"
        assert f"fresh {new}, heads" in said
    card = read_checkpoint(tmp_path / "run/finetune/last.ckpt")["mapo"]
    assert (card["method"], card["stage"], card["action_dim"]) == (method, "finetune", 2)


def test_a_second_run_asks_the_describer_nothing(toy_videos: Path, tmp_path: Path) -> None:
    words = [*with_videos(toy_videos), "stage=pretrain", f"work_dir={tmp_path}/work"]
    words += ["data.workers=2", "pretrain.updates=12"]
    first = train(tmp_path, *words, "run_dir=one")
    assert ": 0 queried," not in first
    # The same seed draws the same clips, so every window of the second run is known.
    assert ": 0 queried," in train(tmp_path, *words, "run_dir=two")


def test_tracking_holds_a_parent_and_a_run_per_phase(toy_videos: Path, tmp_path: Path) -> None:
    words = [*with_videos(toy_videos), "tracking.enabled=true", "run_dir=run"]
    train(tmp_path, *words, "data.holdout=0.25")  # two videos, so that one can be mistold
    db = sqlite3.connect(tmp_path / "runs/mlflow.db")
    runs = dict(db.execute("select name, status from runs"))
    assert runs == dict.fromkeys(("run", "run/pretrain", "run/finetune"), "FINISHED")
    check_parent(db, json.loads((tmp_path / "run/evaluation.json").read_text()))
    keys = {key for (key,) in db.execute("select distinct key from metrics")}
    expected = {
        "train/image", "train/kl_lower", "train/kl_upper", "train/commitment", "train/reward",
        "train/actor", "train/critic", "val/image", "codebook/perplexity_8",
        "env_frames", "told/told_1", "told/untold_5", "told/mistold_15", "told/copy_1",
        "eval/return", "eval/return_random", "eval/success", "vlm/asked", "vlm/null_rate",
        "grad_norm/lower", "grad_norm/actor", "rollout/psnr_1", "rollout/ssim_5",
        "rollout/psnr_moving_5", "rollout/psnr_moving_copy_5",
        "vlm/rejected", "labels/skipped", "labels/still_null",
    }  # fmt: skip
    assert expected <= keys
    frames = [s for (s,) in db.execute("select step from metrics where key='eval/return'")]
    assert max(frames) >= 130  # the x-axis of fine-tuning counts environment frames
    artifacts = [p.name for p in (tmp_path / "runs/artifacts").rglob("*") if p.is_file()]
    assert "last.ckpt" in artifacts
    assert "config.yaml" in artifacts
    films = [p for p in (tmp_path / "runs/artifacts").rglob("*.mp4") if p.parent.name == "episode"]
    assert films
    assert {probe_video(film).width for film in films} == {256}  # an agent's 32 are too small
    assert any(name.endswith(".png") for name in artifacts)
    (page,) = (tmp_path / "runs/artifacts").rglob("pages/labels/*.html")
    assert page.read_text().count("<article") == 4
    (table,) = (tmp_path / "runs/artifacts").rglob("tables/told/*.csv")
    assert table.read_text().startswith("dream,frames_ahead,mean,low,high")
    report = (tmp_path / "run/pretrain/told.md").read_text()
    assert "| untold - told |" in report
    assert (tmp_path / "run/pretrain/told.png").is_file()
    (table,) = (tmp_path / "runs/artifacts").rglob("tables/label_quality/*.csv")
    assert table.read_text().startswith("describer,windows,without an answer,null,")


def test_evaluate_plays_a_checkpoint(toy_videos: Path, tmp_path: Path) -> None:
    words = with_videos(toy_videos)
    train(tmp_path, *words, "stage=finetune", "run_dir=run", "vlm.collect.late=true")
    checkpoint = "checkpoint=run/finetune/last.ckpt"
    more = ["stage=evaluate", checkpoint, "evaluate.decisions=3"]
    said = [train(tmp_path, *words, *more, f"run_dir={name}") for name in ("one", "two")]
    scores = [[line for line in text.splitlines() if line.startswith("  mapo")] for text in said]
    assert scores[0]
    assert scores[0] == scores[1]
    assert "  decisions by dream, 5 random sequences of 15 steps: regret 0." in said[0]
    one, two = (
        json.loads((tmp_path / name / "evaluation.json").read_text())["dream"]
        for name in ("one", "two")
    )
    assert one == two
    assert {"regret", "accuracy", "spearman_low", "value_regret"} <= set(one)
    assert one["states"] == one["decided"] == 3
    said_no = train(tmp_path, checkpoint, code=2, script=TOLD)
    assert "is no checkpoint of stage=pretrain; phrases drive only those" in said_no


def check_parent(db: sqlite3.Connection, played: dict[str, Any]) -> None:
    """The list of runs says what was run, on what, and what came out of it."""

    def of(name: str, table: str) -> dict[str, Any]:
        run = f"(select run_uuid from runs where name = '{name}')"
        return dict(db.execute(f"select key, value from {table} where run_uuid = {run}"))

    tags, figures = of("run", "tags"), of("run", "latest_metrics")
    wanted = {"method": "mapo", "task": "toy/disc", "seed": "0", "stage": "all"}
    assert wanted.items() <= tags.items()
    told = Path(tags["run_dir"], "pretrain/told.md").read_text().splitlines()[0]
    assert tags["mlflow.note.content"].startswith(f"{told}\n\ntoy/disc after ")
    assert "1 episodes from reset seeds 1000..1000: mapo " in tags["mlflow.note.content"]
    assert of("run/pretrain", "tags")["mlflow.note.content"] == told
    assert Path(tags["run_dir"]).name == "run"
    assert figures["eval/return"] == played["policies"]["agent"]["return"]
    assert figures["eval/return_random"] == played["policies"]["random"]["return"]
    assert {"told/told_1", "told/untold_5", "val/loss", "eval/success"} <= set(figures)
    assert of("run", "params") == of("run/finetune", "params")
    before, after = of("run/pretrain", "tags"), of("run/finetune", "tags")
    (pretrained,) = db.execute("select run_uuid from runs where name = 'run/pretrain'").fetchone()
    assert (after["pretrained_run"], before.get("pretrained_run")) == (pretrained, None)
    path = Path(after["pretrained_checkpoint"])
    assert path.parts[-3:] == ("run", "pretrain", "last.ckpt")
    assert after["pretrained_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    names = [name for (name,) in db.execute("select name from datasets order by name")]
    assert [name.split()[0] for name in names] == ["labels", "replay", "videos"]
    found = "select dataset_profile from datasets where name like 'videos %'"
    assert json.loads(db.execute(found).fetchone()[0])["frames"] > 0
    models = dict(db.execute("select name, source_run_id from logged_models"))
    assert models["run-pretrain-last"] == pretrained
    linked = "select count(*) from inputs where destination_type = 'MODEL_INPUT'"
    assert db.execute(linked).fetchone()[0] == 1


def test_dreams_are_judged_with_the_test_episodes_and_alone(
    toy_videos: Path, tmp_path: Path
) -> None:
    words = with_videos(toy_videos)
    train(tmp_path, *words, "stage=finetune", "run_dir=run")
    checkpoint = "checkpoint=run/finetune/last.ckpt"
    judging = ["evaluate.dreams=4", "tracking.enabled=true", "evaluate.episodes=1", "run_dir=again"]
    told = train(tmp_path, *words, *judging, "stage=evaluate", checkpoint)
    assert "frames ahead the dream has a PSNR of" in told
    page = train(tmp_path, *words, "evaluate.dreams=4", checkpoint, "run_dir=dr", script=DREAMS)
    rows = json.loads((tmp_path / "dr/dreams.json").read_text())
    assert json.loads((tmp_path / "again/dreams.json").read_text()) == rows
    futures = {"consistency", "decisions", "foresight", "physics"}
    aspects = {row["aspect"] for row in rows}
    assert aspects == {"looks", "control", "executable", "foreseen"} | futures
    assert "| action | oracle |" in page
    (logged,) = (tmp_path / "runs/artifacts").rglob("dreams/dreams.html")
    assert logged.read_text() == (tmp_path / "dr/dreams.html").read_text()
    db = sqlite3.connect(tmp_path / "runs/mlflow.db")
    (value,) = db.execute("select value from metrics where key='dream/looks_psnr_moving_5'")
    wanted = ("looks", "dream", "psnr_moving", 5)
    keys = ("aspect", "dream", "measure", "frames_ahead")
    (mean,) = (row["mean"] for row in rows if tuple(row[k] for k in keys) == wanted)
    assert value[0] == pytest.approx(mean, rel=1e-4)


def test_checkpoints_of_a_run_are_ranked_by_their_dreams(toy_videos: Path, tmp_path: Path) -> None:
    words = [*with_videos(toy_videos), "stage=finetune", "run_dir=run", "finetune.agent_steps=330"]
    train(tmp_path, *words, "callbacks.checkpoint_every=3", "callbacks.checkpoints=all")
    kept = sorted(
        (tmp_path / "run/finetune").glob("step=*.ckpt"), key=lambda path: path.stat().st_mtime
    )
    assert len(kept) >= 3
    given = [f"checkpoint={path}" for path in kept[:3]]
    said_no = train(tmp_path, *given, "checkpoint=run/none.ckpt", script=DREAMS, code=2)
    assert "no checkpoint at 'run/none.ckpt'" in said_no  # before any is judged
    assert "PSNR" not in said_no
    page = train(tmp_path, *given, "evaluate.dreams=4", "run_dir=dr", script=DREAMS)
    assert "| rank correlation of means | dream |" in page
    rows = json.loads((tmp_path / "dr/dreams.json").read_text())
    ranked = [row for row in rows if row["aspect"] == "checkpoints"]
    returns = {row["dream"]: row["mean"] for row in ranked if row["measure"] == "return, really"}
    assert sorted(returns) == [f"{n}: finetune/{path.name}" for n, path in enumerate(kept[:3], 1)]
    assert all(-1 <= row["mean"] <= 1 for row in ranked if row["dream"] == "dream")


def test_a_token_world_is_told_exported_and_takes_published_weights(
    toy_videos: Path, tmp_path: Path
) -> None:
    words = [*with_videos(toy_videos), "data.holdout=0.25", "method=ivideogpt_semantic"]
    train(tmp_path, *words, "stage=pretrain", "run_dir=run")
    own = "run/pretrain/last.ckpt"
    said = train(tmp_path, f"checkpoint={own}", "run_dir=told", script=TOLD)
    assert "| untold - told |" in said
    train(tmp_path, f"checkpoint={own}", "out=shared", script=EXPORT)
    told = [word for word in words if not word.startswith("method=")]  # a stranger's: typed again
    again = train(tmp_path, "checkpoint=shared", *told, "run_dir=told2", script=TOLD)
    assert again.split("| untold - told |")[1][:60] == said.split("| untold - told |")[1][:60]
    # The published files have other names for the same tensors; here, for this size.
    weights = read_checkpoint(tmp_path / own)["state_dict"]
    cfg = compose(["method=ivideogpt_semantic", *SMALL], RunConfig, ROOT / "conf").config
    parts = build_finetune(cfg, 2, None)[0].world_model.parts()
    places = {"tokenizer": "tokenizer.", "transformer": "predictor.transformer."}
    for name, file in FILES.items():
        prefix, part = f"world_model.{places[name]}", parts[name]
        stored = {k.removeprefix(prefix): x for k, x in weights.items() if k.startswith(prefix)}
        assert isinstance(part, Tokenizer | TokenTransformer)
        names = published_names(part)
        (tmp_path / "hub" / name).mkdir(parents=True)
        theirs = {names[k]: x.contiguous() for k, x in stored.items()}
        save_file(theirs, tmp_path / "hub" / name / file)
    said = train(tmp_path, *words, "stage=finetune", "init_from=hub", "run_dir=from_hub")
    assert "from hub: loaded tokenizer, transformer; fresh control, phrases" in said
    said = train(tmp_path, *words, "stage=finetune", "init_from=hub", "method=mapo", code=2)
    assert "holds the published weights of iVideoGPT: add method=ivideogpt" in said


def test_two_processes_make_one_run_and_end_cleanly(toy_videos: Path, tmp_path: Path) -> None:
    words = [*with_videos(toy_videos), "stage=pretrain"]
    words += ["trainer.devices=2", "trainer.strategy=ddp"]
    for attempt in range(3):  # gloo used to abort at exit now and then
        train(tmp_path, *words, "tracking.enabled=true", f"run_dir=run{attempt}")
    db = sqlite3.connect(tmp_path / "runs/mlflow.db")
    runs = sorted(name for (name,) in db.execute("select name from runs"))
    assert runs == [f"run{n}{phase}" for n in range(3) for phase in ("", "/pretrain")]
    assert (tmp_path / "run2/pretrain/last.ckpt").is_file()


@pytest.mark.slow
def test_two_nodes_started_by_torchrun_make_one_run(toy_videos: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*with_videos(toy_videos), "stage=pretrain", "tracking.enabled=true"]
    words += ["trainer.strategy=ddp", "trainer.num_nodes=2"]
    agent = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-id=7"]
    agent += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    nodes = [start(tmp_path, *agent, TRAIN, *words) for _ in range(2)]
    try:
        assert [node.wait(timeout=240) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            end(node)
    runs = sqlite3.connect(tmp_path / "runs/mlflow.db").execute("select name, status from runs")
    name = "job7-mapo-videos-seed0"
    assert sorted(runs) == [(name, "FINISHED"), (f"{name}/pretrain", "FINISHED")]


TWO_RANKS = """
import sys
from pathlib import Path
from typing import Any
import lightning as L, torch
from callbacks.codebook import CodebookUpdate
from mapo_lightning.run import build
from mapo_lightning.run.trainer import build_trainer
from mapo_lightning.config.compose import compose
from mapo_lightning.run.config import RunConfig

class Digest(L.Callback):
    def on_train_end(self, trainer, module):
        codes = module.world_model.context.quantizers["8"].codes
        weight = module.world_model.encoder.convin.weight
        text = repr((codes.tolist(), weight.flatten().tolist()))
        Path(f"rank{trainer.global_rank}.txt").write_text(text)

if __name__ == "__main__":
    cfg = compose(sys.argv[1:], RunConfig, Path(CONF)).config
    L.seed_everything(0)
    torch.set_num_threads(1)
    trainer = build_trainer(cfg, 4, Path("ckpt"), [CodebookUpdate(), Digest()], [])
    trainer.fit(build.build_pretrain(cfg), datamodule=build.build_videos(cfg))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


def test_two_ranks_end_with_the_same_codebook(toy_videos: Path, tmp_path: Path) -> None:
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS.replace("CONF", repr(str(ROOT / "conf"))))
    words = [*with_videos(toy_videos), "trainer.devices=2", "trainer.strategy=ddp"]
    train(tmp_path, *words, image("published"), script=str(script))  # with batch norms
    first, second = ((tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 1))
    assert first == second


def test_something_something_is_learned_from_as_it_lies_on_disk(tmp_path: Path) -> None:
    webm = write_ssv2(tmp_path / "ssv2") / "20bn-something-something-v2"
    (webm / "102.webm").write_bytes((webm / "101.webm").read_bytes()[:900])
    words = [*SMALL, "stage=pretrain", "data=ssv2", f"data.root={tmp_path}/ssv2", "vlm=none"]
    said = train(tmp_path, *words, "run_dir=run")
    assert "data=ssv2: 6 videos listed, 0 of them missing" in said
    assert "videos: 3 to learn from, 2 held out, 1 set aside" in said
    assert read_checkpoint(tmp_path / "run/pretrain/last.ckpt")["mapo"]["stage"] == "pretrain"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["method=mapoo"], "mapo"),
        (["world_model.lowr.deter=3"], "lower"),
        (["agent.horizon=1"], "agent.horizon must be at least 2, got 1"),
        (["agent.horizon=far"], "agent.horizon"),
        (["--amp"], "--amp"),
        (["data=folder", "stage=pretrain"], "data.root=DIR"),
        (["data=folder", "stage=pretrain", "data.root=nowhere"], "nowhere"),
        (["stage=pretrain", "vlm.reviews=nowhere.json"], "vlm.reviews='nowhere.json'"),
        (["data=ssv2", "stage=pretrain", "data.root=."], "is not Something-Something V2"),
        (["data=human36m", "stage=pretrain", "data.root=."], "is not Human3.6M"),
        (["trainer.capture=true"], "records the work of one GPU"),
        (["stage=evaluate"], "checkpoint=PATH"),
        (["stage=evaluate", "checkpoint=nothing.ckpt"], "no checkpoint at 'nothing.ckpt'"),
        (["method=dreamerv2", "stage=pretrain"], "nothing to pre-train"),
        (["stage=finetune", "env.name=dsic"], "disc"),
        (["stage=finetune", "finetune.objective.scales.kl_uper=1"], "kl_uper"),
    ],
)
def test_wrong_input_gets_one_clear_sentence(
    words: list[str], sentence: str, tmp_path: Path
) -> None:
    said = train(tmp_path, *SMALL, *words, code=2)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert sentence in errors[0]
    assert "Traceback" not in said


def test_help_and_show_answer_without_running(tmp_path: Path) -> None:
    assert "world_model.lower.deter" in train(tmp_path, "--help")
    shown = train(tmp_path, "env=toy", "seed=3", "--show")
    assert "seed: 3" in shown
    assert not (tmp_path / "runs").exists()


def test_a_pretrained_checkpoint_resumes_and_is_refused_where_it_does_not_fit(
    toy_videos: Path, tmp_path: Path
) -> None:
    given = f"init_from={toy_videos}/first/pretrain/last.ckpt"
    said = train(tmp_path, *SMALL, "stage=finetune", "method=contextwm", given, code=2)
    assert "method=mapo" in said
    said = train(
        tmp_path,
        *with_videos(toy_videos),
        "stage=pretrain",
        "pretrain.updates=6",
        f"resume={toy_videos}/first/pretrain/last.ckpt",
        "run_dir=on",
        "seed=5",  # a fresh start would have other weights
    )
    before = read_checkpoint(toy_videos / "first/pretrain/last.ckpt")
    content = read_checkpoint(tmp_path / "on/pretrain/last.ckpt")
    state = content["optimizer_states"][0]["state"]
    # Six updates in all: Adam's moments went on where the four of the first run ended.
    assert {int(moments["step"]) for moments in state.values()} == {6}
    assert content["global_step"] == 6
    key = "world_model.encoder.layers.0.weight"
    moved = (content["state_dict"][key] - before["state_dict"][key]).abs().max()
    assert 0.0 < float(moved) < 0.01  # two updates of 0.001
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes((toy_videos / "first/pretrain/last.ckpt").read_bytes()[:1000])
    said = train(tmp_path, *SMALL, "stage=finetune", f"init_from={broken}", code=2)
    assert f"'{broken}' is damaged" in said
