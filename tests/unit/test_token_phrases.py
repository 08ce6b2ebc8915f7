"""Phrases in the token world, its codes while they learn, and what pre-training changes."""

from __future__ import annotations

from dataclasses import replace

import torch
from networks import token_world

from mapo_lightning.models.settings import ObjectiveConfig
from mapo_lightning.models.token_world.frame_predictor import Told
from mapo_lightning.models.token_world.settings import TokenizerConfig
from mapo_lightning.models.token_world.tokenizer import LearntCodes
from mapo_lightning.models.token_world.world_model import Taught, TokenWorldModel
from mapo_lightning.types import Batch
from tests.unit.test_token_dreams import A, constant, experience

V = 6


def told_batch(time: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(1)
    known = torch.rand(2, time, generator=generator) > 0.3
    return experience(time) | {
        "semantic": torch.randn(2, time, V, generator=generator) * known[..., None],
        "has_semantic": known,
    }


def speaking(action_dim: int | None, learn: Taught, **words: object) -> TokenWorldModel:
    """With phrases that change something: at first their weights are zero."""
    torch.manual_seed(4)
    world = token_world(action_dim, learn, V, phrases=True, **words)
    assert world.predictor is not None
    assert world.predictor.phrases is not None
    torch.nn.init.normal_(world.predictor.phrases.put.weight)
    return world


def test_a_phrase_drives_the_frame_that_it_leads_to() -> None:
    batch = told_batch()
    batch["has_semantic"][:] = True
    world = speaking(None, "transformer").eval()
    assert world.predictor is not None
    tokens, _ = world.tokenizer.tokenize(batch["obs"].movedim(-1, 2).float() / 255)
    layout, shown = world.predictor.layout, batch["semantic"][:, 2:]
    known = torch.ones(2, 6, dtype=torch.bool)
    before = world.predictor(tokens, None, Told(shown, known)).logits
    other = shown.clone()
    other[:, 3] += 1.0
    after = world.predictor(tokens, None, Told(other, known)).logits
    slot = layout.first_mark + 3 * (layout.future_tokens + 1)
    assert torch.equal(before[:, :slot], after[:, :slot])
    assert not torch.equal(before[:, slot], after[:, slot])
    # Where there is none, the slot is what pre-training without phrases leaves there.
    nothing = world.predictor(tokens, None, Told(shown, ~known)).logits
    assert torch.equal(nothing, world.predictor(tokens).logits)
    # A fresh one changes nothing either, whatever is said.
    assert world.predictor.phrases is not None
    torch.nn.init.zeros_(world.predictor.phrases.put.weight)
    assert torch.equal(world.predictor(tokens, None, Told(shown, known)).logits, nothing)


def test_the_guess_of_a_phrase_is_made_before_it_is_told() -> None:
    world, batch = speaking(A, "both").eval(), told_batch()
    assert world.predictor is not None
    assert world.predictor.phrases is not None
    assert world.predictor.control is not None
    assert world.predictor.control.intend is not None
    torch.nn.init.normal_(world.predictor.control.intend.weight)
    tokens, _ = world.tokenizer.tokenize(batch["obs"].movedim(-1, 2).float() / 255)
    action, told = (
        batch["action"][:, 2:],
        Told(batch["semantic"][:, 2:], batch["has_semantic"][:, 2:]),
    )
    first = world.predictor(tokens, action, told).semantic
    later = told._replace(semantic=told.semantic + 1.0, known=torch.ones_like(told.known))
    other = world.predictor(tokens, action, later).semantic
    assert first is not None
    assert other is not None
    assert torch.equal(first[:, 0], other[:, 0])
    assert not torch.equal(first[:, 1], other[:, 1])  # what was told before is known by then
    moved = action.clone()
    moved[:, 0] += 1.0
    driven = world.predictor(tokens, moved, told).semantic
    assert driven is not None
    assert not torch.equal(first[:, 0], driven[:, 0])
    away = (first - told.semantic).square().sum(-1)
    expected = away[told.known].mean()
    torch.testing.assert_close(world.loss(batch).log["phrase"], expected)


def test_phrases_are_left_out_while_learning_only() -> None:
    batch = told_batch()
    for share, same in ((0.0, True), (1.0, False)):
        world = speaking(None, "transformer", phrase_dropout=share)
        world.cfg.transformer.dropout = 0.0
        assert world.predictor is not None
        for layer in world.predictor.transformer.layers:
            layer.dropout = 0.0
        learning, judged = world.train().loss(batch).log, world.eval().loss(batch).log
        assert torch.equal(learning["tokens"], judged["tokens"]) == same
    untold = world.eval().loss(batch | {"has_semantic": torch.zeros(2, 8, dtype=torch.bool)})
    torch.testing.assert_close(untold.log["tokens"], learning["tokens"])
    assert float(untold.log["phrase"]) == 0.0


def test_a_dream_follows_its_phrases_or_guesses_them() -> None:
    batch = told_batch()
    batch["has_semantic"][:] = True
    world = speaking(None, "transformer", temperature=0.0)
    told = world.open_loop(batch, seen=3)
    untold = world.open_loop(batch | {"has_semantic": ~batch["has_semantic"]}, seen=3)
    assert torch.equal(told[:, :3], untold[:, :3])
    assert not torch.equal(told[:, 3:], untold[:, 3:])
    # In control nobody tells what will happen: the guess takes the phrase's place.
    world = speaking(A, "both", temperature=0.0)
    assert world.predictor is not None
    assert world.predictor.phrases is not None
    start = world.observe(batch).at(4)
    actions = constant(batch["action"][:, 5:])
    dreams = [world.imagine(start, actions, 3).feat]
    with torch.no_grad():
        world.predictor.phrases.say.bias += 3.0  # another guess
    dreams.append(world.imagine(start, actions, 3).feat)
    assert not torch.equal(*dreams)


def test_codes_that_nothing_chooses_are_moved_to_latents_while_the_tokenizer_learns() -> None:
    torch.manual_seed(0)
    book = LearntCodes(8, 3, counted=True)
    rows = torch.tensor([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0]])
    with torch.no_grad():
        book.codes[0], book.codes[1] = rows[0], rows[1]
    book(rows)
    assert book.used.tolist() == [1.0, 1.0, 0, 0, 0, 0, 0, 0]
    book.due = True
    new = torch.rand(20, 3) - 4.0
    _, number, _ = book(new)
    assert torch.equal(book.codes[:2], rows)  # in use
    moved = {tuple(code.tolist()) for code in book.codes[2:]}
    assert len(moved) == 6
    assert moved <= {tuple(row.tolist()) for row in new}
    assert set(number.tolist()) <= set(range(2, 8))
    assert not book.due
    assert float(book.used.sum()) == 20
    book.eval()
    book(rows)
    assert float(book.used.sum()) == 20  # a validation counts nothing


def test_codes_are_revived_in_their_own_phase_only() -> None:
    batch = {key: value for key, value in experience(6).items() if key in ("obs", "is_first")}
    tokenizer = TokenizerConfig(
        size=32, channels=[8, 32, 32], blocks=1, groups=8, latent=8, context_codes=32,
        future_codes=32, revive=2,
    )  # fmt: skip
    cfg = replace(token_world(None, "tokenizer").cfg, tokenizer=tokenizer)
    scales = ObjectiveConfig({"context": 1.0, "future": 1.0, "codes": 1.0})
    world = TokenWorldModel(cfg, scales, None, "tokenizer")
    before = world.tokenizer.context_codes.codes.detach().clone()
    for update in range(3):
        assert torch.equal(world.tokenizer.context_codes.codes, before), update
        world.loss(batch)
    assert not torch.equal(world.tokenizer.context_codes.codes, before)
    assert "used" not in dict(token_world(None, "tokenizer").tokenizer.named_buffers())


def test_clips_are_changed_in_pre_training_only() -> None:
    phases: tuple[Taught, ...] = ("tokenizer", "transformer")
    batch = experience(5)
    for learn in phases:
        world = token_world(None, learn, augment=True)
        plain = token_world(None, learn)
        plain.load_state_dict(world.state_dict())
        found = []
        for model, training in ((world, True), (world, False), (plain, False)):
            torch.manual_seed(0)
            found.append(float(model.train(training).loss(batch).total.detach()))
        assert found[0] != found[1] == found[2], learn
    world, plain = token_world(A, augment=True), token_world(A)
    plain.load_state_dict(world.state_dict())
    for model in (world, plain):
        torch.manual_seed(0)
        found.append(float(model.train().loss(batch).log["context"]))
    assert found[-1] == found[-2]
