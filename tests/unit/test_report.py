"""The report: its page, its files, published numbers beside ours, and what it refuses."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from studies import make_run

from mapo_lightning.config.compose import compose
from mapo_lightning.reporting.compare import over_tasks
from mapo_lightning.reporting.figures import profiles
from mapo_lightning.reporting.gather import Stores, from_folders
from mapo_lightning.reporting.published import beside, published
from mapo_lightning.reporting.report import make, view_of
from mapo_lightning.reporting.study import Study, study
from mapo_lightning.reporting.style import METHODS, Link, colour_of, csv_text, table
from mapo_lightning.run.config import RunConfig, conf_folder
from mapo_lightning.run.report import main, protocol
from mapo_lightning.types import ConfigError

ROOT = Path(__file__).parents[2]


def found(*roots: Path) -> Study:
    return study(from_folders(roots, Stores()))


@pytest.mark.slow  # it composes all of them
def test_published_numbers_are_those_of_the_pages_and_of_the_experiments() -> None:
    page = (ROOT / "docs/reproduce.md").read_text()
    facts = (ROOT / "docs/facts.md").read_text()
    cells = published().cells
    assert len({cell.experiment for cell in cells}) == len(cells) == 8 + 16 + 48
    assert published().seeds == 3
    for cell in cells:
        words = [f"experiment={cell.experiment}", "vlm.hidden_dim=3584", "token_world.lpips=false"]
        groups = compose(words, RunConfig, conf_folder()).groups
        chosen = (groups["env"], groups["method"], groups["data"])
        assert chosen == (cell.task, cell.method, cell.videos), cell.experiment
        if cell.place == "figure2":
            continue
        (row,) = [x for x in page.splitlines() if x.startswith(f"| `{cell.experiment}` |")]
        assert f"| {cell.value} |" in row
        assert f" {cell.value} " in facts


def test_numbers_of_the_figure_are_those_of_the_table_that_they_name() -> None:
    cells = published().cells
    taken = [cell for cell in cells if cell.taken_from]
    assert len(taken) == 10
    for cell in taken:
        same = [
            other.value for other in cells
            if other.place == cell.taken_from
            and (other.task, other.method, other.videos) == (cell.task, cell.method, cell.videos)
        ]  # fmt: skip
        assert same == [cell.value], cell.experiment


def quadruped(folder: Path, *words: str, method: str = "contextwm", score: float = 800.0) -> Path:
    """A run of the published protocol, but for what the words say."""
    name = f"experiment=table2/quadruped_run_{method}_human36m"
    run = make_run(folder, name, *words, score=score)
    (run / "pretrain").mkdir()
    return run


def test_a_run_of_the_published_protocol_is_comparable(tmp_path: Path) -> None:
    for seed in range(3):
        quadruped(tmp_path / str(seed), f"seed={seed}", "trainer=cpu", score=800.0 + seed)
    pairs = [one for one in beside(found(tmp_path), protocol) if one.ours]
    assert {one.published.experiment: one.why_not for one in pairs} == {
        "table2/quadruped_run_contextwm_human36m": (),
        "figure2/quadruped_run_contextwm": (),
    }
    assert all(one.ours and one.ours.stats.mean == 801.0 for one in pairs)


def test_another_protocol_is_not_comparable_and_says_why(tmp_path: Path) -> None:
    quadruped(tmp_path / "a", "size=tiny", "finetune.agent_steps=5000", "evaluate.episodes=3",
              "data=demo")  # fmt: skip
    (one, *others) = [x for x in beside(found(tmp_path), protocol) if x.ours]
    # With videos of neither data set it stands beside both.
    assert {x.published.experiment for x in (one, *others)} == {
        "table2/quadruped_run_contextwm_ssv2", "table2/quadruped_run_contextwm_human36m",
        "figure2/quadruped_run_contextwm",
    }  # fmt: skip
    assert one.why_not[0] == "10,000 environment frames, published 1,004,000"
    assert "pixels a side 32, published 64" in one.why_not
    assert "test episodes 3, published 10" in one.why_not
    assert "videos demo, published ssv2" in one.why_not


def test_the_describer_belongs_to_the_protocol_of_mapo(tmp_path: Path) -> None:
    quadruped(tmp_path / "a", "vlm=flow", "vlm.hidden_dim=null", method="mapo")
    reasons = [one.why_not for one in beside(found(tmp_path), protocol) if one.ours]
    assert reasons
    assert all(why == ("describer flow, published Qwen2.5-VL-7B",) for why in reasons)


def test_a_task_without_published_numbers_has_none_beside(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "env=toy", "method=apv", score=5.0)
    assert beside(found(tmp_path), protocol) == []


def test_the_page_loads_nothing_and_leads_to_the_runs(tmp_path: Path) -> None:
    for method, score in (("apv", 5.0), ("mapo", 9.0)):
        for seed in (0, 1):
            make_run(tmp_path / "runs" / f"{method}-{seed}", "env=toy", f"method={method}",
                     f"seed={seed}", score=score + seed,
                     curve=[(100, 1.0), (4800, score)])  # fmt: skip
    out = tmp_path / "out"
    report = make(found(tmp_path / "runs"), protocol, out, title="<script>alert(1)</script>")
    written = report.save(out)
    page = (out / "report.html").read_text()
    assert "default-src 'none'" in page
    assert "<script" not in page
    sources = re.findall(r'(?:src|srcset|data|action)="([^"]*)"', page)
    assert sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    links = {link for link in re.findall(r'href="([^"]*)"', page) if not link.startswith("#")}
    assert links == {f"../runs/{m}-{s}/" for m in ("apv", "mapo") for s in (0, 1)}
    assert all((out / link).is_dir() for link in links)
    assert "not told apart" in page or "yes" in page
    names = {path.name for path in written}
    assert {"report.html", "runs.csv", "scores.csv", "curves.csv", "comparisons.csv"} <= names
    assert {f"{n}.{k}" for n in ("curves", "curves_iqm", "scores") for k in ("png", "pdf")} <= names
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "curves.pdf").read_bytes().startswith(b"%PDF")


def test_tables_hold_the_numbers_in_full(tmp_path: Path) -> None:
    for seed, score in enumerate((10.0, 12.0, 17.0)):
        make_run(tmp_path / f"r{seed}", "env=toy", "method=apv", f"seed={seed}", score=score,
                 curve=[(4800, score)])  # fmt: skip
    report = make(found(tmp_path), protocol, tmp_path / "out")
    rows = list(csv.DictReader(report.tables["scores.csv"].splitlines()))
    assert [row["method"] for row in rows] == ["apv", "random", "still"]
    assert (rows[0]["seeds"], rows[0]["return"]) == ("3", "13.0")
    assert float(rows[0]["return_low"]) == pytest.approx(13 - 8.956617, abs=1e-4)
    curves = list(csv.DictReader(report.tables["curves.csv"].splitlines()))
    assert [(row["seed"], row["return"]) for row in curves] == [
        ("0", "10.0"), ("1", "12.0"), ("2", "17.0"), ("all", "13.0"),
    ]  # fmt: skip
    assert "dreams.csv" not in report.tables


def test_a_report_is_the_same_every_time(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path / f"r{seed}", "env=toy", "method=apv", f"seed={seed}", score=5.0 + seed)
    one, two = (make(found(tmp_path), protocol, tmp_path / "out") for _ in range(2))
    assert one.page == two.page
    assert one.pictures == two.pictures


def test_profiles_need_three_tasks(tmp_path: Path) -> None:
    tasks = ("toy", "dmc/cheetah_run", "metaworld/door-open")
    for number, task in enumerate(tasks):
        for seed in (0, 1):
            make_run(tmp_path / f"{number}-{seed}", f"env={task}", "method=apv", f"seed={seed}",
                     score=10.0 + seed)  # fmt: skip
    three = found(tmp_path)
    # Every task has 10 and 11 and random actions 2: 8 / 8.5 and 9 / 8.5.
    assert over_tasks(three)["apv"].value == pytest.approx(1.0)
    assert over_tasks(three)["apv"].interval == pytest.approx((8 / 8.5, 9 / 8.5), abs=0.03)
    assert over_tasks(three._replace(cells=three.cells[:1])) == {}
    assert profiles(three) is not None
    assert profiles(three._replace(cells=three.cells[:2])) is None


def test_colours_are_fixed_and_told_apart() -> None:
    assert len(set(METHODS.values())) == len(METHODS)
    brought = {path.stem for path in (ROOT / "conf/method").glob("*.yaml")}
    assert brought == set(METHODS)
    assert colour_of("mapo") == "#0072B2"
    assert colour_of("somebody's") == colour_of("somebody's") not in METHODS.values()


def test_tables_escape_what_they_hold() -> None:
    text = table(["<b>"], [["<i>", Link("<u>", 'x" onload="y')]], "wrap")
    assert text == (
        '<table class="wrap"><tr><th>&lt;b&gt;</th></tr>'
        '<tr><td>&lt;i&gt;</td><td><a href="x&quot; onload=&quot;y">&lt;u&gt;</a></td></tr></table>'
    )
    assert csv_text([{"a": 1}, {"b": None}]) == "a,b\n1,\n,\n"
    assert csv_text([{"a": "=HYPERLINK(0)"}, {"a": -1.5}]) == "a\n'=HYPERLINK(0)\n-1.5\n"


def test_the_method_to_compare_with_must_be_there(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "env=toy", "method=apv", score=5.0)
    runs = found(tmp_path)
    assert view_of(runs) == "apv"
    with pytest.raises(ConfigError, match="against=mapo: no run here is of it, only of apv"):
        view_of(runs, "mapo")


def test_the_command_writes_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "s/method=apv+seed=0", "env=toy", "method=apv", score=5.0)
    make_run(tmp_path / "s/method=apv+seed=1", "env=toy", "method=apv", "seed=1", mark=False)
    assert main(["s/method=apv+seed=0", "s", "out=o"]) == 0
    said = capsys.readouterr().out
    assert "| toy/disc | `apv` | 1 | 5.0 | 5.0 |  |" in said
    assert "does not count: method=apv+seed=1 is unfinished: no checkpoint yet" in said
    assert (tmp_path / "o/report.html").is_file()
    assert json.loads((tmp_path / "s/method=apv+seed=0/finished.json").read_text())


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["out=x"], "needs folders of runs"),
        (["runs/none"], "there is no folder 'runs/none'"),
        (["outt=x"], "cannot read 'outt=x'"),
        (["experiment=e", "tracking.uri=sqlite:///no.db"], "cannot read the MLflow store"),
        (["experiment=e", "tracking.uri=runs"], "uri must start with"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    words: list[str], error: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert error in capsys.readouterr().err


def test_nothing_to_report_on_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "a", "env=toy", "method=apv", mark=False)
    assert main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "no run counts" in said
    assert "a is unfinished (no checkpoint yet)" in said
