"""Words of version 0.1.0 that have a new name since; ``docs/renamed.md`` shows the same table."""

from __future__ import annotations

from mapo_lightning.config.renamed import Renamed

_DMC = ("cheetah_run", "hopper_hop", "quadruped_run", "walker_run", "cartpole_swingup")
_METAWORLD = ("dial-turn", "door-open", "drawer-close", "lever-pull")

RENAMED = Renamed(
    keys={
        "vlm.window": "vlm.window.frames",
        "vlm.stride": "vlm.window.stride",
        "vlm.offset": "vlm.window.offset",
        "vlm.frame_size": "vlm.window.size",
        "vlm.base_url": "vlm.server.base_url",
        "vlm.concurrency": "vlm.server.concurrency",
        "vlm.timeout_seconds": "vlm.server.timeout_seconds",
        "vlm.retries": "vlm.server.retries",
        "vlm.on_outage": "vlm.server.on_outage",
        "vlm.structured": "vlm.server.structured",
        "vlm.env_every": "vlm.collect.every",
        "vlm.env_frame_size": "vlm.collect.size",
        "vlm.env_late": "vlm.collect.late",
        "vlm.env_queue": "vlm.collect.queue",
        "vlm.env_drain": "vlm.collect.drain",
        "vlm.text_encoder": "vlm.embed.encoder",
        "vlm.text_encoder_revision": "vlm.embed.revision",
        "vlm.marks": "vlm.reviews",
    },
    values={"world_model.image.recompute": {False: "none", True: "all"}},
    choices={
        **{f"env=dmc_{task}": f"env=dmc/{task}" for task in _DMC},
        **{f"env=metaworld_{t.replace('-', '_')}": f"env=metaworld/{t}" for t in _METAWORLD},
    },
)
"""What the command line and files are checked against, and old checkpoints translated with."""
