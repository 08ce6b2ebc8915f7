"""Opens a page on which a model's dream is played with: ``mapo-play``.

Usage: mapo-play [checkpoint=runs/NAME/finetune/last.ckpt] [checkpoint=ANOTHER] [words]

Prints an address of this machine; open it in a browser. An agent's model dreams beside the
simulator: keys drive both, or the agent does. A pre-trained model dreams beside held-out clips, led
by the phrase that you type. Without checkpoint=, a small agent of the toy is played that comes with
the package. Two checkpoints dream side by side, led by the same. Pause, step, go back, choose the
start, and record a film. The settings are those of the checkpoint; further words, as of
``mapo-train``, change them, for example ``play.fps=30`` or ``data.root=DIR`` for other videos.
Recordings go into ``run_dir`` (``runs/play`` if none is given). Ctrl-C ends it.
"""

from __future__ import annotations

import secrets
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mapo_lightning.config.command_line import small_program
from mapo_lightning.config.compose import compose
from mapo_lightning.run.config import RunConfig, conf_folder
from mapo_lightning.run.from_checkpoint import agent_settings
from mapo_lightning.run.renamed import RENAMED
from mapo_lightning.types import ConfigError

if TYPE_CHECKING:
    import torch

    from mapo_lightning.models.interfaces import Stepwise
    from mapo_lightning.playing.scene import Scene
    from mapo_lightning.training.datamodule import VideoDataModule

SHIPPED = Path(__file__).resolve().parents[1] / "playing" / "shipped"
"""An export of a small agent of the toy; ``make shipped`` makes it."""
_MOST = 2  # models that are compared
_SUGGESTED = 12  # values of a slot that the page suggests
_LABELS = 48  # labels of held-out videos that they are taken from


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page until Ctrl-C; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    return small_program(words or [f"checkpoint={SHIPPED}"], __doc__ or "", _run)


def _run(words: Sequence[str]) -> None:
    paths = [Path(w.partition("=")[2]) for w in words if w.startswith("checkpoint=")]
    others = [word for word in words if not word.startswith("checkpoint=")]
    paths = paths or [SHIPPED]
    if len(paths) > _MOST:
        raise ConfigError(
            f"mapo-play compares two checkpoints at most, got {len(paths)}: leave out the others"
        )
    videos = _stage(paths) == "pretrain"
    composed = [
        compose(others, RunConfig, conf_folder(), agent_settings(path, others, videos), RENAMED)
        for path in paths
    ]
    if composed[0].text is not None:
        sys.stdout.write(composed[0].text + "\n")
        return
    _play([each.config for each in composed], paths, others, videos)


def _play(cfgs: list[RunConfig], paths: list[Path], words: list[str], videos: bool) -> None:
    try:
        from mapo_lightning.playing.app import PlayServer, listen, serve
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the page needs the package '{error.name}', which is not installed: type "
            "pip install 'mapo-lightning[play]'"
        ) from error
    import torch

    from mapo_lightning.playing.session import Session

    cfg = cfgs[0]
    # One row of a small model: more threads cost more than they give.
    torch.set_num_threads(cfg.trainer.threads or 1)
    made = filmed(cfgs, paths) if videos else simulated(cfgs, paths, words)
    folder = Path(cfg.run_dir or "runs/play")
    listening = listen(cfg.play.port)
    server = PlayServer(
        lambda: Session(made(), cfg.play, folder),
        secrets.token_urlsafe(24),
        listening.getsockname()[1],
    )
    sys.stdout.write(f"Open {server.address}\nand stop with Ctrl-C.\n")
    sys.stdout.flush()
    serve(server, listening)


def simulated(
    cfgs: Sequence[RunConfig], paths: Sequence[Path], words: Sequence[str]
) -> Callable[[], Scene]:
    """What makes the scene of agents and their simulator.

    Raises:
        CheckpointError: A file does not fit its settings.
        ConfigError: The agents are of several tasks.
    """
    from mapo_lightning.envs.factory import make_env
    from mapo_lightning.playing.simulated import SimulatedScene, stepwise
    from mapo_lightning.run.agent import load_agent
    from mapo_lightning.run.build import labelled_env

    tasks = [(cfg.env.kind, cfg.env.name, cfg.env.size, cfg.env.action_repeat) for cfg in cfgs]
    if len(set(tasks)) > 1:
        shown = " and ".join(f"{kind}/{name} at {size} pixels" for kind, name, size, _ in tasks)
        raise ConfigError(
            f"these agents were trained on {shown}: only models of one task are compared"
        )
    agents = [load_agent(path, _device(cfgs[0]), words=words) for path in paths]
    for agent in agents:
        stepwise(agent.world_model)
    # The describer of the first agent may want larger frames than the networks.
    first = next((agent.cfg for agent in agents if agent.cfg.vlm.kind != "none"), agents[0].cfg)
    env = first.env if first.vlm.kind == "none" else labelled_env(first)
    names = _names(cfgs, paths)
    play, downwards = cfgs[0].play, first.env.kind == "toy"
    return lambda: SimulatedScene(
        names, agents, lambda: make_env(env, play.start), play.watch, downwards
    )


def filmed(cfgs: Sequence[RunConfig], paths: Sequence[Path]) -> Callable[[], Scene]:
    """What makes the scene of pre-trained models and held-out clips.

    Raises:
        CheckpointError: A file does not fit its settings.
        ConfigError: The models are led by vectors of several widths.
    """
    from mapo_lightning.playing.filmed import FilmedScene
    from mapo_lightning.run import build
    from mapo_lightning.run.stages import render_demo
    from mapo_lightning.semantics.factory import log_servers, semantic_dim
    from mapo_lightning.semantics.text_encoder import build_encoder

    cfg = cfgs[0]
    widths = {(each.data.image_size, semantic_dim(each.vlm)) for each in cfgs}
    if len(widths) > 1:
        raise ConfigError(
            "these models differ in the size of frames or in how phrases become vectors, so the "
            "same clips and phrases cannot lead both: compare models of the same vlm.embed and size"
        )
    log_servers(cfg.vlm)
    render_demo(cfg)
    device = _device(cfg)
    worlds = [_pretrained(each, path, device) for each, path in zip(cfgs, paths, strict=True)]
    data = build.build_videos(cfg)
    found = data.held_out_batch(cfg.play.clips)
    batch = {key: value.to(device) for key, value in found.items() if value.ndim > 1}
    told = worlds[0].driver == "phrase"
    suggestions = _suggestions(data) if told else {}
    names, encoder = _names(cfgs, paths), build_encoder(cfg.vlm)
    return lambda: FilmedScene(names, worlds, batch, encoder, cfg.play.watch, suggestions)


def _pretrained(cfg: RunConfig, path: Path, device: torch.device) -> Stepwise:
    from mapo_lightning.playing.simulated import stepwise
    from mapo_lightning.run import build

    module = build.load_pretraining(cfg, path)
    return stepwise(module.to(device).eval().world_model)


def _suggestions(data: VideoDataModule) -> dict[str, list[str]]:
    """Slot -> its most frequent values in the labels of held-out videos."""
    from mapo_lightning.semantics.phrase import SLOTS

    examples = data.clips("holdout").label_examples(_LABELS)
    phrases = [example.phrase for example in examples if example.phrase is not None]
    found = {}
    for slot, values in zip(SLOTS, zip(*phrases, strict=True), strict=True) if phrases else ():
        counts = Counter(value for value in values if value)
        found[slot] = [value for value, _ in counts.most_common(_SUGGESTED)]
    return found


def _names(cfgs: Sequence[RunConfig], paths: Sequence[Path]) -> list[str]:
    """What to call the models: methods, and folders where these are the same."""
    methods = [cfg.method for cfg in cfgs]
    if len(set(methods)) == len(methods):
        return methods
    return [
        f"{method} {path.absolute().parent.parent.name}"
        for method, path in zip(methods, paths, strict=True)
    ]


def _device(cfg: RunConfig) -> torch.device:
    from mapo_lightning.run.trainer import best_device

    return best_device(cfg.trainer.accelerator)


def _stage(paths: Sequence[Path]) -> str:
    """The stage that all checkpoints are of.

    Raises:
        CheckpointError: A file is no checkpoint.
        ConfigError: They are of several, or of a tokenizer alone.
    """
    from mapo_lightning.training.checkpoint import read_checkpoint

    stages = [str(read_checkpoint(path, mapped=True)["mapo"].get("stage")) for path in paths]
    if "tokenizer" in stages:
        raise ConfigError(
            f"'{paths[stages.index('tokenizer')]}' holds a tokenizer alone, which draws and does "
            "not dream: give the checkpoint of the phase after it, in pretrain/"
        )
    if len(set(stages)) > 1:
        raise ConfigError(
            f"these checkpoints are of {' and '.join(stages)}: only those of one stage are led by "
            "the same, so give two pre-trained or two fine-tuned ones"
        )
    return stages[0]
