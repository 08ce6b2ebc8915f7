"""Sizes and behaviour of the networks, against the published numbers (facts 2.1, 3, 4, 7.4)."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from mapo_lightning.models.blocks import frozen, mlp, position_code
from mapo_lightning.models.rssm_world.action_source import EnvAction, InverseAction, SemanticAction
from mapo_lightning.models.rssm_world.context import FrameContext
from mapo_lightning.models.rssm_world.decoder import build_decoder
from mapo_lightning.models.rssm_world.encoder import build_encoder, normalised
from mapo_lightning.models.rssm_world.fused.rssm import FusedRSSM
from mapo_lightning.models.rssm_world.intrinsic import VideoBonus
from mapo_lightning.models.rssm_world.rssm import RSSM, RSSMState
from mapo_lightning.models.rssm_world.settings import (
    BonusConfig,
    ContextConfig,
    ImageConfig,
    RSSMConfig,
    SourceConfig,
)
from mapo_lightning.models.settings import Recompute
from mapo_lightning.types import Batch, ConfigError

PAPER_CNN = ImageConfig(kind="cnn")
NO_CONTEXT, CONTEXT = ContextConfig(kind="none"), ContextConfig(kind="features")


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "published"),
    [
        (lambda: RSSM(RSSMConfig(), 50, 3072), 14_745_600),  # lower, null action of 50
        (lambda: RSSM(RSSMConfig(), 64, 3072), 14_759_936),  # PreLAR's, and MAPO's lower
        (lambda: RSSM(RSSMConfig(action_slot=50), 6, 2048), 13_697_024),  # upper
        (lambda: RSSM(RSSMConfig(action_slot=50), 6, 5120), 16_842_752),  # upper, concat_embed
        (lambda: RSSM(RSSMConfig(deter=200, hidden=200), 6, 1536), 1_247_248),  # DreamerV2
        (lambda: build_encoder(ImageConfig()), 1_562_112),
        (lambda: FrameContext(CONTEXT, ImageConfig()), 1_562_112),
        (lambda: build_decoder(ImageConfig(), 2048, CONTEXT), 7_779_003),
        (lambda: build_decoder(ImageConfig(), 2048, NO_CONTEXT), 7_519_227),
        (lambda: build_encoder(PAPER_CNN), 1_551_312),
        (lambda: build_decoder(PAPER_CNN, 2048, NO_CONTEXT), 11_152_275),
        (lambda: build_decoder(PAPER_CNN, 1224, NO_CONTEXT), 9_886_611),
        (lambda: mlp(2048, 400, 4, 1), 1_301_201),  # reward head and critic
        (lambda: mlp(2048, 400, 4, 12), 1_305_612),  # actor of six dimensions
        (lambda: InverseAction(ImageConfig(), SourceConfig(), 1024), 4_841_360),
        (lambda: EnvAction(4, SourceConfig(), 1024), 70_720),
    ],
)
def test_parameter_counts_are_the_published_ones(module: object, published: int) -> None:
    assert callable(module)
    assert parameters(module()) == published


@pytest.mark.parametrize("kind", ["resnet", "cnn"])
def test_encoder_and_decoder_shapes(kind: str) -> None:
    cfg = ImageConfig(kind=kind, channels=[4, 8, 16], layers=1)  # type: ignore[arg-type]
    encoder, decoder = build_encoder(cfg), build_decoder(cfg, 24, NO_CONTEXT)
    obs = torch.randint(0, 256, (2, 3, 64, 64, 3), dtype=torch.uint8)
    embed = encoder(normalised(obs))
    assert embed.shape == (6, encoder.embed_dim)
    assert decoder(torch.randn(6, 24), {}).shape == (6, 3, 64, 64)


def test_normalised_frames_are_channels_last_views_in_half_range() -> None:
    obs = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1, 1).expand(2, 1, 64, 64, 3)
    frame = normalised(obs)
    assert frame[0].unique().item() == -0.5
    assert frame[1].unique().item() == 0.5


def test_decoder_keeps_the_pairing_of_clips_and_frames() -> None:
    """Frame n must be drawn with the scene of clip n // T, whatever the order of the batch."""
    torch.manual_seed(0)
    image = ImageConfig(channels=[4, 8, 16], layers=1)
    cfg = ContextConfig(kind="features", key_mask=0.0, dropout=0.0, heads=1)
    decoder = build_decoder(image, 24, cfg).eval()
    feat = torch.randn(6, 24)
    scene = {16: torch.randn(2, 8, 16, 16), 8: torch.randn(2, 16, 8, 8)}
    both = decoder(feat, scene)
    second = decoder(feat[3:], {side: x[1:] for side, x in scene.items()})
    torch.testing.assert_close(both[3:], second, rtol=1e-4, atol=1e-5)


def test_key_mask_leaves_a_quarter_of_the_tokens() -> None:
    image = ImageConfig(channels=[4, 8, 16], layers=1)
    decoder = build_decoder(image, 24, ContextConfig(kind="features", heads=1))
    assert isinstance(decoder.attention, nn.ModuleDict)
    assert {k: int(m.kept) for k, m in decoder.attention.items()} == {"8": 16, "16": 64}


@pytest.fixture(params=[RSSM, FusedRSSM], ids=["plain", "fused"])
def rssm(request: pytest.FixtureRequest) -> RSSM:
    return tiny_rssm(request.param)


def tiny_rssm(kind: type[RSSM] = FusedRSSM, action: int = 3, embed: int = 8) -> RSSM:
    torch.manual_seed(0)
    return kind(RSSMConfig(deter=6, hidden=7, stoch=4, classes=5), action, embed)


def reference_observe(
    rssm: RSSM, action: Tensor, embed: Tensor, first: Tensor, noise: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Facts 2.2, step by step, with nothing hoisted."""
    state = rssm.initial(len(action), embed)
    posts, priors = [], []
    for t in range(action.shape[1]):
        keep = (~first[:, t]).float()[:, None]
        z = state.stoch.flatten(1) * keep
        h = state.deter * keep
        x = nn.functional.elu(rssm.inp(torch.cat([z, action[:, t] * keep], 1)))
        p = rssm.cell.norm(rssm.cell.linear(torch.cat([x, h], 1)))
        reset, cand, update = p.chunk(3, 1)
        c = torch.tanh(torch.sigmoid(reset) * cand)
        u = torch.sigmoid(update - 1)
        h = u * c + (1 - u) * h
        priors.append(rssm.prior(h).view(-1, 4, 5))
        logits = rssm.posterior(torch.cat([h, embed[:, t]], 1)).view(-1, 4, 5)
        cdf = logits.softmax(-1).cumsum(-1)
        index = (cdf <= noise[:, t, :, None]).sum(-1).clamp(max=4)
        stoch = nn.functional.one_hot(index, 5).float()
        posts.append(logits)
        state = RSSMState.of(h, stoch, logits)
    return posts, priors


def test_scan_equals_the_step_by_step_recurrence(rssm: RSSM) -> None:
    action, embed, noise = torch.randn(2, 6, 3), torch.randn(2, 6, 8), torch.rand(2, 6, 4)
    first = torch.zeros(2, 6, dtype=torch.bool)
    first[:, 0] = True
    first[1, 3] = True
    post, prior = rssm.observe(action, embed, first, noise_BTS=noise)
    posts, priors = reference_observe(rssm, action, embed, first, noise)
    torch.testing.assert_close(post.logits, torch.stack(posts, 1))
    torch.testing.assert_close(prior, torch.stack(priors, 1))


def test_the_first_frame_forgets_state_and_action(rssm: RSSM) -> None:
    embed, noise = torch.randn(2, 1, 8), torch.rand(2, 1, 4)
    past = RSSMState.of(torch.randn(2, 6), torch.rand(2, 4, 5), torch.randn(2, 4, 5))
    first = torch.tensor([[True], [False]])
    post, _ = rssm.observe(torch.randn(2, 1, 3), embed, first, past, noise)
    fresh, _ = rssm.observe(torch.zeros(2, 1, 3), embed, first, None, noise)
    torch.testing.assert_close(post.logits[0], fresh.logits[0])
    assert not torch.allclose(post.logits[1], fresh.logits[1])


def test_steps_in_two_pieces_equal_one_sequence(rssm: RSSM) -> None:
    action, embed, noise = torch.randn(2, 6, 3), torch.randn(2, 6, 8), torch.rand(2, 6, 4)
    first = torch.zeros(2, 6, dtype=torch.bool)
    whole, _ = rssm.observe(action, embed, first, noise_BTS=noise)
    head, _ = rssm.observe(action[:, :4], embed[:, :4], first[:, :4], noise_BTS=noise[:, :4])
    middle = RSSMState(*(x[:, -1] for x in head))
    tail, _ = rssm.observe(action[:, 4:], embed[:, 4:], first[:, 4:], middle, noise[:, 4:])
    torch.testing.assert_close(whole.deter[:, 4:], tail.deter)


def test_short_actions_equal_actions_padded_with_zeros() -> None:
    torch.manual_seed(0)
    rssm = RSSM(RSSMConfig(deter=6, hidden=7, stoch=4, classes=5, action_slot=10), 3, 8)
    state, noise, action = rssm.initial(2, torch.zeros(1)), torch.rand(2, 4), torch.randn(2, 3)
    padded = torch.cat([action, torch.zeros(2, 7)], 1)
    short = rssm.imagine_step(state, action, noise)
    torch.testing.assert_close(short.deter, rssm.imagine_step(state, padded, noise).deter)


def test_an_action_wider_than_its_slot_is_refused() -> None:
    with pytest.raises(ConfigError, match="12 numbers but action_slot leaves room for 10"):
        RSSM(RSSMConfig(action_slot=10), 12, 8)


def semantic_batch(known: bool) -> Batch:
    return {
        "semantic": torch.randn(2, 3, 10),
        "has_semantic": torch.full((2, 3), known),
        "position": torch.arange(3).expand(2, 3),
        "is_first": torch.zeros(2, 3, dtype=torch.bool),
    }


def test_null_phrases_are_zero_plus_the_position_code() -> None:
    source = SemanticAction(10, SourceConfig(width=8))
    action = source(semantic_batch(known=False)).action
    torch.testing.assert_close(action, position_code(torch.arange(3), 8).expand(2, 3, 8))
    assert not torch.allclose(source(semantic_batch(known=True)).action, action)


def test_position_code_is_the_sine_cosine_table() -> None:
    code = position_code(torch.tensor([0, 3]), 4)
    angles = torch.tensor([3.0, 3.0 / 100.0])
    expected = torch.stack([angles.sin(), angles.cos()], 1).flatten()
    torch.testing.assert_close(code[0], torch.tensor([0.0, 1.0, 0.0, 1.0]))
    torch.testing.assert_close(code[1], expected)


def test_frozen_lets_gradients_through_but_not_in() -> None:
    layer, x = nn.Linear(3, 1), torch.randn(2, 3, requires_grad=True)
    with frozen(layer):
        out = layer(x).sum()
    out.backward()
    assert layer.weight.grad is None
    assert x.grad is not None
    assert layer.weight.requires_grad


@pytest.mark.parametrize("neighbours", [3, 8])
def test_bonus_is_the_mean_distance_to_the_nearest_in_the_queue(neighbours: int) -> None:
    """Facts 4.1 written out: window mean, projection, push first, k nearest, running scale.

    The first batch brings six vectors: of eight neighbours six are there, then eight.
    """
    torch.manual_seed(0)
    cfg = BonusConfig(beta=1.0, window=2, width=4, queue=12, neighbours=neighbours, momentum=0.9)
    bonus = VideoBonus(cfg, feat=5)
    queue: list[Tensor] = []
    scale = 1.0
    for _ in range(3):
        feat = torch.randn(2, 4, 5)
        got = bonus(feat)
        window = (feat[:, :-1] + feat[:, 1:]) / 2
        query = (window @ bonus.projection).reshape(-1, 4)
        queue = (list(query) + queue)[:12]
        distance = torch.stack(
            [
                torch.stack([(q - k).norm() for k in queue]).sort().values[:neighbours].mean()
                for q in query
            ]
        )
        scale = 0.9 * scale + 0.1 * float(distance.abs().mean())
        torch.testing.assert_close(got.flatten(), distance / (scale + 1e-8))


def test_bonus_keeps_its_digits_where_states_hardly_move() -> None:
    """By matrix product the distances of these states would be 20 % off."""
    torch.manual_seed(0)
    bonus = VideoBonus(BonusConfig(beta=1.0, queue=64, neighbours=4, momentum=0.0), feat=32)
    feat = 3.0 + 1e-3 * torch.randn(2, 20, 32)
    window = feat.double().unfold(1, 5, 1).mean(dim=-1)
    query = (window @ bonus.projection.double()).flatten(0, 1)
    nearest = (query[:, None] - query[None]).norm(dim=-1).sort(dim=1).values[:, :4].mean(dim=1)
    expected = (nearest / nearest.mean()).view(2, 16).float()
    torch.testing.assert_close(bonus(feat), expected, rtol=2e-3, atol=2e-3)


def test_bonus_refuses_chunks_shorter_than_its_window() -> None:
    with pytest.raises(ValueError, match="the chunk has 3"):
        VideoBonus(BonusConfig(beta=1.0), feat=5)(torch.randn(2, 3, 5))


def test_recomputing_keeps_less_and_changes_nothing() -> None:
    results = []
    for recompute in get_args(Recompute):
        torch.manual_seed(0)
        image = ImageConfig(channels=[4, 8, 16], layers=2, recompute=recompute)
        encoder, decoder = build_encoder(image), build_decoder(image, 24, CONTEXT)
        bridge = nn.Linear(encoder.embed_dim, 24)
        frame, kept = torch.randn(3, 3, 64, 64), [0]

        def pack(x: Tensor, kept: list[int] = kept) -> Tensor:
            kept[0] += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            assert hasattr(encoder, "maps")
            out = decoder(bridge(encoder(frame)), encoder.maps(frame))
        (out * torch.randn_like(out)).sum().backward()
        parts = (encoder, decoder)
        grads = [p.grad for part in parts for p in part.parameters()]
        results.append((out, grads, [b for part in parts for b in part.buffers()], kept[0]))
    (*same, everything), *others = results
    for *found, kept in others:
        torch.testing.assert_close(found, same, rtol=0.0, atol=0.0)
        assert kept < 0.7 * everything
