"""One training step on two devices, compared: losses and gradients of every shipped method.

Nothing here is of one kind of device: tests compare the CPU with itself, ``mapo-gpu-check`` the CPU
with a GPU. Two devices draw other random numbers, and a sample that lies on the edge between two
classes may fall to either side. Neither is an error, so what the first step drew and chose is
handed to the second (`Draws`), and how often the second would have chosen otherwise is counted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mapo_lightning.config.compose import compose
from mapo_lightning.models.rssm_world.decoder import CrossAttention
from mapo_lightning.run.build import build_finetune, build_pretrain
from mapo_lightning.run.config import RunConfig, conf_folder
from mapo_lightning.semantics.factory import semantic_dim
from mapo_lightning.training.base_module import TrainedModule
from mapo_lightning.types import Batch

ACTION = 6
"""Width of the actions of fine-tuning: that of walker."""
RANDOM = {"rand", "randn", "rand_like", "randn_like", "randint", "randperm", "multinomial"}
CHOICES = {"searchsorted", "argmin", "topk"}
UNKNOWN = {"bernoulli", "bernoulli_", "native_dropout", "uniform_", "normal_", "random_"}
"""Operations that draw numbers, or choose, and that a second step cannot simply be handed."""
# All that a method has, the bonus of new states among it, and groups that learn from the start.
_SHIPPED = (
    "env=dmc/walker_run",
    "token_world.lpips=false",
    "finetune.hold_actor=0",
    "finetune.hold_lower=0",
)
# Attention draws its dropout inside of one kernel, of each device its own.
_SETTLED = (
    "world_model.context.dropout=0",
    "world_model.lower.transformer.dropout=0",
    "world_model.upper.transformer.dropout=0",
    "token_world.tokenizer.dropout=0",
    "token_world.transformer.dropout=0",
    "world_model.bonus.neighbours=4",  # as many as a small batch has, or they are drawn by lot
)
_TRANSFORMER = ("world_model.lower.kind=transformer", "world_model.upper.kind=transformer")
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "mapo, agent=dreamerv3": ("method=mapo", "agent=dreamerv3"),
    "mapo, transformers": ("method=mapo", *_TRANSFORMER),
}
"""What is checked beside the methods: name -> words of the command line."""


class Case(NamedTuple):
    """One kind of step."""

    method: str
    """A file of conf/method, or a name of `VARIANTS`."""
    stage: str
    """tokenizer, pretrain or finetune."""
    size: str = "tiny"

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.method}, {self.stage}, size={self.size}"


class Bounds(NamedTuple):
    """How far two steps may lie apart."""

    loss: float
    """Of a loss term, relative to it."""
    gradient: float
    """Norm of the difference of all gradients, relative to their norm; a single weight's may be ten
    times as far from its own norm."""
    choices: float
    """Share of samples that would have fallen otherwise."""


class Outcome(NamedTuple):
    """What one step gives."""

    losses: dict[str, float]
    gradients: dict[str, Tensor]
    """On the CPU, float32; parameters without a gradient are not among them."""


class Difference(NamedTuple):
    """How far two steps lie apart; in the units of `Bounds`."""

    loss: float
    term: str
    """The loss that differs most."""
    gradient: float
    weight: float
    """What the weight that differs most shows, in the units of ``gradient``."""
    where: str
    """Name of that weight."""
    choices: float
    odd: tuple[str, ...] = ()
    """Weights, or losses, that only one of the two steps has."""

    def within(self, bounds: Bounds) -> bool:
        """Whether the steps are equal so far; never with numbers that are not finite."""
        return (
            not self.odd
            and self.loss <= bounds.loss
            and self.gradient <= bounds.gradient
            and self.weight <= bounds.gradient
            and self.choices <= bounds.choices
        )

    def line(self) -> str:
        """All of it on one line."""
        odd = f"; only one has {', '.join(self.odd[:3])}" if self.odd else ""
        return (
            f"losses {self.loss:.1e} ({self.term}), gradients {self.gradient:.1e}, worst weight "
            f"{self.weight:.1e} ({self.where}), choices {self.choices:.1e}{odd}"
        )


def all_cases(size: str = "tiny", methods: tuple[str, ...] = ()) -> list[Case]:
    """Every stage of every shipped method and variant, or of some."""
    files = sorted(path.stem for path in (conf_folder() / "method").glob("*.yaml"))
    names = methods or (*files, *VARIANTS)
    return [
        Case(name, stage, size)
        for name in names
        for stage in (*_usual(name).pretraining, "finetune")
    ]


@cache
def configured(case: Case, *, settled: bool = True) -> RunConfig:
    """The settings of a case: as shipped, or such that two devices can be compared."""
    world_model = _usual(case.method).world_model
    missing = [n for n in ("lower", "upper") if getattr(world_model, n) is None]
    words = [w for w in _SETTLED if not any(f".{name}." in w for name in missing)] * settled
    given = [*_words(case.method), f"size={case.size}", *_SHIPPED, *words]
    return compose(given, RunConfig, conf_folder()).config


@cache
def _usual(method: str) -> RunConfig:
    return compose([*_words(method), "token_world.lpips=false"], RunConfig, conf_folder()).config


def _words(method: str) -> tuple[str, ...]:
    return VARIANTS.get(method, (f"method={method}",))


def batch_of(cfg: RunConfig, batch: int, steps: int, action: int | None) -> Batch:
    """Random clips, or chunks of replay where there is an action of that width."""
    side = cfg.world_model.image.size
    first = torch.zeros(batch, steps, dtype=torch.bool)
    first[:, 0] = True
    found = {
        "obs": torch.randint(0, 256, (batch, steps, side, side, 3), dtype=torch.uint8),
        "semantic": torch.randn(batch, steps, semantic_dim(cfg.vlm)),
        "has_semantic": torch.rand(batch, steps) < 0.7,
        "position": torch.arange(steps).expand(batch, steps),
        "is_first": first,
    }
    if action is not None:
        found["action"] = torch.rand(batch, steps, action) * 2 - 1
        found["reward"] = torch.rand(batch, steps)
        found["is_terminal"] = torch.zeros(batch, steps, dtype=torch.bool)
    return found


def prepared(
    case: Case, batch: int, steps: int, *, settled: bool = True
) -> tuple[TrainedModule, Batch]:
    """A module on the CPU, with its codebooks begun, and a batch; the same every time."""
    torch.manual_seed(0)
    cfg = configured(case, settled=settled)
    module: TrainedModule
    if case.stage == "finetune":
        module = build_finetune(cfg, ACTION, None)[0]
    else:
        module = build_pretrain(cfg, case.stage)
    given = batch_of(cfg, batch, steps, ACTION if case.stage == "finetune" else None)
    for part in module.modules():
        if isinstance(part, CrossAttention):
            # A fresh one averages all tokens: the batch norm behind it divides by next to nothing
            # and shows the rounding of the sums. Attend to some tokens more than to others.
            part.in_weight.data.mul_(6.0)
    module.losses(given)
    return module, given


class Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what a step draws and chooses, and hands it to a second one.

    Attributes:
        kept: Name of the operation and its result, on the CPU, in their order.
        made: Choices that the second step made itself.
        other: Those of them that differ from the kept ones.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: list[tuple[str, Tensor]] = []
        self.made = self.other = 0
        self._again: Iterator[tuple[str, Tensor]] | None = None

    def again(self) -> Draws:
        """The same, from now on handing out; to be entered for the second step."""
        self._again, self.made, self.other = iter(self.kept), 0, 0
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry one operation out, or hand out what it gave in the first step.

        Raises:
            RuntimeError: The second step draws in another order, or in a way that is not known.
        """
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name in UNKNOWN:
            raise RuntimeError(f"{name} draws numbers that cannot be handed on: teach Draws to")
        result = func(*args, **kwargs)
        if name not in RANDOM | CHOICES:
            return result
        own = result[1] if name == "topk" else result
        if self._again is None:
            self.kept.append((name, own.detach().cpu()))
            return result
        before, value = next(self._again, ("nothing", own))
        if (before, value.shape) != (name, own.shape):
            raise RuntimeError(
                f"the second step draws {name} of shape {tuple(own.shape)} where the first drew "
                f"{before} of {tuple(value.shape)}: the two do not do the same"
            )
        value = value.to(own.device)
        if name in RANDOM:
            return value
        self.made += own.numel()
        if name == "topk":  # in any order
            self.other += int((own.sort(dim=-1).values != value.sort(dim=-1).values).sum())
            return args[0].gather(kwargs.get("dim", args[2] if len(args) > 2 else -1), value), value
        self.other += int((own != value).sum())
        return value


@contextmanager
def exact_products() -> Iterator[None]:
    """Products and convolutions of float32 in float32: TF32, which has ten bits, is off."""
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept


@contextmanager
def smoothed() -> Iterator[None]:
    """Softplus for ReLU, whose gradient at an input that rounds to either side of zero is open."""
    relu = torch.nn.functional.relu
    torch.nn.functional.relu = lambda input, inplace=False: torch.nn.functional.softplus(input)
    try:
        yield
    finally:
        torch.nn.functional.relu = relu


def one_step(
    module: TrainedModule,
    batch: Batch,
    device: torch.device,
    draws: Draws,
    *,
    bf16: bool = False,
) -> Outcome:
    """Losses and gradients of a copy of ``module`` on a device; the module stays as it is."""
    own = copy.deepcopy(module).to(device).train()
    given = {key: value.to(device) for key, value in batch.items()}
    torch.manual_seed(1)
    autocast = torch.autocast(device.type, torch.bfloat16, bf16, cache_enabled=False)
    with exact_products():
        with draws, autocast:
            total, terms = own.losses(given)
        total.backward()  # type: ignore[no-untyped-call]
    losses = {name: float(term) for name, term in terms.items()} | {"total": float(total.detach())}
    gradients = {n: p.grad.cpu() for n, p in own.named_parameters() if p.grad is not None}
    return Outcome(losses, gradients)


def difference(one: Outcome, other: Outcome, draws: Draws) -> Difference:
    """How far ``one`` lies from ``other``, which is held to be right.

    A loss near zero is compared with a thousandth of the largest one: it adds no more to the sum.
    """
    odd = one.losses.keys() ^ other.losses.keys()
    odd |= one.gradients.keys() ^ other.gradients.keys()
    least = 1e-3 * max(abs(x) for x in other.losses.values())
    losses = {
        name: abs(one.losses[name] - right) / max(abs(right), least)
        for name, right in other.losses.items()
        if name in one.losses
    }
    shared = one.gradients.keys() & other.gradients.keys()
    apart = {n: float((one.gradients[n] - other.gradients[n]).norm()) for n in shared}
    norm = {name: float(other.gradients[name].norm()) for name in shared}
    whole = sum(x * x for x in norm.values()) ** 0.5
    weights = {name: apart[name] / (10 * norm[name] + whole) for name in shared}
    term, where = _worst(losses), _worst(weights)
    return Difference(
        losses[term],
        term,
        sum(x * x for x in apart.values()) ** 0.5 / whole,
        weights[where],
        where,
        draws.other / max(1, draws.made),
        tuple(sorted(odd)),
    )


def _worst(found: Mapping[str, float]) -> str:
    """Name of the largest; of one that is no number, if there is any."""
    return max(found, key=lambda name: (found[name] != found[name], found[name]))
