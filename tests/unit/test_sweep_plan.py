"""Sweeps before anything is started: points, names, sharing, the sweep's file, what is refused."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mapo_lightning.config.schema import walk
from mapo_lightning.run import build, finished, job, phase, stages
from mapo_lightning.run.config import RunConfig, conf_folder
from mapo_lightning.run.from_checkpoint import configure
from mapo_lightning.run.main import main
from mapo_lightning.run.sweep.plan import FILE, Sweep, names, read_sweep, save
from mapo_lightning.run.sweep.sharing import NOT_READ, digest, shared
from mapo_lightning.run.sweep.tasks import Task, become, environment, tasks_of
from mapo_lightning.types import ConfigError


def swept(*words: str) -> Sweep:
    sweep = read_sweep(words)
    assert sweep is not None
    return sweep


def test_a_sweep_has_a_run_for_every_combination() -> None:
    sweep = swept("method=mapo,apv", "seed=0..2", "env=toy", "launch.jobs=2", "run_dir=x")
    assert [p.name for p in sweep.points] == [
        f"method={method}+seed={seed}" for method in ("mapo", "apv") for seed in range(3)
    ]
    assert [(p.composed.config.method, p.composed.config.seed) for p in sweep.points] == [
        (method, seed) for method in ("mapo", "apv") for seed in range(3)
    ]
    assert sweep.points[4].words == ("method=apv", "seed=1", "env=toy")
    assert (sweep.folder_given, sweep.config.launch.jobs) == ("x", 2)
    assert list(sweep.settings()) == [("method=mapo",), ("method=apv",)]


@pytest.mark.parametrize(
    "words",
    [
        ["env=toy"], ["data=folder", "data.root=../videos"], ["world_model.image.channels=[8,16]"],
        ["vlm=openai_server", "vlm.server.base_url=http://A/v1,http://B/v1"],
        ["data=folder", "data.root='a,b'"],
    ],
)  # fmt: skip
def test_words_with_one_meaning_are_one_run(words: list[str]) -> None:
    assert read_sweep(words) is None
    configure(words, conf_folder())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("stage=all,pretrain", "stage= cannot have several values"),
        ("run_dir=a,b", "run_dir= cannot have several values"),
        ("work_dir=a,b", "work_dir= cannot"),
        ("resume=a,b", "give resume= the folder of the sweep"),
        ("stage=evaluate checkpoint=a,b", "checkpoint= cannot"),
        ("config=a,b", "config= cannot"),
        ("launch=local,slurm", "launch= cannot"),
        ("launch.jobs=1,2", "launch.jobs= cannot"),
        ("tracking.uri=sqlite:///a,sqlite:///b", "tracking.uri= cannot"),
        ("seed=0,1 resume=runs/x", "resume= goes on with one run"),
        ("method=mapo,apvv", r"Did you mean 'apv'.*in method=apvv of the sweep; nothing was"),
        ("seed=0,x", "'seed' must be int, got 'x'.*in seed=x of the sweep"),
        ("pretrain.lr=1e-3,0.001", "are the same run"),
        ("sed=0,1", "Did you mean 'seed'"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(words: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read_sweep(words.split())


@pytest.mark.slow
def test_show_lists_the_runs_and_says_that_it_is_a_sweep(
    capsys: pytest.CaptureFixture[str], in_tmp: Path
) -> None:
    assert main(["env.name=disc", "agent.horizon=5,10", "env=toy", "--show"]) == 0
    said = capsys.readouterr().out
    assert "a sweep of 2 runs: 2 of agent.horizon" in said
    assert re.search(r"agent.horizon=10 +\(in horizon=10, shares pre-training [0-9a-f]{12}\)", said)
    assert "outside brackets and quotes divide" in said
    assert main(["seed=0,1", "--help", "seed"]) == 0
    assert "Seed of initialisation" in capsys.readouterr().out
    assert list(in_tmp.iterdir()) == []


values = st.text(min_size=1, max_size=150).filter(str.strip)


@given(st.lists(st.tuples(values, values), min_size=1, max_size=6, unique=True))
def test_names_are_all_different_and_need_no_quoting(pairs: list[tuple[str, str]]) -> None:
    found = names([{"a.lr": first, "b.lr": second} for first, second in pairs])
    assert len({name.lower() for name in found}) == len(found)
    for name in found:
        assert re.fullmatch(r"[A-Za-z0-9_.+=-]{1,100}", name)
        assert name.startswith("a.lr=")


def test_names_are_short_where_that_is_clear() -> None:
    assert names([{"pretrain.lr": "1e-3", "env": "dmc/walker_run"}]) == [
        "lr=1e-3+env=dmc-walker_run"
    ]
    first, second = names([{"env": "a/b"}, {"env": "a-b"}])
    assert first != second


BASE = ["env=toy", "method=mapo"]


def digest_of(*words: str) -> str:
    composed = configure([*BASE, *words], conf_folder())
    return digest(composed.config, composed.flat)


@pytest.mark.parametrize(
    "word",
    [
        "agent.horizon=7", "finetune.lr_model=1e-3", "finetune.agent_steps=9000",
        "replay.capacity=9",
        "evaluate.episodes=3", "env.name=disc_anywhere", "env.action_repeat=3", "run_dir=x",
        "tracking.enabled=false", "launch=slurm", "callbacks.progress=false",
        "trainer.requeue=true",
    ],
)  # fmt: skip
def test_what_pre_training_does_not_read_is_shared(word: str) -> None:
    assert digest_of(word) == digest_of()


@pytest.mark.parametrize(
    "word",
    [
        "seed=1", "method=apv", "size=paper", "vlm=none", "pretrain.lr=1e-3", "data.seed=3",
        "demo.frames=20", "data.clip_length=21", "world_model.bonus.beta=0.3", "trainer.threads=2",
        "env.render_quality=full", "callbacks.codebook=false", "work_dir=x", "data.workers=3",
        "trainer=gpu", "finetune.chunk_length=40",  # the window of the upper transformer follows it
    ],
)  # fmt: skip
def test_what_pre_training_may_read_is_not(word: str) -> None:
    assert digest_of(word) != digest_of()


def test_experts_leave_the_task_out_of_their_films() -> None:
    films = ["data=metaworld_experts", "vlm=templates", "env=metaworld"]
    assert digest_of(*films, "env.name=door-open") != digest_of(*films, "env.name=door-close")


def test_settings_are_read_unless_they_are_listed() -> None:
    known = {leaf.key for leaf in walk(RunConfig)}
    for name in NOT_READ:
        assert any(key == name or key.startswith(f"{name}.") for key in known), name


READERS = {
    build.__file__: {"build_videos", "build_pretrain", "demo_scenes", "left_out", "shared_store",
                     "_token_world"},
    stages.__file__: {"learn_videos", "seed_phase", "render_demo"},
    phase.__file__: {"fit", "around"},
}  # fmt: skip


def test_pre_training_reads_no_section_that_is_taken_for_unread() -> None:
    """What its functions ask the run's settings for; `env` has a rule of its own."""
    unread = {name for name in NOT_READ if "." not in name} - {"tracking"}  # where it is recorded
    asked: dict[str, set[str]] = {}
    for file, wanted in READERS.items():
        tree = ast.parse(Path(str(file)).read_text(encoding="utf-8"))
        found = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        for name in wanted:
            nodes = [n for n in ast.walk(found[name]) if isinstance(n, ast.Attribute)]
            asked[name] = {n.attr for n in nodes if ast.unparse(n.value).endswith("cfg")}
    read = set().union(*asked.values())
    assert {"data", "vlm", "world_model", "seed", "demo"} <= read
    assert not read & unread
    assert asked["demo_scenes"] & {"env"}


@pytest.mark.slow
def test_points_that_share_start_from_one_pre_training(tmp_path: Path) -> None:
    sweep = swept("env=toy", "method=mapo,dreamerv2", "agent.horizon=3,5", "stage=all")
    common = shared(sweep.points)
    assert set(common) == {"method=mapo+horizon=3", "method=mapo+horizon=5"}
    first, second, third, *others = tasks_of(sweep, tmp_path, "abc")
    assert first.name == f"pretrained-{common['method=mapo+horizon=3']}"
    assert first.words[-2:] == ("stage=pretrain", f"run_dir={first.folder}")
    assert (second.needs, third.needs) == (first, first)
    start = f"init_from={first.folder}/pretrain/last.ckpt"
    assert second.words[-3:] == ("stage=finetune", start, f"run_dir={second.folder}")
    assert all(task.needs is None and "stage=all" in task.words for task in others)
    assert all("tracking.parent=abc" in task.words for task in (first, second, *others))
    for task in (first, second, *others):  # each is the words of an ordinary run
        assert read_sweep(task.words) is None
        cfg = configure(task.words, conf_folder()).config
        assert Path(cfg.run_dir) == task.folder


@pytest.mark.slow
def test_a_run_that_was_begun_alone_goes_on_alone(tmp_path: Path) -> None:
    (tmp_path / "horizon=3/pretrain").mkdir(parents=True)
    found = tasks_of(swept("env=toy", "agent.horizon=3..5"), tmp_path, None)
    assert [task.name[:10] for task in found] == [
        "horizon=3",
        "pretrained",
        "horizon=4",
        "horizon=5",
    ]
    assert not any(word.startswith("stage=") for word in found[0].words)


def test_a_stage_of_its_own_shares_nothing() -> None:
    assert shared(swept("env=toy", "agent.horizon=3,5", "stage=finetune").points) == {}


@pytest.mark.slow
def test_the_same_command_goes_on_and_another_is_refused(tmp_path: Path) -> None:
    words = ["env=toy", "method=mapo,apv", "seed=0,1", f"run_dir={tmp_path}"]
    save(swept(*words), tmp_path)
    save(swept(*words, "launch.jobs=3", "tracking.enabled=false"), tmp_path)
    save(swept("env=toy", "method=mapo,apv", "seed=0..4", f"run_dir={tmp_path}"), tmp_path)
    again = swept(f"resume={tmp_path}", "launch.jobs=5")
    assert (len(again.points), again.config.launch.jobs, again.resumed) == (10, 5, True)
    save(again, tmp_path)
    with pytest.raises(ConfigError, match=r"other settings \(agent.horizon=3\)"):
        save(swept(*words, "agent.horizon=3"), tmp_path)
    with pytest.raises(ConfigError, match=r"cannot take agent\.horizon=3"):
        read_sweep([f"resume={tmp_path}", "agent.horizon=3"])


def test_a_strangers_sweep_is_not_run(tmp_path: Path) -> None:
    save(swept("env=toy", "seed=0,1"), tmp_path)
    path = tmp_path / FILE
    path.write_text(path.read_text().replace("env=toy", "env=demo"))
    with pytest.raises(ConfigError, match="type the command of the sweep with run_dir="):
        read_sweep([f"resume={tmp_path}"])
    path.write_text("# signature: x\nwords: 5\n")
    with pytest.raises(ConfigError, match="is damaged"):
        save(swept("env=toy", "seed=0,1"), tmp_path)


def test_a_folder_with_a_run_in_it_takes_no_sweep(tmp_path: Path) -> None:
    (tmp_path / "finetune").mkdir()
    (tmp_path / "finetune/last.ckpt").touch()
    with pytest.raises(ConfigError, match=r"a single run \(finetune/last.ckpt\)"):
        save(swept("env=toy", "seed=0,1"), tmp_path)


def test_a_run_knows_whether_it_was_begun(tmp_path: Path) -> None:
    outside = {"MAPO_RUN_DIR": "x", job.AGAIN: "1", "PATH": "p", "PYTHONPATH": "a"}
    new = environment(tmp_path / "new", outside)
    assert job.AGAIN not in new
    assert "MAPO_RUN_DIR" not in new
    assert new["PYTHONPATH"].split(os.pathsep)[-1] == "a"
    assert environment(tmp_path, outside)[job.AGAIN] == "1"
    assert not finished.is_finished(tmp_path)
    finished.write(tmp_path, "all")
    assert Task("x", tmp_path, ()).finished
    finished.remove(tmp_path)
    assert not Task("x", tmp_path, ()).finished


def test_the_last_error_of_this_start_is_what_failed(tmp_path: Path) -> None:
    task = Task("x", tmp_path, ())
    assert task.complaint() == ""
    task.log.write_text("error: old\n")
    size = task.log_size()
    assert task.complaint() == "old"
    with task.log.open("a") as file:
        file.write("working\nerror: cannot open http://me:secret@host/v1\n")
    assert task.complaint(size) == "cannot open http://***@host/v1"


def test_a_task_of_slurm_waits_for_its_pre_training(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:  # it ends this process, or becomes another program
        try:
            become(["seed=0"], str(tmp_path / "run"), str(tmp_path / "missing"))
        except SystemExit as error:
            os._exit(int(str(error.code)))
        os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    assert "is not finished" in Task("run", tmp_path / "run", ()).complaint()
