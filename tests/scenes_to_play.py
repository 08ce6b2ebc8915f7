"""Scenes of fresh networks, as `mapo-play` makes them of checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from networks import backbone, image, token_world

from mapo_lightning.config.compose import compose
from mapo_lightning.envs.factory import make_env
from mapo_lightning.models.interfaces import Stepwise
from mapo_lightning.playing.filmed import FilmedScene
from mapo_lightning.playing.simulated import SimulatedScene
from mapo_lightning.run.agent import Agent
from mapo_lightning.run.build import build_finetune, build_pretrain
from mapo_lightning.run.config import RunConfig
from mapo_lightning.semantics.embed import HashedSlots
from mapo_lightning.types import Batch

CONF = Path(__file__).parents[1] / "conf"
SIDE, FRAMES, CLIPS = 32, 8, 3
AGENTS = {
    "gru": ["method=mapo"],
    "transformer": ["method=mapo", *backbone("transformer", "mapo")],
    "one dynamics": ["method=prelar"],
    "ensemble": ["method=dreamerv2", "world_model.ensemble.members=3"],
    "tokens": [
        "method=ivideogpt_fixed",
        "token_world.lpips=false",
        "token_world.tokenizer={channels: [8, 32, 32], blocks: 1, groups: 8, latent: 8, "
        "context_codes: 32, future_codes: 32}",
        "token_world.transformer={layers: 2, width: 32, heads: 4, mlp: 64, positions: 200}",
    ],
}
"""Words of a method, by the kind of its world model."""
FILMED = ("mapo", "mapo transformer", "prelar", "apv", "tokens", "tokens and phrases")


def agent(kind: str, seed: int = 0) -> Agent:
    words = [*AGENTS[kind], "env=toy"]
    if kind == "tokens":
        words += [f"world_model.image.size={SIDE}", "size=tiny", "agent=mbpo"]
    else:
        words += [image("tiny")]
    cfg = compose(words, RunConfig, CONF).config
    torch.manual_seed(seed)
    return Agent(cfg, build_finetune(cfg, 2, None)[0].eval(), 2)


def simulated(*agents: Agent, watch: int = 3, limit: int = 12) -> SimulatedScene:
    env = compose(["env=toy", f"world_model.image.size={SIDE}"], RunConfig, CONF).config.env
    env.time_limit = limit
    names = [str(number) for number in range(len(agents))]
    return SimulatedScene(names, agents, lambda: make_env(env, 0), watch)


def pretrained(kind: str) -> Stepwise:
    torch.manual_seed(0)
    width = HashedSlots().semantic_dim
    if kind.startswith("tokens"):
        phrases = kind != "tokens"
        world = token_world(None, "transformer", width * phrases, phrases=phrases)
    else:
        method, _, dynamics = kind.partition(" ")
        words = [f"method={method}", "env=toy", image("tiny", method)]
        words += backbone(dynamics or "gru", method)
        world = build_pretrain(compose(words, RunConfig, CONF).config).world_model  # type: ignore[assignment]
    assert isinstance(world, Stepwise)
    world.eval()  # type: ignore[attr-defined]
    return world


def clips() -> Batch:
    torch.manual_seed(1)
    first = torch.zeros(CLIPS, FRAMES, dtype=torch.bool)
    first[:, 0] = True
    shape = (CLIPS, FRAMES, SIDE, SIDE, 3)
    return {
        "obs": torch.randint(0, 256, shape, dtype=torch.uint8),
        "semantic": torch.randn(CLIPS, FRAMES, HashedSlots().semantic_dim),
        "has_semantic": torch.ones(CLIPS, FRAMES, dtype=torch.bool),
        "position": torch.arange(FRAMES).expand(CLIPS, FRAMES),
        "is_first": first,
    }


def filmed(*kinds: str, watch: int = 3) -> FilmedScene:
    worlds = [pretrained(kind) for kind in kinds]
    return FilmedScene(kinds, worlds, clips(), HashedSlots(), watch, {"body": ["disc"]})
