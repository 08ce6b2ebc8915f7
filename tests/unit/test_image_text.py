"""Image-text families of transformers other than Qwen's, tiny and with random weights."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scenes import moving_square
from tiny_families import save_family
from tiny_models import save_qwen

from mapo_lightning.run.main import main
from mapo_lightning.semantics.describer import Reply
from mapo_lightning.semantics.factory import build_labeler, semantic_dim
from mapo_lightning.semantics.image_text import ImageTextModel
from mapo_lightning.semantics.in_process import InProcessDescriber
from mapo_lightning.semantics.phrase import PROMPT, parse_reply
from mapo_lightning.semantics.qwen import LoadedModel
from mapo_lightning.semantics.settings import VlmConfig
from mapo_lightning.types import DescriberError, Frames

FAMILIES = ["idefics3", "internvl", "gemma3", "llava_onevision"]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp(request.param), request.param)


def config(folder: Path, **words: Any) -> VlmConfig:
    return VlmConfig(
        kind="transformers", model=str(folder), max_new_tokens=8, batch_size=3, **words
    )


def clips() -> list[Frames]:
    """Windows of two sizes, flat and rough, one of another number of frames."""
    rng = np.random.default_rng(0)
    rough = rng.integers(0, 255, (3, 4, 64, 64, 3)).astype(np.uint8)
    return [*rough, rough[0] // 9, np.zeros((4, 48, 80, 3), np.uint8), rough[1][:3]]


@pytest.mark.slow
def test_describes_in_words_with_a_hidden_state(folder: Path) -> None:
    replies = InProcessDescriber(config(folder)).describe(clips())
    assert len(replies) == len(clips())
    states = []
    for reply in replies:
        assert isinstance(reply, Reply)
        assert parse_reply(reply.text).status == "prose"
        assert reply.hidden is not None
        assert (reply.hidden.shape, reply.hidden.dtype) == ((64,), np.float16)
        states.append(reply.hidden)
    assert not np.allclose(states[0], states[3], atol=1e-3)  # it sees the picture


@pytest.mark.slow
def test_company_does_not_matter(folder: Path) -> None:
    describer = InProcessDescriber(config(folder))
    together = describer.describe(clips())
    alone = [describer.describe([clip])[0] for clip in clips()]
    for one, other in zip(together, alone, strict=True):
        assert isinstance(one, Reply)
        assert isinstance(other, Reply)
        assert one.text == other.text
        assert one.hidden is not None
        assert other.hidden is not None
        np.testing.assert_allclose(one.hidden, other.hidden, atol=4e-3)


@pytest.mark.slow
def test_the_question_is_the_frames_in_order_and_the_prompt(folder: Path) -> None:
    model = InProcessDescriber(config(folder)).model
    assert isinstance(model, ImageTextModel)
    film = clips()[0]
    inputs = model.inputs([film, film])
    assert PROMPT in model.tokenizer.decode(inputs["input_ids"][0])
    # Four tokens or more per frame, and no tiles: as many for a wide frame as for a square one.
    wide = model.inputs([np.zeros((4, 48, 80, 3), np.uint8)])
    assert wide["input_ids"].shape[1] == inputs["input_ids"].shape[1]
    pixels = inputs["pixel_values"]
    assert pixels.flatten(0, -4).shape == (8, 3, 28, 28)
    backwards = model.inputs([film[::-1]])["pixel_values"].flatten(0, -4)
    np.testing.assert_allclose(backwards.flip(0), pixels.flatten(0, -4)[:4], atol=1e-5)


def test_labels_windows_of_a_film(folder: Path, tmp_path: Path) -> None:
    cfg = config(folder, direction="flow")
    labeler = build_labeler(cfg, tmp_path, "w")
    films = [moving_square(np.random.default_rng(n), way, 12.0) for n, way in enumerate((0, 2, 4))]
    labels = labeler.label_frames(films, "film.mp4")
    assert [label.phrase and label.phrase.direction for label in labels] == [
        "right",
        "down",
        "left",
    ]
    assert all(label.phrase and label.phrase.body == "hand" for label in labels)
    assert {label.vector.shape for label in labels} == {(semantic_dim(cfg),)} == {(72,)}


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3"])
def test_qwen_keeps_its_video(family: str, tmp_path: Path) -> None:
    model = InProcessDescriber(config(save_qwen(tmp_path, family))).model
    assert type(model) is LoadedModel
    assert "pixel_values_videos" in model.inputs(clips()[:1])


def refusal(folder: Path) -> str:
    with pytest.raises(DescriberError) as caught:
        InProcessDescriber(config(folder)).describe(clips()[:1])
    said = str(caught.value)
    assert "\n" not in said
    assert "Choose another model with vlm.model=..., or serve it and use vlm=openai_server" in said
    return said


def test_a_family_that_needs_another_package_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    said = refusal(save_family(tmp_path, "smolvlm"))
    assert "is a smolvlm, which cannot be asked about frames" in said
    assert "pip install num2words" in said


def test_smolvlm_needs_that_package_for_videos_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object) -> str:
        raise AssertionError("no number is put into words about images")

    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", never)
    for reply in InProcessDescriber(config(save_family(tmp_path, "smolvlm"))).describe(clips()):
        assert isinstance(reply, Reply)
        assert parse_reply(reply.text).status == "prose"


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    folder = save_family(tmp_path, "idefics3")
    (folder / "chat_template.jinja").unlink()
    assert "it has no chat template" in refusal(folder)


def test_a_chat_template_that_leaves_images_out_is_refused(tmp_path: Path) -> None:
    folder = save_family(tmp_path, "llava_onevision")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<image>", ""))
    assert "is a llava_onevision, which cannot be asked about frames" in refusal(folder)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, "qwen2_5", "qwen3"])
def test_six_families_label_the_videos_of_the_toy(
    family: str, in_tmp: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    save = save_qwen if family.startswith("qwen") else save_family
    words = ["data=toy", "demo.clips_per_scene=1", "demo.frames=20", "demo.size=64"]
    model = [f"vlm.model={save(in_tmp / 'model', family)}", "vlm.max_new_tokens=8"]
    assert main(["stage=label", *words, "vlm.kind=transformers", *model, "run_dir=run"]) == 0
    said = caplog.text
    found = re.search(r"(\d+) of (\d+) windows: (\d+) queried.* 0 unreadable, 0 without", said)
    assert found is not None, said
    done, windows, queried = map(int, found.groups())
    assert done == windows == queried > 0
