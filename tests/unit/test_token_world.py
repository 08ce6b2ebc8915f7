"""The token world model against published counts and golden numbers (facts 7.5, 7.6)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from mapo_lightning.models.token_world.frame_predictor import FramePredictor
from mapo_lightning.models.token_world.layout import Layout
from mapo_lightning.models.token_world.published import load_published, published_names
from mapo_lightning.models.token_world.settings import TokenizerConfig, TransformerConfig
from mapo_lightning.models.token_world.tokenizer import Tokenizer
from mapo_lightning.models.token_world.transformer import Cache, TokenTransformer
from mapo_lightning.types import CheckpointError

NARROW = TokenizerConfig(
    channels=[16, 32, 64], blocks=1, groups=8, latent=16, context_codes=64, future_codes=64
)


def wave(shape: tuple[int, ...], scale: float, base: float = 0.0) -> Tensor:
    """The fill rule of the golden numbers: every parameter by its shape alone."""
    number = math.prod(shape)
    i = torch.arange(number, dtype=torch.float64)
    filled = base + scale * torch.sin(0.37 * i + 0.11 * len(shape) + 0.001 * number)
    return filled.view(shape)


def fill(model: nn.Module) -> None:
    """Fill all parameters of a model, fused projections as three."""
    for owner in model.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            shape = tuple(parameter.shape)
            if isinstance(owner, nn.GroupNorm | nn.RMSNorm) and name == "weight":
                value = wave(shape, 0.1, 1.0)
            elif "bias" in name:
                value = wave(shape, 0.02)
                if name == "in_proj_bias":
                    value = wave((shape[0] // 3,), 0.02).repeat(3)
            elif "position" in name:
                value = wave(shape, 0.1)
            elif name == "codes" or isinstance(owner, nn.Embedding):
                value = wave(shape, 1.0)
            elif name == "in_proj_weight":
                part = (shape[0] // 3, shape[1])
                value = wave(part, shape[1] ** -0.5).repeat(3, 1)
            else:
                value = wave(shape, math.prod(shape[1:]) ** -0.5)
            parameter.data.copy_(value)


def count(*parts: nn.Module) -> int:
    return sum(p.numel() for part in parts for p in part.parameters())


def test_published_sizes() -> None:
    with torch.device("meta"):
        model = Tokenizer(TokenizerConfig())
        base = TokenTransformer(TransformerConfig(), 16_386)
        medium = TokenTransformer(TransformerConfig(24, 1024, 16, 4096), 16_386)
        control = FramePredictor(TransformerConfig(), TokenizerConfig(), 4)
    assert count(model.context_encoder) == 21_566_912
    assert count(model.future_encoder) == 24_525_248
    assert count(model.future_encoder.mid) == 10_494_976
    assert [count(c) for c in model.future_encoder.cross.values()] == [460_800, 1_445_888]
    assert count(model.context_decoder) == 32_190_211
    assert count(model.future_decoder) == 34_687_747
    assert model.future_decoder.cross is not None
    assert count(model.future_decoder.cross) == 1_445_888
    assert count(model.before_codes) == count(model.after_codes) == 4_160
    assert (count(model.patch_in), count(model.patch_out)) == (65_600, 66_560)
    assert count(model) == 114_159_174
    assert (count(base), count(medium)) == (138_434_304, 436_261_888)
    assert count(control) - count(base) == 3_840 + 769


@pytest.fixture(scope="module")
def narrow() -> Tokenizer:
    model = Tokenizer(NARROW).double().eval()
    fill(model)
    return model


@pytest.fixture(scope="module")
def frames() -> Tensor:
    i = torch.arange(4 * 3 * 64 * 64, dtype=torch.float64)
    return (0.5 + 0.5 * torch.sin(0.013 * i)).view(1, 4, 3, 64, 64)


def about(x: Tensor) -> list[float]:
    return [float(x.mean()), float(x.std()), *x.reshape(-1)[:3].tolist()]


def near(*numbers: float) -> object:
    return pytest.approx(list(numbers), rel=1e-9, abs=1e-12)


@pytest.mark.slow
@torch.no_grad()
def test_golden_numbers_of_the_tokenizer(narrow: Tokenizer, frames: Tensor) -> None:
    assert count(narrow) == 1_525_238
    latent, _ = narrow.context_encoder(frames[0, :2])
    assert about(latent) == near(
        0.000142024251643722, 0.0398120431920, 0.009098587115310, 0.024358914825451,
        0.021260983157616,
    )  # fmt: skip
    view = narrow.view(frames[:, :2])
    assert about(narrow.encode(frames[:, 2:], view)) == near(
        0.005138678714168, 0.069539452036835, 0.111672340544023, 0.157037832741821,
        0.158680430757574,
    )  # fmt: skip
    found = narrow(frames)
    assert about(found.future) == near(
        -0.086559648907895, 2.193633299537166, 0.631634999830833, 0.884010205770227,
        0.829754482860841,
    )  # fmt: skip
    assert about(found.context) == near(
        -0.031160728062972, 1.955645888366145, -0.573993483784733, -0.951059585291125,
        -1.113401285168470,
    )  # fmt: skip
    assert float(found.context_loss) == pytest.approx(0.827618807230768, rel=1e-9)
    assert float(found.future_loss) == pytest.approx(0.790245971829703, rel=1e-9)
    l1 = nn.functional.l1_loss
    assert float(l1(found.future, frames[:, 2:])) == pytest.approx(1.696567452250775, rel=1e-9)
    assert float(l1(found.context, frames[:, :2])) == pytest.approx(1.416594908670770, rel=1e-9)
    tokens = found.tokens[0].tolist()
    assert (len(tokens), sum(tokens)) == (547, 18_899)
    assert tokens[:6] == [16, 50, 50, 33, 16, 16]
    assert tokens[513:530] == [
        129, 114, 114, 96, 71, 96, 95, 112, 106, 123, 104, 104, 87, 105, 113, 96, 97,
    ]  # fmt: skip


@pytest.mark.slow
@torch.no_grad()
def test_tokens_hold_the_clip(narrow: Tokenizer, frames: Tensor) -> None:
    whole = narrow(frames)
    tokens, view = narrow.tokenize(frames)
    assert torch.equal(tokens, whole.tokens)
    context, future = narrow.layout.split(tokens)
    torch.testing.assert_close(narrow.detokenize(future, view), whole.future, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        narrow.detokenize(future, narrow.context_view(context)), whole.future, rtol=0, atol=1e-12
    )
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < narrow.layout.vocabulary


SMALL = TransformerConfig(layers=2, width=64, heads=4, mlp=256)


@pytest.fixture(scope="module")
def predictor() -> FramePredictor:
    model = FramePredictor(SMALL, NARROW, 4).double().eval()
    fill(model)
    model.transformer.embedding.weight.data *= 0.1
    return model


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    t = 37 * torch.arange(544) % 64
    context, future = t[:512].view(1, 2, 256), t[512:].view(1, 2, 16)
    return Layout.of(NARROW).join(context, future)


@torch.no_grad()
def test_golden_numbers_of_the_transformer(predictor: FramePredictor, tokens: Tensor) -> None:
    assert count(predictor) == 148_417
    taken = torch.sin(0.7 * torch.arange(16, dtype=torch.float64)).view(1, 4, 4)
    found = predictor(tokens, taken[:, 1:3])  # in the last context frame and the one after it
    assert float(found.loss) == pytest.approx(5.635586321266, abs=1e-9)
    assert found.reward[0].tolist() == near(-1.045429049752, 0.966257803620)
    assert float(found.logits.std()) == pytest.approx(0.859593186331918, abs=1e-6)
    assert found.logits[0, -1, :3].tolist() == pytest.approx(
        [-1.266990417954665, 0.356099501353711, 1.350873976172390], abs=1e-6
    )
    assert float(predictor(tokens).loss) == pytest.approx(5.629493713378906, abs=1e-6)


def in_use(cache: Cache) -> Tensor:
    return cache.storage[:, :, :, :, : cache.length]


@torch.no_grad()
def test_a_changed_token_changes_no_logit_before_it(
    predictor: FramePredictor, tokens: Tensor
) -> None:
    changed = tokens.clone()
    changed[0, 300] += 1
    first, second = (predictor.transformer(x) for x in (tokens, changed))
    assert torch.equal(first[:, :300], second[:, :300])
    assert not torch.equal(first[:, 300], second[:, 300])


@torch.no_grad()
def test_a_cache_gives_what_the_whole_sequence_gives(
    predictor: FramePredictor, tokens: Tensor
) -> None:
    model = predictor.transformer
    whole, _ = model.hidden(model.embed(tokens))
    cache: Cache | None = model.empty_cache(1)
    parts = []
    for part in tokens.split([1, 200, 1, 312, 1, 1, 31], dim=1):
        hidden, cache = model.hidden(model.embed(part), cache)
        parts.append(hidden)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)
    assert cache is not None
    kept = in_use(cache).clone()
    other = cache.repeat(2).cropped(400)
    hidden, again = model.hidden(model.embed(tokens[:, 400:]).repeat(2, 1, 1), other)
    torch.testing.assert_close(hidden, whole[:, 400:].repeat(2, 1, 1), rtol=0, atol=1e-12)
    assert again is not None
    assert again.length == tokens.shape[1]
    assert torch.equal(in_use(cache), kept)  # a repeated cache goes its own way
    with pytest.raises(ValueError, match="only 400 tokens are there, 401"):
        other.cropped(401)


@torch.no_grad()
def test_generation_follows_the_likeliest_tokens(predictor: FramePredictor, tokens: Tensor) -> None:
    layout = predictor.layout
    context, _ = layout.split(tokens)
    action = torch.sin(0.7 * torch.arange(16, dtype=torch.float64)).view(1, 4, 4)[:, 1:3]
    reading = predictor.start(context)
    assert reading.cache.length == layout.first_mark
    made, rewards = [tokens[:, : layout.first_mark]], []
    for step in (0, 1):
        frame, reward, reading = predictor.next_frame(reading, action[:, step], temperature=0.0)
        made += [torch.full((1, 1), layout.future_follows), frame]
        rewards.append(reward)
    sequence = torch.cat(made, 1)
    assert reading.cache.length == sequence.shape[1]
    found = predictor(sequence, action)
    assert found.reward is not None
    torch.testing.assert_close(torch.stack(rewards, 1), found.reward, rtol=0, atol=1e-12)  # type: ignore[arg-type]
    likeliest = found.logits.argmax(-1)
    for begin in (layout.first_mark, layout.first_mark + layout.future_tokens + 1):
        drawn = slice(begin + 1, begin + 1 + layout.future_tokens)
        assert torch.equal(sequence[:, drawn], likeliest[:, begin : begin + layout.future_tokens])
    assert layout.codes(torch.tensor([3, 64, 127, 129])).tolist() == [0, 0, 63, 63]


def test_draws_come_from_the_likeliest_only(predictor: FramePredictor, tokens: Tensor) -> None:
    torch.manual_seed(0)
    context, _ = predictor.layout.split(tokens)
    reading = predictor.start(context).repeat(40)
    best = predictor.next_frame(predictor.start(context), None, temperature=0.0)[0][0, 0]
    drawn = predictor.next_frame(reading, None, top=1)[0][:, 0]
    assert (drawn == best).all()
    assert len(set(predictor.next_frame(reading, None)[0][:, 0].tolist())) > 5


@torch.no_grad()
def test_ten_dreamed_frames_cost_the_arithmetic_of_one_pass() -> None:
    """No frame before is read again; the published code reads the whole prefix for every frame."""
    tokenizer = TokenizerConfig(
        size=32, channels=[16, 32, 64], groups=8, context_codes=64, future_codes=64
    )
    model = FramePredictor(SMALL, tokenizer, 2).eval()
    action, context = torch.rand(1, 10, 2), torch.zeros(1, 2, 64, dtype=torch.long)

    def dream() -> None:
        reading = model.start(context)
        for step in range(10):
            _, _, reading = model.next_frame(reading, action[:, step])

    def cost(run: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return int(counter.get_total_flops())

    whole = torch.zeros(1, model.layout.length(10), dtype=torch.long)
    assert 0.5 < cost(dream) / cost(lambda: model(whole, action)) <= 1.2


@torch.no_grad()
def test_an_action_changes_nothing_at_first_then_only_what_follows(tokens: Tensor) -> None:
    torch.manual_seed(0)
    model = FramePredictor(SMALL, NARROW, 4).eval()
    assert model.control is not None
    action = torch.randn(1, 2, 4)
    assert torch.equal(model(tokens, action).logits, model(tokens).logits)
    nn.init.normal_(model.control.action.weight)
    changed = action.clone()
    changed[:, 1] += 1.0
    first, second = (model(tokens, a).logits for a in (action, changed))
    mark = model.layout.first_mark + model.layout.future_tokens + 1
    assert torch.equal(first[:, :mark], second[:, :mark])
    assert not torch.equal(first[:, mark], second[:, mark])


@torch.no_grad()
def test_the_decoder_is_that_of_transformers(tokens: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=130, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=1024, rms_norm_eps=1e-6,
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    ours = TokenTransformer(SMALL, 130).eval()
    load_published(ours, load_file(tmp_path / "model.safetensors"), "model.safetensors")
    found = theirs(tokens).logits
    assert float(found.std()) > 0.05
    torch.testing.assert_close(ours(tokens), found, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_published_tokenizers_are_taken_over(narrow: Tokenizer, tmp_path: Path) -> None:
    names = published_names(narrow)
    assert len(set(names.values())) == len(names)
    shown = {theirs.partition(".")[0] for theirs in names.values()}
    assert shown == {
        "encoder", "cond_encoder", "decoder", "cond_decoder", "quant_conv", "post_quant_conv",
        "quant_linear", "post_quant_linear", "quantize", "dynamics_quantize",
    }  # fmt: skip
    examples = {
        "encoder.down_blocks.0.resnets.0.norm1.weight",
        "encoder.down_blocks.1.resnets.0.conv_shortcut.bias",
        "encoder.down_blocks.1.downsamplers.0.conv.weight",
        "encoder.mid_block.resnets.1.conv2.weight",
        "cond_encoder.cross_att_blocks.0.att.in_proj_weight",
        "cond_encoder.cross_att_blocks.1.kv_pos_emb",
        "cond_encoder.mid_block.attentions.0.to_out.0.bias",
        "cond_encoder.mid_block.attentions.0.to_q.weight",
        "cond_encoder.mid_block.attentions.0.group_norm.weight",
        "cond_decoder.cross_att_blocks.0.att.out_proj.bias",
        "cond_decoder.cross_att_blocks.0.kv_norm.weight",
        "cond_decoder.cross_att_blocks.0.q_norm.bias",
        "cond_decoder.up_blocks.1.upsamplers.0.conv.bias",
        "decoder.up_blocks.2.resnets.1.conv1.weight",
        "decoder.conv_norm_out.weight",
        "decoder.conv_out.bias",
        "decoder.conv_in.weight",
        "dynamics_quantize.embedding.weight",
    }
    assert examples <= set(names.values())
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({names[n]: x.float().contiguous() for n, x in narrow.state_dict().items()}, path)
    stored, other = load_file(path), Tokenizer(NARROW)
    load_published(other, stored, "theirs")
    for name, x in other.state_dict().items():
        assert torch.equal(x, narrow.state_dict()[name].float()), name
    with pytest.raises(
        CheckpointError, match=r"'theirs' has no tensor 'model\.embed_tokens\.weight'"
    ):
        load_published(TokenTransformer(SMALL, 130), stored, "theirs")
    with pytest.raises(CheckpointError, match="has no place for 'more' of 'theirs'"):
        load_published(other, stored | {"more": torch.zeros(1)}, "theirs")
    stored["quant_conv.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"'quant_conv.bias' is \(3,\) .* size=paper"):
        load_published(other, stored, "theirs")
