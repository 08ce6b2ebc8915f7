"""How often Meta-World's experts solve their tasks in the clips that are filmed of them.

    python benchmarks/experts.py --clips 10 --out FILE.md

Plays the clips of ``data=metaworld_experts`` (same seeds, same noise) without drawing them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from mapo_lightning.envs.experts import expert_scenes
from mapo_lightning.envs.filming import rehearse
from mapo_lightning.envs.settings import EnvConfig


def main() -> None:
    """Play all clips and write a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=10)
    parser.add_argument("--frames", type=int, default=75)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.05, 0.15])
    parser.add_argument("--out", type=Path, default=Path("runs/experts.md"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    head = " | ".join(f"noise {noise:g}" for noise in args.noise)
    with args.out.open("w") as file:
        file.write(f"| task | {head} | frames |\n|---|{'---|' * len(args.noise)}---|\n")
        for scene in expert_scenes([], EnvConfig(kind="metaworld", name="reach")):
            started, cells, first = time.monotonic(), [], []
            for noise in args.noise:
                found = [
                    rehearse(scene, clip, args.frames, 25, 0, noise) for clip in range(args.clips)
                ]
                first.append(sorted(frame for frame in found if frame is not None))
                cells.append(f"{len(first[-1])} of {args.clips}")
            median = first[0][len(first[0]) // 2] if first[0] else "-"
            file.write(f"| `{scene.name}` | {' | '.join(cells)} | {median} |\n")
            file.flush()
            print(scene.name, *cells, f"{time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
