"""Our numbers beside those that the paper prints, and why they may not be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from mapo_lightning.config.compose import load_yaml
from mapo_lightning.envs.settings import SUITE_REPEAT
from mapo_lightning.reporting.runs import is_of
from mapo_lightning.reporting.study import Cell, Study

_FILE = Path(__file__).with_name("published.yaml")
_VIDEOS = ("ssv2", "human36m")
_NAMED = {
    "data.kind": "videos",
    "world_model.image.size": "pixels a side",
    "world_model.lower.deter": "width of the recurrent state",
    "pretrain.updates": "updates of pre-training",
    "pretrain.batch_size": "clips in a batch",
    "finetune.batch_size": "chunks in a batch",
    "finetune.train_every": "agent steps per update",
    "env.render_quality": "rendering",
    "env.time_limit": "agent steps of an episode",
    "evaluate.episodes": "test episodes",
}
"""Settings that are named first where they differ, in words."""
_FREE = (
    "seed", "stage", "run_dir", "work_dir", "init_from", "checkpoint", "resume", "data.root",
    "data.workers", "data.cache_mb", "data.limits", "data.max_undecodable",
    "token_world.vgg", "demo", "vlm",
    "label",
    "callbacks", "play", "trainer", "tracking", "launch", "env.num_envs", "env.deaths_per_hour",
    "evaluate.num_envs", "evaluate.videos", "evaluate.dreams", "evaluate.rollouts",
    "evaluate.decisions", "finetune.collect_ahead", "world_model.recurrence",
    "world_model.image.recompute",
)  # fmt: skip
"""Settings that each reader chooses, and that change nothing in what a number means."""
_DESCRIBER = "Qwen2.5-VL-7B"

Protocol = Callable[[str], Mapping[str, Any]]
"""Name of an experiment -> its settings by dotted key."""


class Published(NamedTuple):
    """One cell of a table, or one curve of the figure."""

    place: str
    """``table1``, ``table2`` or ``figure2``."""
    row: str
    column: str
    experiment: str
    """Preset with the same settings."""
    task: str
    method: str
    videos: str
    value: float | None
    """Mean return; None where the paper has a plot only."""
    taken_from: str
    """Place of the number, where it stands elsewhere."""


class Beside(NamedTuple):
    """A published number and ours."""

    published: Published
    ours: Cell | None
    """None where nothing was run."""
    why_not: tuple[str, ...]
    """Why the two do not compare; empty where they do."""


class Sources(NamedTuple):
    """The file of published numbers."""

    source: str
    seeds: int
    """Of every number."""
    titles: Mapping[str, str]
    """Of each place."""
    cells: tuple[Published, ...]


@cache
def published() -> Sources:
    """Read the published numbers."""
    tree = load_yaml(_FILE)
    cells = [
        Published(place, **{"taken_from": "", **cell})
        for place, content in tree["places"].items()
        for cell in content["cells"]
    ]
    titles = {place: str(content["title"]) for place, content in tree["places"].items()}
    return Sources(str(tree["source"]), int(tree["seeds"]), titles, tuple(cells))


def beside(study: Study, protocol: Protocol) -> list[Beside]:
    """Every published cell of the tables and tasks that something was run of.

    Args:
        study: Ours.
        protocol: Settings of the experiments, to see whether ours had the same.
    """
    found = []
    run_of = {_plain(task) for task in study.tasks}
    for cell in published().cells:
        if _plain(cell.task) not in run_of:
            continue
        mine = list(_ours(study, cell))
        for ours in mine:
            wanted = protocol(cell.experiment)
            why = tuple(_reasons(cell, ours, wanted, study))
            found.append(Beside(cell, ours, why))
        if not mine:
            found.append(Beside(cell, None, ()))
    return found


def _ours(study: Study, cell: Published) -> Iterator[Cell]:
    """Runs of the same task and method, with the same videos or those of neither data set."""
    for mine in study.cells:
        if (_plain(mine.task), mine.method) == (_plain(cell.task), cell.method):
            videos = study.origins[mine.runs[0].name].settings.get("data.kind")
            if videos == cell.videos or videos not in _VIDEOS:
                yield mine


def _plain(task: str) -> str:
    return task.replace("_", "-")


def _reasons(cell: Published, ours: Cell, wanted: Mapping[str, Any], study: Study) -> Iterator[str]:
    """In what our runs differ from the published protocol."""
    before = study.origins[ours.runs[0].name]
    settings = before.settings
    if before.pretraining == "none" and cell.method != "dreamerv2":
        yield "not pre-trained"
    if before.pretraining == "not on this machine":
        yield "how it was pre-trained is not known here"
    frames, theirs = _frames(settings), _frames(wanted)
    if frames != theirs:
        yield f"{frames:,} environment frames, published {theirs:,}"
    differ = [
        key for key in sorted({*settings} & {*wanted})
        if not _is_free(key, wanted) and str(settings[key]) != str(wanted[key])
        and key not in ("finetune.agent_steps", "env.action_repeat")
    ]  # fmt: skip
    for key in (key for key in _NAMED if key in differ):
        yield f"{_NAMED[key]} {settings[key]}, published {wanted[key]}"
    more = [key for key in differ if key not in _NAMED]
    if more:
        yield f"{len(more)} more settings, such as {', '.join(more[:2])}"
    describer = str(settings.get("vlm.model") or settings.get("vlm.kind"))
    if settings.get("vlm.kind") in ("flow", "none", "templates"):
        describer = str(settings["vlm.kind"])
    if cell.method.startswith("mapo") and _DESCRIBER not in describer:
        yield f"describer {describer}, published {_DESCRIBER}"


def _frames(settings: Mapping[str, Any]) -> int:
    repeat = settings.get("env.action_repeat") or SUITE_REPEAT[str(settings["env.kind"])]
    return int(settings["finetune.agent_steps"]) * int(repeat)


def _is_free(key: str, wanted: Mapping[str, Any]) -> bool:
    tokens = wanted.get("world_model.kind") == "tokens"
    unread = ["world_model" if tokens else "token_world"]
    unread += ["agent.mbpo"] if wanted.get("agent.kind") != "mbpo" else []
    unread += ["pretrain.tokenizer", "pretrain.transformer"] if not tokens else []
    # dreamerv2 sees no videos, whatever its settings say of them.
    unread += ["data", "pretrain"] if wanted.get("method") == "dreamerv2" else []
    return is_of(key, (*_FREE, *unread))
