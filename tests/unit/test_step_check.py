"""What mapo-gpu-check compares, on the CPU alone: equal steps pass, planted differences do not."""

from __future__ import annotations

import copy

import pytest
import torch
from host_watch import HostWatch

from mapo_lightning.run.gpu_parts import (
    FLOAT32,
    Part,
    _made,
    compared,
    in_trainer,
    replayed,
    rows,
)
from mapo_lightning.run.gpu_report import _times
from mapo_lightning.run.step_check import (
    Case,
    Difference,
    Draws,
    Outcome,
    all_cases,
    configured,
    difference,
    one_step,
    prepared,
    smoothed,
)
from mapo_lightning.run.step_timing import Course, Updates, apart, course, covered
from mapo_lightning.training.base_module import TrainedModule
from mapo_lightning.training.cuda_graph import WARM
from mapo_lightning.types import Batch
from tests.unit.test_cuda_graph import Tape

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
CASES = all_cases()


def test_all_shipped_methods_are_checked() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) == 26
    assert "dreamerv2, pretrain, size=tiny" not in names
    assert {c.stage for c in CASES if c.method == "ivideogpt"} == {
        "tokenizer", "pretrain", "finetune",
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_step_equals_itself_on_other_kernels_and_in_bf16(case: Case) -> None:
    module, batch = prepared(case, 2, 12)
    before = [(x, x.clone()) for x in (*module.parameters(), *module.buffers())]
    found = list(compared(case.name, module, batch, CPU))
    assert [row.ok for row in found] == [True] * 3, found
    draws = Draws()
    with smoothed():
        right = one_step(module, batch, CPU, draws)
        with torch.backends.mkldnn.flags(enabled=False):  # type: ignore[no-untyped-call]
            other = one_step(module, batch, CPU, draws.again())
    assert difference(other, right, draws).within(FLOAT32)
    assert all(torch.equal(now, then) for now, then in before)


def test_what_is_timed_is_the_update_that_the_goal_is_about() -> None:
    """docs/performance.md computes for 16 chunks of 50 frames and dreams of 15 steps."""
    case = Case("contextwm", "finetune", "paper")
    module, batch = _made(case, Part("time", ("contextwm",), "paper", 0, 0))
    assert batch["obs"].shape == (16, 50, 64, 64, 3)
    cfg = configured(case, settled=False)
    assert (cfg.agent.horizon, cfg.world_model.context.dropout) == (15, 0.1)
    assert cfg.world_model.bonus.neighbours == 16
    assert module.world_model.bonus is not None


@pytest.mark.parametrize("method", ["mapo", "prelar", "apv"])
def test_all_that_a_method_has_learns_from_the_first_update(method: str) -> None:
    module, batch = prepared(Case(method, "finetune"), 2, 12)
    assert module.world_model.bonus is not None
    updates = Updates(module, CPU)
    updates(batch)
    for group in updates.optimizer.param_groups:
        assert group["lr"] > 0.0, group["name"]
    before = dict(module.named_parameters())
    moved = {
        name.split(".")[1]
        for name, parameter in updates.module.named_parameters()
        if not torch.equal(parameter, before[name])
    }
    assert {"encoder", "lower", "decoder", "heads", "actor", "critic"} <= moved


def planted(module: TrainedModule, batch: Batch, plant: str) -> Difference:
    """A step with something wrong in it, against one without."""
    wrong = copy.deepcopy(module)
    if plant == "weight":
        wrong.get_parameter("world_model.upper.cell.linear.weight").data.mul_(1.01)
    if plant == "term":
        wrong.world_model.objective.scales["kl_upper"] = 0.0  # type: ignore[union-attr, index, operator]
    if plant == "tf32":
        for parameter in wrong.parameters():  # ten bits of mantissa, as TF32 reads them
            bits = parameter.data.view(torch.int32)
            bits.bitwise_and_(~0x1FFF)
    draws = Draws()
    with smoothed():
        right = one_step(module, batch, CPU, draws)
        return difference(one_step(wrong, batch, CPU, draws.again()), right, draws)


@pytest.mark.parametrize("plant", ["nothing", "weight", "term", "tf32"])
def test_planted_differences_are_found(plant: str) -> None:
    module, batch = prepared(Case("mapo", "finetune"), 2, 12)
    assert planted(module, batch, plant).within(FLOAT32) == (plant == "nothing")


def test_what_is_no_number_or_missing_is_a_difference() -> None:
    right = Outcome({"image": 2.0, "total": 2.0}, {"a": torch.ones(2), "b": torch.ones(2)})
    draws = Draws()
    assert difference(right, right, draws).within(FLOAT32)
    broken = right._replace(losses={"image": float("nan"), "total": 2.0})
    found = difference(broken, right, draws)
    assert (found.term, found.within(FLOAT32)) == ("image", False)
    broken = right._replace(gradients={"a": torch.ones(2), "b": torch.full((2,), torch.nan)})
    found = difference(broken, right, draws)
    assert (found.where, found.within(FLOAT32)) == ("b", False)
    found = difference(right._replace(gradients={"a": torch.ones(2)}), right, draws)
    assert (found.odd, found.within(FLOAT32)) == (("b",), False)


def test_draws_are_handed_on_and_other_choices_counted() -> None:
    draws = Draws()
    bounds = torch.tensor([0.25, 0.5, 0.75])
    with draws:
        first = torch.rand(4)
        chosen = torch.searchsorted(bounds, first)
        best = torch.tensor([3.0, 1.0, 2.0]).topk(2).indices
    with draws.again():
        assert torch.equal(torch.rand(4), first)
        assert torch.equal(torch.searchsorted(bounds - 10.0, first), chosen)
        values, index = torch.tensor([1.0, 3.0, 2.0]).topk(2)
    assert torch.equal(index, best)
    assert values.tolist() == [1.0, 2.0]  # of the numbers at hand, at the places that were chosen
    # All of four fall into the last class now; of the two best of three, one is another.
    assert (draws.made, draws.other) == (6, int((chosen != 3).sum()) + 1)
    with draws.again(), pytest.raises(RuntimeError, match=r"draws randn of shape .* drew rand of"):
        torch.randn(4)
    with draws, pytest.raises(RuntimeError, match="bernoulli_ draws numbers that cannot be handed"):
        torch.ones(3).bernoulli_(0.5)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_captured_updates_are_compared(stage: str) -> None:
    module, batch = prepared(Case("mapo", stage), 2, 12)
    tape = Tape()
    row = replayed("x", module, batch, CPU, tape, updates=8)
    assert row.ok, row
    assert (tape.warmed, tape.replayed) == (WARM, 8 - WARM)
    assert row.found.startswith("recorded")

    class Off(Tape):
        """Noise instead of one update in the middle."""

        def record(self, work):  # type: ignore[no-untyped-def]
            replay = super().record(work)

            def wrong() -> None:
                replay()
                if self.replayed == 2:
                    torch.rand(1)  # one draw too many: all later samples are others

            return wrong

    row = replayed("x", module, batch, CPU, Off(), updates=8)
    assert row.ok is False
    assert row.found.startswith("recorded")
    row = in_trainer("x", module, batch, CPU, Tape())
    assert row.ok, row
    assert row.found.startswith("recorded")
    row = in_trainer("x", module, batch, CPU, Off())
    assert row.ok is False


def test_courses_differ_by_whatever_an_update_says() -> None:
    module, batch = prepared(Case("mapo", "finetune"), 2, 12)
    one = course(Updates(module, CPU), [batch] * 2)
    assert {"train/actor", "grad_norm/actor", "grad_norm/lower"} <= one.found[0].keys()
    assert apart(one, one) == 0.0

    def off(name: str, factor: float) -> Course:
        changed = one.found[1] | {name: one.found[1][name] * factor}
        return one._replace(found=[one.found[0], changed])

    assert apart(off("grad_norm/actor", 1.5), one) > 1e-3
    assert apart(off("train/image", float("nan")), one) == float("inf")


def test_what_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mapo_lightning.run.gpu_parts.CudaRecorder", lambda: Tape(broken=True))
    found = list(rows(Part("capture", ("mapo",), "tiny", 2, 12), CPU))
    assert [row.ok for row in found] == [False]  # the rest of its process is not trusted
    assert "cannot be recorded as a CUDA graph: operation not permitted" in found[0].found
    found = list(rows(Part("capture", ("ivideogpt",), "tiny", 2, 12), CPU))
    assert [row.ok for row in found] == [None] * 3


@pytest.mark.parametrize(
    "case", [c for c in CASES if not c.method.startswith("ivideogpt")], ids=lambda case: case.name
)
def test_no_update_does_what_a_graph_cannot_hold(case: Case) -> None:
    module, batch = prepared(case, 2, 12)
    updates = Updates(module, CPU)
    updates(batch)
    with HostWatch() as watch:
        updates._gradients(batch)
    assert watch.found == []


def test_the_watch_finds_what_no_graph_can_hold() -> None:
    x = torch.arange(3.0)
    with HostWatch() as watch:
        (x + 1.0)[0].mul_(2.0)
    assert watch.found == []
    with HostWatch() as watch:
        x.sum().item()
        x[x > 1.0]
        torch.tensor(2.0)
        torch.ones(3, dtype=torch.long).bincount()
        torch.rand(2, generator=torch.Generator())
    assert [one.partition(":")[0] for one in watch.found] == [
        "_local_scalar_dense", "index", "lift_fresh", "bincount", "rand",
    ]  # fmt: skip


def test_busy_time_counts_overlaps_once() -> None:
    assert covered([(5.0, 9.0), (0.0, 2.0), (1.0, 3.0), (6.0, 7.0)]) == 7.0
    assert covered([]) == 0.0


def test_updates_are_timed_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU in place of a device that ends at once; its profile has no kernels."""
    synced: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: synced.append(1))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2e9)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 3e9)
    monkeypatch.setattr("mapo_lightning.run.gpu_parts.CudaRecorder", Tape)

    def failing(parts: object) -> None:
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr("mapo_lightning.run.step_timing.compile_parts", failing)
    found = list(rows(Part("time", ("dreamerv2",), "tiny", 2, 12), CPU))
    assert [row.ok for row in found] == [True] * 3
    compiled = list(rows(Part("compile", ("dreamerv2",), "tiny", 2, 12), CPU))
    assert [row.ok for row in compiled] == [None, None]
    assert [row.name.partition("tiny, ")[2] for row in found][:3] == [
        "eager, float32", "eager, bf16", "captured, bf16",
    ]  # fmt: skip
    assert found[2].found.startswith("recorded")
    assert compiled[0].found == "RuntimeError: no compiler"
    numbers = found[2].numbers
    assert numbers["milliseconds"] > 0.0
    assert (numbers["kernels"], numbers["busy"], numbers["gigabytes"]) == (0, 0.0, 2.0)
    assert len(synced) == 3 * (1 + 5 + 1)  # after warming up, after each row, in the profile
    assert _times(found)[2].startswith("| dreamerv2, finetune, size=tiny, eager, float32 | ")
