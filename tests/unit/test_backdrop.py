"""The plain CNN's scene: a picture drawn of one frame and added to all frames of its clip."""

from __future__ import annotations

import pytest
import torch
from networks import image
from test_methods import configured, synthetic
from torch import Tensor

from mapo_lightning.models.rssm_world.context import Backdrop, FrameContext
from mapo_lightning.models.rssm_world.decoder import CNNDecoder
from mapo_lightning.models.rssm_world.encoder import normalised
from mapo_lightning.models.rssm_world.settings import ContextConfig, ImageConfig, QuantizerConfig
from mapo_lightning.run.build import build_finetune, build_pretrain

IMAGE = ImageConfig(kind="cnn", size=32, channels=[4])
KINDS = {
    "features": ContextConfig(kind="features"),
    "spatial": ContextConfig(kind="quantized", quantizer=QuantizerConfig(codes=16)),
    "global": ContextConfig(kind="quantized", quantizer=QuantizerConfig(codes=16, shape="global")),
}


def frames(clips: int = 3, steps: int = 5, side: int = 32) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 256, (clips, steps, side, side, 3), dtype=torch.uint8)


def context_of(kind: str, frame: str = "random", cfg: ImageConfig = IMAGE) -> FrameContext:
    torch.manual_seed(0)
    chosen = KINDS[kind]
    return FrameContext(
        ContextConfig(kind=chosen.kind, frame=frame, quantizer=chosen.quantizer),  # type: ignore[arg-type]
        cfg,
    )


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_has_one_backdrop_of_its_frames_size(kind: str, size: int) -> None:
    cfg = ImageConfig(kind="cnn", size=size, channels=[4])
    found = context_of(kind, cfg=cfg)(frames(side=size))
    assert {side: tuple(x.shape) for side, x in found.maps.items()} == {size: (3, 3, size, size)}
    codes = {"features": {}, "spatial": {8: 64}, "global": {8: 1}}[kind]
    assert {side: x.shape[1] for side, x in found.codes.items()} == codes
    assert set(found.terms) == (set() if kind == "features" else {"commitment"})


@pytest.mark.parametrize(("frame", "index"), [("first", 0), ("last", 4)])
def test_it_is_drawn_of_the_frame_that_the_settings_name(frame: str, index: int) -> None:
    context, obs = context_of("features", frame).eval(), frames()
    encoder = context.encoder
    assert isinstance(encoder, Backdrop)
    expected = encoder.draw(encoder.maps(normalised(obs[:, index])))
    torch.testing.assert_close(context(obs).maps, expected)


@pytest.mark.parametrize("kind", ["spatial", "global"])
def test_a_codebook_draws_it_of_nothing_but_codes(kind: str) -> None:
    context, obs = context_of(kind, "first"), frames()
    context(obs)  # the codebook takes its first codes from a batch
    found = context.eval()(obs)
    encoder, chosen = context.encoder, found.codes[8]
    assert isinstance(encoder, Backdrop)
    if kind == "spatial":
        coded = context.quantizers["8"].codes[chosen].view(3, 8, 8, -1).permute(0, 3, 1, 2)
    else:
        code = context.quantizers["frame"].codes[chosen[:, 0]]
        coded = code[:, :, None, None].expand(-1, -1, 8, 8)
    torch.testing.assert_close(found.maps, encoder.draw({8: coded}))
    assert len(chosen.unique()) > 1


def test_it_is_added_to_every_frame_of_its_clip_and_to_no_other() -> None:
    torch.manual_seed(0)
    decoder, feat = CNNDecoder(IMAGE, 24), torch.randn(6, 24)
    backdrop = torch.randn(2, 3, 32, 32)
    added = decoder(feat, {32: backdrop}) - decoder(feat, {})
    for clip in range(2):
        for number in range(3 * clip, 3 * clip + 3):
            torch.testing.assert_close(added[number], backdrop[clip], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_each_frame_of_a_joined_chunk_gets_that_of_its_own_episode(kind: str) -> None:
    context, obs = context_of(kind, "first").eval(), frames(2, 5)
    episode = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    decoder, feat = CNNDecoder(IMAGE, 24), torch.randn(10, 24)
    added = (decoder(feat, context(obs, episode).maps) - decoder(feat, {})).view(2, 5, 3, 32, 32)
    for row, first, end in ((0, 0, 2), (0, 2, 5), (1, 0, 5)):
        (alone,) = context(obs[row : row + 1, first:end]).maps.values()
        for t in range(first, end):
            torch.testing.assert_close(added[row, t], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_teaches_all_that_drew_it(kind: str) -> None:
    context = context_of(kind)
    (backdrop,) = context(frames()).maps.values()
    (backdrop * torch.randn_like(backdrop)).sum().backward()
    silent = [n for n, p in context.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_without_context_frames_are_drawn_of_the_state_alone() -> None:
    words = ["world_model.context.kind=none", "pretrain.objective.scales={image: 1, kl_lower: 1}"]
    cfg = configured("method=mapo_no_cvq", image("tiny"), *words)
    world = build_pretrain(cfg).world_model
    assert "context" not in world.parts()
    batch = synthetic(cfg, 2)
    torch.manual_seed(2)
    drawn = world.open_loop(batch, 3)
    torch.manual_seed(2)
    feat = world.observe({key: value[:, :3] for key, value in batch.items()}).feat
    alone = (world.decoder(feat.flatten(0, 1), {}) + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(drawn[:, :3].flatten(0, 1), alone)


@pytest.mark.slow
@pytest.mark.parametrize("frame", ["random", "last"])
@pytest.mark.parametrize("networks", ["published", "tiny"])
def test_a_dream_is_drawn_in_a_scene_that_was_shown(networks: str, frame: str) -> None:
    cfg = configured(
        "method=mapo", "env=toy", image(networks), f"world_model.context.frame={frame}"
    )
    torch.manual_seed(0)
    world = build_finetune(cfg, 2, None)[0].world_model
    batch = synthetic(cfg, 2)
    other = batch | {"obs": batch["obs"].clone()}
    other["obs"][:, 3:] = 255 - other["obs"][:, 3:]
    dreams = []
    for one in (batch, other):
        torch.manual_seed(2)
        dreams.append(world.open_loop(one, seen=3))
    assert torch.equal(*dreams)
    other["obs"][:, :3] = 255 - other["obs"][:, :3]
    torch.manual_seed(2)
    assert not torch.equal(world.open_loop(other, seen=3), dreams[0])
