"""Does the token world learn the toy? The protocol is docs/protocols/ivideogpt.md.

    mapo-train method=ivideogpt_fixed env=toy seed=0 trainer.threads=1 run_dir=runs/token/fixed-0
    python benchmarks/token_world.py runs/token/*
    python benchmarks/token_world.py --cost        arithmetic of a dreamt frame, for both sizes

Prints a table of the runs whose folders are given; a run that is not finished is named.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.codebook import last_shown  # noqa: E402
from mapo_lightning.config.compose import compose, from_base  # noqa: E402
from mapo_lightning.models.token_world.frame_predictor import FramePredictor  # noqa: E402
from mapo_lightning.run import build  # noqa: E402
from mapo_lightning.run.config import RunConfig  # noqa: E402
from mapo_lightning.run.from_checkpoint import agent_settings  # noqa: E402
from mapo_lightning.training.checkpoint import read_checkpoint  # noqa: E402
from mapo_lightning.training.metadata import weights_of  # noqa: E402
from mapo_lightning.training.told import measure_held_out, student  # noqa: E402

CLIPS = 48
AHEAD = (1, 5, 10)
Row = dict[str, float]


@torch.no_grad()
def costs(frames: int = 10) -> Iterator[str]:
    """Markdown: arithmetic of a dream, counted, beside one pass over all of its tokens."""
    heads = ("size", "tokens", "dream, GFLOP", "one pass, GFLOP", "dream / pass")
    yield f"| {' | '.join(heads)} | read anew for each frame |"
    yield "|---|---|---|---|---|---|"
    for size in ("tiny", "paper"):
        words = ["method=ivideogpt_fixed", "env=toy", f"size={size}", "token_world.lpips=false"]
        cfg = compose(words, RunConfig, ROOT / "conf").config.token_world
        model = FramePredictor(cfg.transformer, cfg.tokenizer, 2).eval()
        dreamt = flops(partial(dream, model, frames))
        once = flops(partial(read, model, frames))
        anew = sum(flops(partial(read, model, steps)) for steps in range(1, frames + 1))
        yield (
            f"| {size} | {model.layout.length(frames)} | {dreamt / 1e9:.3g} | {once / 1e9:.3g} "
            f"| {dreamt / once:.2f} | {anew / once:.1f} |"
        )


def dream(model: FramePredictor, frames: int) -> None:
    """Dream frames after an empty context, with one cache for all."""
    tokens = torch.zeros(1, model.layout.length(frames), dtype=torch.long)
    reading = model.start(model.layout.split(tokens)[0])
    for _ in range(frames):
        _, _, reading = model.next_frame(reading, torch.zeros(1, 2))


def read(model: FramePredictor, frames: int) -> None:
    """Read as many frames, all of their tokens at once."""
    model(torch.zeros(1, model.layout.length(frames), dtype=torch.long), torch.zeros(1, frames, 2))


def flops(run: Callable[[], object]) -> float:
    """Counted arithmetic of a call, in FLOP."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def main(folders: Sequence[Path]) -> None:
    """Print the table of the runs in these folders."""
    rows: dict[str, list[Row]] = {}
    for folder in folders:
        if not (folder / "evaluation.json").exists():
            print(f"not finished: {folder}")
            continue
        tree = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        rows.setdefault(tree["method"], []).append(scores(tree) | dreams(folder))
    for method, found in rows.items():
        print(f"\n{method}\n")
        print("\n".join(table(sorted(found, key=lambda row: row["seed"]))))


def scores(tree: dict[str, Any]) -> Row:
    """Return of the agent with its interval over episodes, and of the best policy beside it."""
    returns = {
        name: [episode["return"] for episode in policy["episodes"]]
        for name, policy in tree["policies"].items()
    }
    agent = returns.pop("agent")
    found = student(agent)
    best = max(float(np.mean(played)) for played in returns.values())
    return {
        "seed": tree["seed"], "return": found.mean, "low": found.low, "high": found.high,
        "best trivial": best,
    }  # fmt: skip


def dreams(folder: Path) -> Row:
    """Errors on held-out videos, on pixels that move, in thousandths; kept beside the run."""
    kept = folder / "dreams.json"
    if not kept.exists():
        checkpoint = folder / "pretrain" / "last.ckpt"
        cfg = from_base(agent_settings(checkpoint, videos=True), RunConfig)
        data, module = build.build_videos(cfg), build.build_pretrain(cfg)
        module.load_state_dict(weights_of(read_checkpoint(checkpoint)), strict=False)
        report = measure_held_out(module.world_model, data, CLIPS)
        found = {"drawn": last_shown(report)}
        phrases = ("untold",) if cfg.reads_phrases else ()
        for name in ("told", *phrases, "copy", "still_scene"):
            found |= {f"{name} {ahead}": report.at(name, ahead).mean for ahead in AHEAD}
        kept.write_text(json.dumps(found, indent=1), encoding="utf-8")
    row: Row = json.loads(kept.read_text(encoding="utf-8"))
    return row


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Markdown: one row for each seed, and one for the mean of all."""
    names = ["drawn", *(f"told {n}" for n in AHEAD)]
    names += [f"{name} {n}" for name in ("copy", "still_scene") for n in AHEAD]
    heads = [name.replace("told", "dream").replace("_", " ") for name in names]
    yield f"| seed | return | best trivial | {' | '.join(heads)} |"
    yield "|---" * (len(names) + 3) + "|"
    for row in rows:
        cells = " | ".join(f"{row[name]:.1f}" for name in names)
        score = f"{row['return']:.1f} [{row['low']:.1f}, {row['high']:.1f}]"
        yield f"| {row['seed']:.0f} | {score} | {row['best trivial']:.1f} | {cells} |"
    if len(rows) > 1:
        columns = ("return", "best trivial", *names)
        found = (student([row[name] for row in rows]) for name in columns)
        cells = (f"{x.mean:.1f} [{x.low:.1f}, {x.high:.1f}]" for x in found)
        yield f"| all | {' | '.join(cells)} |"


if __name__ == "__main__":
    if sys.argv[1:] == ["--cost"]:
        print("\n".join(costs()))
    else:
        main([Path(word) for word in sys.argv[1:]])
