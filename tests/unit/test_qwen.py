"""The real transformers classes with tiny random weights that the test builds and saves."""

from __future__ import annotations

import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import save_bert, save_qwen

from mapo_lightning.semantics.describer import Describer, Reply, StreamingDescriber
from mapo_lightning.semantics.factory import build_labeler, semantic_dim
from mapo_lightning.semantics.in_process import InProcessDescriber
from mapo_lightning.semantics.phrase import Phrase, parse_reply
from mapo_lightning.semantics.qwen import identity
from mapo_lightning.semantics.settings import EmbedConfig, VlmConfig
from mapo_lightning.semantics.text_encoder import TextEncoder, _load
from mapo_lightning.types import ConfigError, DescriberError, Frames


@pytest.fixture(scope="module", params=["qwen2_5", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


def config(folder: Path, **words: object) -> VlmConfig:
    settings = {"model": str(folder), "max_new_tokens": 8, "batch_size": 3} | words
    return VlmConfig(kind="transformers", **settings)


def clips() -> list[Frames]:
    """Windows of two sizes, flat and rough, one of an odd number of frames."""
    rng = np.random.default_rng(0)
    rough = rng.integers(0, 255, (5, 4, 64, 64, 3)).astype(np.uint8)
    return [*rough, rough[0] // 9, np.zeros((4, 56, 84, 3), np.uint8), rough[1][:3]]


def test_describes_in_words_with_a_hidden_state(folder: Path) -> None:
    describer = InProcessDescriber(config(folder))
    assert isinstance(describer, Describer)
    assert not isinstance(describer, StreamingDescriber)
    assert not describer.in_worker
    replies = describer.describe(clips())
    assert len(replies) == len(clips())
    assert describer.describe([]) == []
    for reply in replies:
        assert parse_reply(reply.text).status == "prose"
        assert reply.hidden is not None
        assert (reply.hidden.shape, reply.hidden.dtype) == ((64,), np.float16)
    assert not np.allclose(replies[0].hidden, replies[6].hidden, atol=1e-2)  # it sees the picture


@pytest.mark.slow
def test_company_does_not_matter(folder: Path) -> None:
    describer = InProcessDescriber(config(folder))
    together = describer.describe(clips())
    alone = [describer.describe([clip])[0] for clip in clips()]
    assert [reply.text for reply in together] == [reply.text for reply in alone]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.hidden, other.hidden, atol=2e-3)  # a few half-precision ulps


THINKS = ("\n", "<think>", " ball", "</think>", " hand", (" moves", " lifts"), " brick")
THINKS = (*THINKS, (" right", " left"))


@pytest.fixture(scope="module", params=["qwen2_5", "qwen3"])
def thinker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen(tmp_path_factory.mktemp("thinks"), request.param, answer=THINKS)


def test_thoughts_are_not_part_of_the_answer(thinker: Path) -> None:
    describer = InProcessDescriber(config(thinker))
    loaded, seen, real = describer.model, {}, describer.model.model.generate

    def generate(**words: object) -> torch.Tensor:
        out = real(**words, return_dict_in_generate=True, output_hidden_states=True)
        seen["states"] = out.hidden_states
        return out.sequences

    loaded.model.generate = generate
    try:
        (reply,) = describer.describe(clips()[:1])
    finally:
        del loaded.model.generate
    assert isinstance(reply, Reply)
    assert re.fullmatch("hand (moves|lifts) brick (right|left)", reply.text)
    # The state that has read token n comes one step later; the three of the thought are left out.
    wanted = torch.stack([step[-1][0, -1] for step in seen["states"][4:8]]).mean(0)
    np.testing.assert_allclose(reply.hidden, wanted.numpy().astype(np.float16), atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [2, 3, 4, 7])
def test_an_answer_that_is_cut_gets_more_room(thinker: Path, tokens: int) -> None:
    whole = InProcessDescriber(config(thinker)).describe(clips())
    again = InProcessDescriber(config(thinker, max_new_tokens=tokens)).describe(clips())
    assert [r.text for r in again] == [r.text for r in whole]


def test_what_stays_cut_is_not_stored(
    thinker: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labeler = build_labeler(config(thinker, max_new_tokens=1), tmp_path, "w")
    (label,) = labeler.label_frames(clips()[:1], "v.mp4 frames 0..3 step 1")
    assert not label.answered
    assert labeler.store.items() == {}
    assert labeler.stats.unanswered == 1
    assert "no label of v.mp4 frames 0..3 step 1: its answer is cut short" in caplog.text


def test_hidden_state_is_that_of_generate(folder: Path) -> None:
    """Against transformers' own record of hidden states, one window at a time."""
    describer = InProcessDescriber(config(folder))
    (reply,) = describer.describe(clips()[:1])
    loaded = describer.model
    seen = {}
    real = loaded.model.generate

    def generate(**words: object) -> torch.Tensor:
        out = real(**words, return_dict_in_generate=True, output_hidden_states=True)
        seen["states"], seen["said"] = out.hidden_states, out.sequences
        return out.sequences

    loaded.model.generate = generate
    try:
        assert loaded.answer(clips()[:1], 8)[0].text == reply.text
    finally:
        del loaded.model.generate
    words = len(loaded.tokenizer(reply.text)["input_ids"])
    wanted = torch.stack([step[-1][0, -1] for step in seen["states"][1 : 1 + words]]).mean(0)
    np.testing.assert_allclose(reply.hidden, wanted.numpy().astype(np.float16), atol=1e-3)


def test_patches_are_those_of_a_video(folder: Path) -> None:
    """A still clip gives what the image processor makes of one picture; order matters otherwise."""
    describer = InProcessDescriber(config(folder))
    describer.describe(clips()[:1])
    loaded = describer.model
    clip = clips()[0]
    still, grid = loaded._patches(np.stack([clip[0]] * 4))
    single = loaded.images(images=[clip[0]], return_tensors="pt")
    assert grid == [2, *single["image_grid_thw"][0, 1:].tolist()]
    torch.testing.assert_close(still, single["pixel_values"].repeat(2, 1))
    moving, _ = loaded._patches(clip)
    rows = len(single["pixel_values"])
    size = loaded.images.patch_size**2
    planes = moving.view(2, rows, 3, 2, size)
    for t in range(4):
        alone = loaded.images(images=[clip[t]], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(
            planes[t // 2, :, :, t % 2], alone.view(rows, 3, 2, size)[:, :, 0]
        )
    assert torch.equal(
        loaded._patches(clip[:3])[0][rows:], loaded._patches(clip[[0, 1, 2, 2]])[0][rows:]
    )


def test_identity_is_that_of_the_weights(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert InProcessDescriber(config(copy)).name == InProcessDescriber(config(folder)).name
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert InProcessDescriber(config(copy)).name != InProcessDescriber(config(folder)).name
    assert identity("Qwen/X", "abc") == "Qwen/X@abc"


def test_travels_without_weights(folder: Path) -> None:
    describer = InProcessDescriber(config(folder))
    replies = describer.describe(clips()[:2])
    data = pickle.dumps(describer)
    assert len(data) < 10_000
    assert pickle.loads(data).model is describer.model  # one copy per process
    copy = pickle.loads(data)
    assert copy.name == describer.name
    assert [r.text for r in copy.describe(clips()[:2])] == [r.text for r in replies]


def test_labels_carry_the_hidden_state(folder: Path, tmp_path: Path) -> None:
    cfg = config(folder)
    assert semantic_dim(cfg) == 64
    labeler = build_labeler(cfg, tmp_path, "w")
    (label,) = labeler.label_frames(clips()[:1], "x")
    assert label.known
    assert label.vector.shape == (64,)
    assert np.sqrt(np.mean(label.vector**2)) == pytest.approx(1.0, abs=1e-3)
    again = build_labeler(cfg, tmp_path, "v").label_frames(clips()[:1], "x")[0]
    np.testing.assert_array_equal(again.vector, label.vector)


def test_absent_model_is_one_sentence(tmp_path: Path) -> None:
    cfg = config(tmp_path / "nowhere")
    for broken in (
        lambda: semantic_dim(cfg),
        lambda: InProcessDescriber(cfg).describe(clips()[:1]),
    ):
        with pytest.raises(
            DescriberError, match=r"cannot load '.*nowhere'.*vlm.model=DIR"
        ) as caught:
            broken()
        assert "\n" not in str(caught.value)
    with pytest.raises(DescriberError, match=r"cannot load 'Qwen/Qwen2.5-VL-7B-Instruct'"):
        semantic_dim(VlmConfig(kind="transformers"))  # no network in tests


def test_other_models_are_refused(bert: Path) -> None:
    with pytest.raises(DescriberError, match="cannot load"):
        InProcessDescriber(config(bert)).describe(clips()[:1])


def test_text_encoder_tells_phrases_apart(bert: Path, tmp_path: Path) -> None:
    encoder = TextEncoder(str(bert))
    one = encoder.encode(Phrase("hand", "lifts", "ball", "right", ""))
    same = pickle.loads(pickle.dumps(encoder)).encode(Phrase("hand", "lifts", "ball", "right", ""))
    other = encoder.encode(Phrase("hand", "lifts", "ball", "left", ""))
    assert one.shape == (32,) == (encoder.semantic_dim,)
    assert np.sqrt(np.mean(one**2)) == pytest.approx(1.0, abs=1e-4)
    np.testing.assert_allclose(one, same, atol=1e-5)
    assert np.abs(one - other).max() > 0.05
    cfg = VlmConfig(kind="flow", embed=EmbedConfig(str(bert)))
    assert semantic_dim(cfg) == 32
    assert build_labeler(cfg, tmp_path, "w").encoder.semantic_dim == 32


OPPOSITES = [("left", "right"), ("up", "down"), ("upper left", "lower right")]


@pytest.mark.parametrize(("one", "other"), OPPOSITES)
def test_directions_joined_to_a_text_encoder_stay_apart(
    bert: Path, tmp_path: Path, one: str, other: str
) -> None:
    plain = EmbedConfig(str(bert))
    joined = EmbedConfig(str(bert), direction=True)
    cosines = []
    for embed in (plain, joined):
        cfg = VlmConfig(kind="flow", embed=embed)
        encoder = pickle.loads(pickle.dumps(build_labeler(cfg, tmp_path, "w").encoder))
        assert encoder.semantic_dim == semantic_dim(cfg)
        phrases = [Phrase("hand", "lifts", "ball", way, "5 cm") for way in (one, other)]
        a, b = (encoder.encode(phrase, None) for phrase in phrases)
        assert a.shape == (encoder.semantic_dim,)
        cosines.append(cosine(a, b))
    assert semantic_dim(VlmConfig(embed=joined)) == semantic_dim(VlmConfig(embed=plain)) + 8
    assert cosines[0] > 0.8
    assert cosines[1] <= 0.3


def test_measured_directions_reach_the_vector_of_a_hidden_state(
    folder: Path, tmp_path: Path
) -> None:
    cfg = config(folder, direction="flow")
    assert semantic_dim(cfg) == 64 + 8
    film = np.random.default_rng(3).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    film = film.repeat(2, 0).repeat(2, 1)
    moves = [np.stack([np.roll(film, s * 3 * t, 1) for t in range(4)]) for s in (1, -1)]
    labeler = build_labeler(cfg, tmp_path, "w")
    assert not labeler.describer.in_worker
    right, left = labeler.label_frames(moves, "v.mp4")
    assert right.phrase is not None
    assert left.phrase is not None
    assert (right.phrase.direction, left.phrase.direction) == ("right", "left")
    np.testing.assert_allclose(right.vector[64:68], -left.vector[64:68], atol=1e-6)
    assert right.vector[64] > 3.0
    with pytest.raises(ConfigError, match=r"direction cannot be flow with embed\.direction=false"):
        config(folder, direction="flow", embed=EmbedConfig(direction=False))


def test_text_encoder_is_the_mean_over_its_words(bert: Path) -> None:
    encoder = TextEncoder(str(bert))
    phrase = Phrase("hand", "moves", "", "", "")
    vector = encoder.encode(phrase)
    tokenizer, model = _load(str(bert), None)
    ids = tokenizer("hand moves", return_tensors="pt")["input_ids"]
    mean = model(input_ids=ids).last_hidden_state[0].mean(0).detach().numpy()
    np.testing.assert_allclose(vector, mean / np.sqrt(np.mean(mean**2)), atol=1e-5)


def test_absent_text_encoder_is_one_sentence() -> None:
    with pytest.raises(DescriberError, match=r"cannot load 'no/where'.*vlm.embed.encoder=DIR"):
        semantic_dim(VlmConfig(embed=EmbedConfig("no/where")))


def test_absent_wordllama_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DescriberError, match=r"needs the package wordllama.*\[wordllama\]"):
        semantic_dim(VlmConfig(embed=EmbedConfig("wordllama")))


@pytest.mark.parametrize(("one", "other"), OPPOSITES)
def test_wordllama_brings_its_weights_and_directions_are_joined(
    one: str, other: str, tmp_path: Path
) -> None:
    cosines = []
    for direction in (False, True):
        embed = EmbedConfig("wordllama", direction=direction)
        encoder = build_labeler(VlmConfig(embed=embed), tmp_path, "w").encoder
        encoder = pickle.loads(pickle.dumps(encoder))
        assert encoder.semantic_dim == 256 + 8 * direction
        base = Phrase("hand", "opens", "door", one, "5 cm")
        there, back, same, else_ = (
            encoder.encode(phrase, None)
            for phrase in (
                base,
                base._replace(direction=other),
                base._replace(body="a hand", target="the door"),
                Phrase("cheetah", "runs", "", one, "5 cm"),
            )
        )
        assert np.sqrt(np.mean(there**2)) <= 1.0 + 1e-5
        assert cosine(there, same) > cosine(there, else_) + 0.1
        cosines.append(cosine(there, back))
    assert cosines[0] > 0.8
    assert cosines[1] <= 0.3


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
