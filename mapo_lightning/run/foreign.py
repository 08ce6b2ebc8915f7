"""What is taken from the settings of a checkpoint that this user has not made.

A file may choose what networks, environment and preprocessing are like. It may not choose whom
frames and keys are sent to, what is read, loaded or imported, and where results go. `ALLOWED` lists
what is taken; every other setting keeps its default, or what the user has typed. Where that is not
enough to go on, an error names the words that the user has to add.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mapo_lightning.config.schema import nested
from mapo_lightning.ownership import MAX_SETTINGS
from mapo_lightning.types import SEEDS, CheckpointError, ConfigError

log = logging.getLogger(__name__)
_PACKAGE = Path(__file__).resolve().parents[1]

_MANY = 10**9  # updates, steps
_WIDE = 2**16  # widths and other sizes
_DEEP = 64  # layers, environments, frames in memory at once

ALLOWED: Mapping[str, float] = {
    "method": 0,
    "seed": SEEDS,
    "data.kind": 0,
    "data.classes": 0,
    "data.leave_out": 0,
    "data.limit": _MANY,
    "data.official_split": 0,
    "data.clip_length": _WIDE,
    "data.frame_stride": _WIDE,
    "data.rate": _WIDE,
    "data.square": 0,
    "data.image_size": _WIDE,
    "data.holdout": 1,
    "data.max_undecodable": 1,
    "data.seed": _MANY,
    "vlm.kind": 0,
    "vlm.direction": 0,
    "vlm.hidden_dim": _WIDE,
    "vlm.max_new_tokens": 1024,
    "vlm.flow_min_percent": 100,
    "vlm.window.frames": _DEEP,
    "vlm.window.stride": _WIDE,
    "vlm.window.offset": _DEEP,
    "vlm.window.size": 2048,
    "vlm.collect.every": _WIDE,
    "vlm.collect.size": 2048,
    "vlm.collect.late": 0,
    "vlm.collect.queue": 1024,
    "vlm.collect.drain": 3600,
    "vlm.embed.direction": 0,
    "env.kind": 0,
    "env.name": 0,
    "env.camera": 1000,
    "env.action_repeat": 1000,
    "env.size": 2048,
    "env.label_size": 2048,
    "env.render_quality": 0,
    "env.time_limit": _MANY,
    "replay": _MANY,
    "world_model.kind": 0,
    "world_model.recurrence": 0,
    "world_model.image": _WIDE,
    "world_model.image.layers": _DEEP,
    "world_model.context": _WIDE,
    "world_model.source": _WIDE,
    "world_model.lower": _WIDE,
    "world_model.upper": _WIDE,
    "world_model.lower.transformer.layers": _DEEP,
    "world_model.upper.transformer.layers": _DEEP,
    # No weight has the size of the window, and acting keeps so many steps.
    "world_model.lower.transformer.window": 4096,
    "world_model.upper.transformer.window": 4096,
    "world_model.concat_embed": 0,
    "world_model.head_layers": _DEEP,
    "world_model.head_units": _WIDE,
    "world_model.head_style": 0,
    "world_model.rewards": 0,
    "world_model.unimix": 1,
    "world_model.aux_reward": 0,
    "world_model.discount_head": 0,
    "world_model.bonus": _WIDE,
    "world_model.ensemble": _WIDE,
    "world_model.ensemble.members": _DEEP,
    "world_model.ensemble.layers": _DEEP,
    "token_world.tokenizer": _WIDE,
    "token_world.tokenizer.context_frames": _DEEP,
    "token_world.tokenizer.blocks": _DEEP,
    "token_world.transformer": _WIDE,
    "token_world.transformer.layers": _DEEP,
    "token_world.error": 0,
    "token_world.lpips": 0,
    "token_world.augment": 0,
    "token_world.pretrain_frames": _WIDE,
    "token_world.tokenizer_frames": _WIDE,
    "token_world.tokenizer_every": _MANY,
    "token_world.rate": 1,
    "token_world.clips": _WIDE,
    "token_world.codes_in_clip": 0,
    "token_world.phrases": 0,
    "token_world.phrase_dropout": 1,
    "token_world.stacked": _DEEP,
    "token_world.temperature": _WIDE,
    "token_world.top": _WIDE,
    "token_world.late_reward": 0,
    "token_world.blind_policy": 0,
    "token_world.dream_dropout": 0,
    "agent.kind": 0,
    "agent.horizon": _WIDE,
    "agent.discount": 1,
    "agent.lam": 1,
    "agent.entropy": _WIDE,
    "agent.explore_noise": _WIDE,
    "agent.greedy": 0,
    "agent.critic": 0,
    "agent.target_every": _WIDE,
    "agent.target_rate": 1,
    "agent.bootstrap": 0,
    "agent.slow_weight": _WIDE,
    "agent.normalise": 0,
    "agent.gradient": 0,
    "agent.mbpo": _WIDE,
    "agent.mbpo.hold": _MANY,
    "agent.mbpo.noise_steps": _MANY,
    "agent.mbpo.kept": _MANY,
    "pretrain": _WIDE,
    **{
        f"pretrain.{phase}{name}": _MANY
        for phase in ("", "tokenizer.", "transformer.")
        for name in ("updates", "warmup", "validate_every")
    },
    "finetune": _WIDE,
    "finetune.agent_steps": _MANY,
    "finetune.prefill": _MANY,
    "finetune.initial_updates": _MANY,
    "finetune.hold_lower": _MANY,
    "finetune.hold_actor": _MANY,
    "evaluate.episodes": 1000,
    "evaluate.seed": SEEDS,
    "evaluate.every": _MANY,
    "evaluate.first": _MANY,
    "evaluate.keep_best": 0,
    "evaluate.num_envs": 16,
    "evaluate.videos": 100,
    "evaluate.dreams": 1000,
    "callbacks.codebook": 0,
}
"""Key or section that is taken -> the largest number that it may hold. The longest one counts."""

REFUSED: Mapping[str, str] = {
    "stage": "what is done is the user's choice; a resumed stage is that of the checkpoint",
    "run_dir": "a folder",
    "work_dir": "a folder",
    "init_from": "a file",
    "checkpoint": "a file",
    "resume": "a file",
    "data.root": "a folder",
    "data.cache": "disk of this machine",
    "data.cache_mb": "memory of this machine",
    "data.workers": "processes of this machine",
    "data.limits": "protects this machine",
    "demo": "what is rendered into a folder",
    "vlm.captions": "a file",
    "vlm.model": "what is loaded, or asked for",
    "vlm.revision": "what is loaded",
    "vlm.device": "hardware of this machine",
    "vlm.batch_size": "memory of this machine",
    "vlm.cached_only": "belongs to the label store",
    "vlm.store": "a folder",
    "vlm.reviews": "a file",
    "vlm.server": "addresses, and how they are queried",
    "vlm.embed.encoder": "what is loaded",
    "vlm.embed.revision": "what is loaded",
    "token_world.vgg": "a file",
    "evaluate.rollouts": "a folder",
    "label": "which part of a corpus is labelled",
    "agent.plan": "the cost of every step",
    "env.num_envs": "processes of this machine",
    "env.deaths_per_hour": "processes of this machine",
    "evaluate.decisions": "the cost of an evaluation",
    "callbacks.rollout_every": "what is recorded, and when",
    "callbacks.checkpoint_every": "what is recorded, and when",
    "callbacks.checkpoints": "what is recorded, and when",
    "callbacks.phrases": "what is recorded, and when",
    "callbacks.gallery": "what is recorded, and when",
    "callbacks.quality": "queries to a describer",
    "callbacks.told": "what is recorded, and when",
    "callbacks.progress": "what is shown",
    "play": "where a page is served, and how fast",
    "trainer": "hardware of this machine",
    "launch": "processes and jobs that are started",
    "tracking": "addresses, folders, and what is recorded",
}
"""Key or section that is never taken -> why."""

_MOST_ITEMS, _LONGEST = 1000, 200  # of a list; characters of a text
_MOST_NESTED = 20
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_METHOD = re.compile(r"[A-Za-z0-9][\w.+-]{0,99}")
_PACKAGES = ("wordllama",)  # encoders that are an installed package: nothing is loaded by its name
_NO_CHOICE = "a file that somebody else has made may not choose"


def settings_of(text: str, path: Path) -> dict[str, Any]:
    """Read settings that may come from anybody as plain dicts, lists and leaves.

    Raises:
        CheckpointError: The text is too long, no YAML, nested too deeply, or uses aliases, by which
            a short text becomes a huge tree.
    """
    if len(text) > MAX_SETTINGS:
        raise CheckpointError(f"the settings in '{path}' are refused: {len(text)} characters")
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            begins = isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent)
            depth += begins - isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent)
            if depth > _MOST_NESTED or getattr(event, "anchor", None) is not None:
                raise CheckpointError(f"the settings in '{path}' are refused: nested, or aliases")
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise CheckpointError(
            f"the settings in '{path}' cannot be read: they are no YAML"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"'{path}' does not hold the settings it was made with; give them with config=FILE, "
            "the config.yaml of its run"
        )
    return content


def taken(
    settings: Mapping[str, Any], path: Path, words: Mapping[str, str], videos: bool
) -> dict[str, Any]:
    """Choose what is taken from somebody else's settings.

    Args:
        settings: All of them.
        path: Their checkpoint, for messages.
        words: What the user has typed, key -> value; these keys are left out.
        videos: Whether videos will be read.

    Returns:
        Nested keys.

    Raises:
        CheckpointError: A value is out of bounds or refers to something.
        ConfigError: They name what only the user may choose; says which words to add.
    """
    found: list[tuple[str, Any]] = []
    for key, value in _leaves(settings):
        bound = bound_of(key)
        if bound is None or key in words:
            continue
        fault = _fault(value, bound)
        if key == "method" and not _METHOD.fullmatch(str(value)):
            fault = "is no name"
        if fault:
            raise CheckpointError(
                f"the settings in '{path}' are refused, because you have not made this file and "
                f"'{key}' {fault}: type {key}=VALUE to set it yourself"
            )
        found.append((key, value))
    kept = nested(found)
    if not path.resolve().is_relative_to(_PACKAGE):  # what comes with it needs no such word
        log.info(
            "'%s' was not saved by you on this machine: of its settings, only those of networks, "
            "environment and preprocessing are taken (docs/evaluate.md)",
            path,
        )
    _check_environment(kept, path, words)
    _check_describer(settings, kept, path, words)
    if videos and not {"data", "data.root"} & set(words):
        raise ConfigError(
            f"'{path}' was trained on videos, and {_NO_CHOICE} which folder is read: add "
            "data.root=DIR, the folder of your videos"
        )
    return kept


def bound_of(key: str) -> float | None:
    """Return the largest number that a key may hold; None if it is not taken at all."""
    parts = key.split(".")
    found = (ALLOWED.get(".".join(parts[:end])) for end in range(len(parts), 0, -1))
    return next((bound for bound in found if bound is not None), None)


def describer_is_off(words: Mapping[str, str]) -> bool:
    """Tell whether the user has typed that no describer is queried."""
    return words.get("vlm.kind", words.get("vlm")) == "none"


def _check_environment(kept: dict[str, Any], path: Path, words: Mapping[str, str]) -> None:
    env = kept.get("env", {})
    name = str(env.get("name", ""))
    if env.get("kind") == "gym" and ":" in name and "env" not in words:
        raise ConfigError(
            f"'{path}' was trained in the Gymnasium environment '{name}', and {_NO_CHOICE} which "
            f"package Python imports: if you trust that package, add env.name={name}"
        )


def _check_describer(
    settings: Mapping[str, Any], kept: dict[str, Any], path: Path, words: Mapping[str, str]
) -> None:
    """See that the user has chosen whom frames are shown to, and which models are loaded."""
    model, vlm = kept.get("world_model", {}), kept.setdefault("vlm", {})
    source = model.get("source", {}) if isinstance(model, dict) else {}
    kind = source.get("kind", "semantic") if isinstance(source, dict) else "semantic"
    if describer_is_off(words):
        return
    world = settings.get("token_world")
    if model.get("kind") == "tokens":
        silent = not (isinstance(world, dict) and world.get("phrases"))
    else:
        silent = kind != "semantic" or model.get("lower", {}) is None
    if silent:  # no phrase reaches these networks
        kept["vlm"] = {"kind": "none"}
        return
    chosen = {"vlm", "vlm.kind"} & set(words)
    without = "or vlm=none to act without descriptions"
    if not chosen and vlm.get("kind") == "openai" and "vlm.server.base_url" not in words:
        raise ConfigError(
            f"the agent in '{path}' was trained with descriptions by a vision-language model at a "
            f"server, and {_NO_CHOICE} whom your frames are sent to: add "
            f"vlm.server.base_url=URL vlm.model=NAME to query a server of yours, {without}"
        )
    if not chosen and vlm.get("kind") == "transformers" and "vlm.model" not in words:
        raise ConfigError(
            f"the agent in '{path}' was trained with descriptions by a vision-language model, and "
            f"{_NO_CHOICE} which model is loaded: add vlm.model=NAME, or vlm=qwen2_5_vl_7b for the "
            f"published one, {without}"
        )
    _check_encoder(settings, vlm, path, words, without)


def _check_encoder(
    settings: Mapping[str, Any],
    vlm: dict[str, Any],
    path: Path,
    words: Mapping[str, str],
    without: str,
) -> None:
    section: Any = settings.get("vlm")
    embed: Any = section.get("embed") if isinstance(section, dict) else None
    encoder: Any = embed.get("encoder") if isinstance(embed, dict) else None
    if not encoder or "vlm.embed.encoder" in words:
        return
    if encoder in _PACKAGES:
        vlm.setdefault("embed", {})["encoder"] = encoder
        return
    raise ConfigError(
        f"the phrases for '{path}' were turned into vectors by a sentence encoder, and "
        f"{_NO_CHOICE} which model is loaded: add vlm.embed.encoder=NAME, {without}"
    )


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values; names that are no names of settings are left out."""
    for name, value in tree.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            continue
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _fault(value: Any, bound: float) -> str:
    """Say what is wrong with a value; empty if nothing is."""
    if isinstance(value, list):
        if len(value) > _MOST_ITEMS:
            return f"has {len(value)} entries"
        return next((f for f in (_fault(x, bound) for x in value if x is not value) if f), "")
    if value is None or isinstance(value, bool):
        return ""
    if isinstance(value, str):
        if "${" in value:
            return "refers to something else"
        if len(value) > _LONGEST or not value.isprintable():
            return "is no name"
        try:  # a number in quotes is read as a number
            value = float(value)
        except ValueError:
            return ""
    if not isinstance(value, int | float):
        return "is neither text nor a number"
    if not math.isfinite(value) or abs(value) > bound:
        return f"is {value:.6g}, which is beyond {bound:.6g}"
    return ""
