"""The codebook: nearest code, straight-through, moving averages, revival (facts O11-O16)."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.codebook import CodebookUpdate
from mapo_lightning.models.rssm_world.context import FrameContext
from mapo_lightning.models.rssm_world.encoder import normalised
from mapo_lightning.models.rssm_world.quantizer import CodebookUse, Quantizer
from mapo_lightning.models.rssm_world.settings import ContextConfig, ImageConfig, QuantizerConfig


def test_look_up_is_nearest_and_straight_through() -> None:
    torch.manual_seed(0)
    book = Quantizer(QuantizerConfig(codes=6), 3).eval()
    rows = torch.randn(10, 3, requires_grad=True)
    found = book(rows)
    expected = torch.stack([((book.codes - r) ** 2).sum(1).argmin() for r in rows])
    assert torch.equal(found.chosen, expected)
    torch.testing.assert_close(found.code, book.codes[expected])
    weight = torch.randn(10, 3)
    (found.code * weight).sum().backward()
    torch.testing.assert_close(rows.grad, weight)


def test_commitment_pulls_the_rows_and_not_the_codes() -> None:
    book = Quantizer(QuantizerConfig(codes=6), 3).eval()
    rows = torch.randn(10, 3, requires_grad=True)
    found = book(rows)
    found.commitment.backward()
    torch.testing.assert_close(rows.grad, 2 * (rows.detach() - found.code.detach()) / 30)
    assert not book.codes.requires_grad


def test_moving_averages_in_float64() -> None:
    """N_i <- g N_i + (1-g) n_i; m_i <- g m_i + (1-g) sum; e_i = m_i / smoothed N_i."""
    torch.manual_seed(0)
    book = Quantizer(QuantizerConfig(codes=3, decay=0.9, dead_below=0.0), 2).double()
    book._must_start = False
    count0, sum0 = book.ema_count.clone(), book.ema_sum.clone()
    rows = torch.randn(20, 2, dtype=torch.float64)
    index = ((rows[:, None] - book.codes) ** 2).sum(-1).argmin(1)
    n = torch.stack([(index == i).sum() for i in range(3)]).double()
    m = torch.stack([rows[index == i].sum(0) for i in range(3)])
    book.update(n, m, rows[:3])
    count, total = 0.9 * count0 + 0.1 * n, 0.9 * sum0 + 0.1 * m
    smooth = (count + 1e-5) / (count.sum() + 3e-5) * count.sum()
    torch.testing.assert_close(book.codes, total / smooth[:, None])


def test_evaluation_and_a_second_forward_do_not_move_the_codes() -> None:
    book = Quantizer(QuantizerConfig(codes=4), 2)
    book(torch.randn(50, 2))
    codes = book.codes.clone()
    book(torch.randn(50, 2))
    book.eval()
    book(torch.randn(50, 2))
    assert torch.equal(book.codes, codes)
    assert float(book.batch_count.sum()) == 100.0


def test_dead_codes_are_revived_from_the_batch() -> None:
    """Sixteen scenes, a codebook that starts on one of them: in the end every scene has codes."""
    torch.manual_seed(0)
    book = Quantizer(QuantizerConfig(codes=64, decay=0.9), 8)
    centres = 5 * torch.randn(16, 8)
    book(centres[0] + 0.01 * torch.randn(64, 8))
    for _ in range(150):
        rows = centres[torch.randint(16, (256,))] + 0.01 * torch.randn(256, 8)
        book(rows)
        use = book.update(book.batch_count, book.batch_sum, book.candidates)
    assert float(use.perplexity) >= 12.0
    assert float((torch.cdist(centres, book.codes).min(dim=1).values < 0.1).float().mean()) == 1.0


@pytest.mark.slow
def test_no_code_dies_and_a_vanished_context_gives_its_codes_back() -> None:
    """Sixteen contexts, a code per clip of a batch of 16; then half of the contexts are gone."""
    torch.manual_seed(1)
    book = Quantizer(QuantizerConfig(codes=64), 8)
    centres = 5 * torch.randn(16, 8)

    def step(contexts: int) -> tuple[CodebookUse, torch.Tensor]:
        rows = centres[torch.randint(contexts, (16,))]
        book(rows + 0.01 * torch.randn(16, 8))
        used = book.batch_count > 0
        return book.update(book.batch_count, book.batch_sum, book.candidates), used

    uses = [step(16)[0] for _ in range(2000)]
    assert sum(float(use.perplexity) for use in uses[-100:]) / 100 >= 12.0
    assert sum(float(use.revived) for use in uses[-100:]) == 0
    used = torch.stack([step(8)[1] for _ in range(500)])
    assert float(used[-100:].any(dim=0).float().mean()) >= 0.9


def test_the_codebook_starts_from_the_first_batch() -> None:
    torch.manual_seed(0)
    book = Quantizer(QuantizerConfig(codes=8), 2)
    rows = 100 + torch.randn(64, 2)
    assert float(book(rows).commitment) < 1.0
    resumed = Quantizer(QuantizerConfig(codes=8), 2)
    resumed.load_state_dict(book.state_dict())
    resumed(torch.randn(64, 2))
    assert torch.equal(resumed.codes, book.codes)


def test_what_a_checkpoint_keeps_of_a_codebook() -> None:
    """Not what one update has collected: it would be counted again after resuming."""
    kept = set(Quantizer(QuantizerConfig(codes=8), 2).state_dict())
    assert kept == {"codes", "ema_count", "ema_sum", "started"}


def test_both_shapes_give_the_decoder_maps_of_both_scales() -> None:
    obs = torch.randint(0, 256, (3, 5, 64, 64, 3), dtype=torch.uint8)
    image = ImageConfig(channels=[4, 8, 16], layers=1)
    for shape, codes in (("spatial", {16: 256, 8: 64}), ("global", {16: 1, 8: 1})):
        cfg = ContextConfig(kind="quantized", quantizer=QuantizerConfig(codes=4, shape=shape))
        context = FrameContext(cfg, image)(obs)
        assert {side: tuple(x.shape) for side, x in context.maps.items()} == {
            16: (3, 8, 16, 16),
            8: (3, 16, 8, 8),
        }
        assert {side: x.shape[1] for side, x in context.codes.items()} == codes
        assert set(context.terms) == {"commitment"}


def test_erasing_greys_out_one_rectangle_while_training_only() -> None:
    torch.manual_seed(0)
    image = ImageConfig(channels=[4, 8, 16], layers=1)
    context = FrameContext(ContextConfig(kind="features", erase=1.0), image, augment=True)
    frame = torch.ones(64, 3, 64, 64)
    erased = context._augment(frame)
    share = (erased == 0).float().mean(dim=(1, 2, 3))
    assert 0.0 < float(share.min()) <= float(share.max()) < 0.36
    assert torch.equal(context.eval()._augment(frame), frame)
    watching = FrameContext(ContextConfig(kind="features", erase=1.0), image)  # pre-training
    assert torch.equal(watching._augment(frame), frame)


@pytest.mark.parametrize("training", [True, False])
def test_a_frozen_codebook_neither_collects_nor_starts_nor_moves(training: bool) -> None:
    torch.manual_seed(0)
    frozen = Quantizer(QuantizerConfig(codes=8, frozen=True), 2).train(training)
    before = {name: value.clone() for name, value in frozen.named_buffers()}
    assert float(frozen(100 + torch.randn(64, 2)).commitment) > 100.0  # nothing is near the codes
    assert all(torch.equal(value, before[name]) for name, value in frozen.named_buffers())


@pytest.mark.parametrize(("frame", "index"), [("first", 0), ("last", 4)])
def test_the_context_looks_at_the_frame_that_the_settings_name(frame: str, index: int) -> None:
    image = ImageConfig(channels=[4, 8, 16], layers=1)
    context = FrameContext(ContextConfig(kind="features", frame=frame), image).eval()
    obs = torch.randint(0, 256, (2, 5, 64, 64, 3), dtype=torch.uint8)
    expected = context.encoder.maps(normalised(obs[:, index]))
    for side, found in context(obs).maps.items():
        torch.testing.assert_close(found, expected[side])


def test_a_random_frame_is_any_frame() -> None:
    image = ImageConfig(channels=[4, 8, 16], layers=1)
    context = FrameContext(ContextConfig(kind="features", frame="random"), image)
    number = torch.arange(5, dtype=torch.uint8).view(1, 5, 1, 1, 1).expand(200, 5, 2, 2, 3)
    torch.manual_seed(0)
    drawn = context._pick(number)[:, 0, 0, 0].bincount(minlength=5)
    assert int(drawn.min()) >= 20  # 40 of each are expected


class TwoBooks(L.LightningModule):
    """A frozen codebook, filled once and then frozen, beside one that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed, self.free = (Quantizer(QuantizerConfig(codes=8), 2) for _ in range(2))
        self.fixed(torch.randn(64, 2))
        self.fixed.cfg.frozen = True
        self.scale = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch: Tensor) -> Tensor:
        rows = self.scale * batch
        loss: Tensor = self.fixed(rows).commitment + self.free(rows).commitment
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_the_callback_moves_free_codebooks_once_per_update_and_frozen_ones_never(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    module, calls = TwoBooks(), []
    fixed = {name: value.clone() for name, value in module.fixed.named_buffers()}
    update = module.free.update
    module.free.update = lambda *a: calls.append(0) or update(*a)  # type: ignore[method-assign,func-returns-value]
    rows = DataLoader(list(torch.randn(6, 64, 2) + 3.0), batch_size=None)  # type: ignore[arg-type]
    L.Trainer(
        accelerator="cpu", max_epochs=1, accumulate_grad_batches=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=[CodebookUpdate()],
    ).fit(module, rows)  # fmt: skip
    assert len(calls) == 3  # six batches, two to an update
    assert all(torch.equal(value, fixed[name]) for name, value in module.fixed.named_buffers())
    assert float((module.free.codes.mean(0) - 3.0).abs().max()) < 0.5
    assert not module.free.batch_count.any()


def test_half_of_the_erased_rectangles_are_tall_and_every_aspect_is_as_likely() -> None:
    """On a large frame, where whole pixels hardly round the aspect."""
    torch.manual_seed(0)
    image = ImageConfig(channels=[4, 8, 16], layers=1)
    context = FrameContext(ContextConfig(kind="features", erase=1.0), image, augment=True)
    gone = context._augment(torch.ones(4000, 1, 64, 64))[:, 0] == 0
    tall, wide = gone.any(2).sum(1), gone.any(1).sum(1)
    assert torch.equal(gone.sum((1, 2)), tall * wide)  # whole pixels, one rectangle
    unclipped = (tall < 64) & (wide < 64) & (tall * wide > 300)
    aspect = (tall / wide)[unclipped]
    flat, upright = aspect[aspect < 1.0], aspect[aspect > 1.0]
    assert 0.45 < len(upright) / len(aspect) < 0.55
    # Uniform between its ends: the mean lies in the middle (a logarithmic draw: 0.58 and 1.93).
    assert abs(float(flat.mean()) - 0.65) < 0.02
    assert abs(float(upright.mean()) - 2.15) < 0.06
    corner = gone.flatten(1).int().argmax(1)
    top, left = corner // 64, corner % 64
    assert bool((top + tall == 64).any() & (top == 0).any())
    assert bool((left + wide == 64).any() & (left == 0).any())
