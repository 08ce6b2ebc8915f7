"""What a learning study measures beside its runs. The protocol is docs/protocols/learning.md.

    mapo-train experiment=learning/toy method=mapo,mapo_no_cvq,contextwm,apv,prelar,dreamerv2 \
        seed=0..4 run_dir=runs/learning/toy launch.jobs=2
    python benchmarks/learning.py runs/learning/toy
    mapo-report runs/learning/toy out=runs/learning/report

The sweep trains and evaluates, and `mapo-report` compares and draws. In between, this measures two
things that a run does not, because they are the same for all methods: how well the fine-tuned model
foresees rewards, on episodes of random actions that no run has seen; and how the pre-trained model
errs on held-out videos, also where no phrase drives it. Both are kept in the folder of the run, as
foresight.json and dreams.json, where the report finds them; what is there is not measured again.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.token_world import dreams  # noqa: E402
from mapo_lightning.config.compose import from_base  # noqa: E402
from mapo_lightning.envs.episodes import RandomPolicy  # noqa: E402
from mapo_lightning.reporting.gather import Stores, from_folders  # noqa: E402
from mapo_lightning.run.build import build_collection, load_finetuned  # noqa: E402
from mapo_lightning.run.config import RunConfig  # noqa: E402
from mapo_lightning.run.from_checkpoint import agent_settings  # noqa: E402
from mapo_lightning.training.datamodule import chunk_batch  # noqa: E402
from mapo_lightning.types import MapoError  # noqa: E402

SEED = 12_345  # of the episodes, that of no run


def main(roots: list[Path]) -> None:
    """Measure what is missing in every finished run of some folders."""
    for run in from_folders(roots, Stores()):
        if run.state != "finished" or run.folder is None:
            print(f"left out: {run.name} is {run.state}: {run.why}", flush=True)
            continue
        if (run.folder / "pretrain" / "last.ckpt").is_file():
            found = dreams(run.folder)
            print(f"{run.name}: error 5 frames ahead {found['told 5']:.1f} thousandths", flush=True)
        if run.counts and run.stage != "evaluate":
            now, ahead = foresight(run.folder)
            print(f"{run.name}: reward foreseen {now:.2f}, ten steps {ahead:.2f}", flush=True)


@torch.no_grad()
def foresight(run: Path, chunks: int = 64, seen: int = 5, ahead: int = 10) -> list[float]:
    """How well a finished run's world model predicts rewards, from -1 to 1.

    The correlation with the true reward, over chunks of fresh episodes, of what the reward head
    says of a state whose frame was seen, and of the sum over a dream of the ``ahead`` steps after
    the first ``seen`` frames.
    """
    path, known = run / "finetune/best.ckpt", run / "foresight.json"
    path = path if path.exists() else path.with_name("last.ckpt")
    if known.exists():
        return list(json.loads(known.read_text()))
    cfg = from_base(agent_settings(path), RunConfig)
    cfg.seed = SEED
    module, _ = load_finetuned(cfg, path)
    model = module.eval().world_model
    with tempfile.TemporaryDirectory() as folder:
        stage = build_collection(cfg, Path(folder), 0)
        policy = RandomPolicy(stage.action_dim, cfg.seed, cfg.finetune.prefill_hold)
        stage.collector.collect(policy, 1000)
        rng = np.random.default_rng(0)
        batch = chunk_batch(stage.replay, rng, chunks, seen + ahead, joined=False)
        stage.collector.close()
    torch.manual_seed(0)
    belief, action_BTA = model.observe(batch), batch["action"]
    dream = model.imagine(belief.at(seen - 1), lambda i, _: action_BTA[:, seen + i], ahead)
    # With a bonus the reward head learns the sum of both; the auxiliary one the task's reward.
    has_bonus = cfg.world_model.bonus.beta > 0 and cfg.world_model.aux_reward
    head = "aux_reward" if has_bonus else "reward"
    pairs = (
        (model.heads.read(head, belief.feat), batch["reward"]),
        (model.heads.read(head, dream.feat[1:]).sum(0), batch["reward"][:, seen:].sum(1)),
    )
    found = [float(np.corrcoef(a.flatten(), b.flatten())[0, 1]) for a, b in pairs]
    known.write_text(json.dumps(found))
    return found


if __name__ == "__main__":
    if len(sys.argv) < 2 or "--help" in sys.argv:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    try:
        main([Path(word) for word in sys.argv[1:]])
    except MapoError as error:
        sys.exit(f"error: {error}")
