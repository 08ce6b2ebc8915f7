"""The transformer as latent dynamics: step by step, in one pass, and in dreams the same numbers.

Shapes: B batch, T time, A action, E embed, I imagined, S groups, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from networks import backbone
from test_methods import configured, small, synthetic
from torch import Tensor

from mapo_lightning.models.blocks import mlp
from mapo_lightning.models.distributions import one_hot_sample
from mapo_lightning.models.rssm_world.attention import Memory
from mapo_lightning.models.rssm_world.belief import DreamtBelief
from mapo_lightning.models.rssm_world.rssm import RSSM, RSSMState
from mapo_lightning.models.rssm_world.settings import LatentTransformerConfig, RSSMConfig
from mapo_lightning.models.rssm_world.transformer import TransformerDynamics, TransformerState
from mapo_lightning.models.rssm_world.world_model import RSSMWorldModel
from mapo_lightning.run.build import build_finetune
from mapo_lightning.types import ConfigError

B, T, A, E, I = 2, 9, 3, 8, 6  # noqa: E741
S, K, D = 4, 5, 6
JOIN = 5
"""Entry of the second row at which another episode begins."""


class Given(NamedTuple):
    """What a sequence gives to `TransformerDynamics.observe`."""

    action: Tensor
    embed: Tensor
    first: Tensor
    noise: Tensor

    def steps(self, part: slice, rows: slice = slice(None)) -> Given:
        """Some of the steps, of some of the rows."""
        return Given(*(x[rows, part] for x in self))


def model(window: int = 4, dropout: float = 0.0, **words: object) -> TransformerDynamics:
    torch.manual_seed(0)
    sizes = LatentTransformerConfig(layers=2, width=8, heads=2, window=window, dropout=dropout)
    cfg = RSSMConfig(
        kind="transformer", deter=D, hidden=7, stoch=S, classes=K, transformer=sizes, **words
    )  # type: ignore[arg-type]
    return TransformerDynamics(cfg, A, E, unimix=0.01).double()


def sequence(joined: bool = True) -> Given:
    torch.manual_seed(1)
    first = torch.zeros(B, T, dtype=torch.bool)
    first[0, 0] = True
    first[1, JOIN] = joined
    action, embed = torch.randn(B, T, A).double(), torch.randn(B, T, E).double()
    return Given(action, embed, first, torch.rand(B, T, S))


def followed(
    dynamics: TransformerDynamics, given: Given, start: TransformerState | None = None
) -> tuple[TransformerState, Tensor]:
    return dynamics.observe(given.action, given.embed, given.first, start, given.noise)


def by_loops(
    dynamics: TransformerDynamics, actions: Tensor, samples: Tensor, window: int
) -> Tensor:
    """Deterministic part of one episode's last step, without cache, mask, batch or rotation tables.

    Args:
        dynamics: Weights.
        actions: That led to each step, (L, A).
        samples: Flat sample before each step, (L, S*K).
        window: Steps that a step may look at.
    """
    x = dynamics.mix(dynamics.inp(torch.cat([samples, actions], -1)))
    for block in dynamics.attention.blocks:
        query, key, value = (
            part.view(len(x), 2, 4) for part in block.ask(block.norm_attention(x)).chunk(3, -1)
        )
        rows = []
        for t in range(len(x)):
            heads = []
            for h in range(2):
                past = range(max(0, t - window + 1), t + 1)
                score = torch.stack([aligned(query[t, h], key[s, h], t - s) for s in past])
                weight = (score / 4**0.5).softmax(0)
                heads.append(sum(w * value[s, h] for w, s in zip(weight, past, strict=True)))
            rows.append(torch.cat(heads))  # type: ignore[arg-type]
        x = x + block.answer(torch.stack(rows))
        x = x + block.mlp(block.norm_mlp(x))
    hidden: Tensor = dynamics.out(dynamics.attention.norm(x))
    return hidden[-1]


def aligned(query: Tensor, key: Tensor, lag: int) -> Tensor:
    """Product of two heads of width 4 that stand ``lag`` steps apart, by complex numbers."""
    rate = torch.tensor([1.0, 1e4**-0.5], dtype=torch.float64)
    turn = torch.polar(torch.ones(2).double(), lag * rate)
    q, k = torch.complex(query[:2], query[2:]), torch.complex(key[:2], key[2:])
    return (q * turn * k.conj()).real.sum()


def test_a_pass_equals_attention_written_as_loops() -> None:
    dynamics, given = model(), sequence()
    post, prior = followed(dynamics, given)
    logits = dynamics.posterior(given.embed).view(B, T, S, K)
    torch.testing.assert_close(post.logits, logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        post.stoch, one_hot_sample(dynamics.mixed(logits), given.noise).double()
    )
    for b, t in ((0, 0), (0, 8), (1, 2), (1, JOIN - 1), (1, JOIN), (1, 8)):
        begin = JOIN if b == 1 and t >= JOIN else 0
        actions = given.action[b, begin : t + 1].clone()
        if given.first[b, begin]:
            actions[0] = 0.0
        samples = torch.cat([torch.zeros(1, S * K), post.stoch[b, begin:t].flatten(1)])
        expected = by_loops(dynamics, actions, samples.double(), window=4)
        torch.testing.assert_close(post.deter[b, t], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(prior.flatten(2), dynamics.prior(post.deter), rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [1, 2, 4, 20])
@pytest.mark.parametrize("piece", [1, 3])
def test_steps_with_a_cache_equal_one_pass(window: int, piece: int) -> None:
    dynamics, given = model(window), sequence()
    whole, prior = followed(dynamics, given)
    state: TransformerState | None = None
    for begin in range(0, T, piece):
        part = slice(begin, begin + piece)
        some, logits = followed(dynamics, given.steps(part), state)
        torch.testing.assert_close(some.feat, whole.feat[:, part], rtol=0, atol=1e-9)
        torch.testing.assert_close(logits, prior[:, part], rtol=0, atol=1e-9)
        state = some.at(piece - 1)
        assert state.memory.tokens.shape[1] <= window - 1 + piece  # what is kept is bounded


def test_later_frames_and_actions_move_nothing_before_them() -> None:
    dynamics, given = model(window=20), sequence()
    found, prior = followed(dynamics, given)
    for t in (1, 4, 8):
        for name in ("action", "embed"):
            changed = getattr(given, name).clone()
            changed[:, t] += 1.0
            other, logits = followed(dynamics, given._replace(**{name: changed}))
            assert torch.equal(other.feat[:, :t], found.feat[:, :t])
            assert torch.equal(logits[:, :t], prior[:, :t])
            # An action shows at once, a frame in the posterior of its step.
            moved = other.deter if name == "action" else other.logits.flatten(2)
            still = found.deter if name == "action" else found.logits.flatten(2)
            assert not torch.equal(moved[:, t], still[:, t])


def test_an_episode_after_the_join_is_the_one_observed_alone() -> None:
    dynamics, given = model(window=20), sequence()
    whole, prior = followed(dynamics, given)
    for part in (slice(0, JOIN), slice(JOIN, T)):
        alone, logits = followed(dynamics, given.steps(part, slice(1, 2)))
        torch.testing.assert_close(whole.feat[1:, part], alone.feat, rtol=0, atol=1e-9)
        torch.testing.assert_close(prior[1:, part], logits, rtol=0, atol=1e-9)
    other = given._replace(embed=given.embed.clone(), action=given.action.clone())
    other.embed[1, :JOIN] += 1.0
    other.action[1, : JOIN + 1] += 1.0  # the action of the join led there from another episode
    changed, _ = followed(dynamics, other)
    assert torch.equal(changed.feat[1, JOIN:], whole.feat[1, JOIN:])
    assert not torch.equal(changed.feat[1, :JOIN], whole.feat[1, :JOIN])


def test_a_window_is_what_a_layer_looks_at() -> None:
    """With one layer a step sees the window; what is older does not reach it."""
    torch.manual_seed(0)
    sizes = LatentTransformerConfig(layers=1, width=8, heads=2, window=3, dropout=0.0)
    cfg = RSSMConfig(kind="transformer", deter=D, hidden=7, stoch=S, classes=K, transformer=sizes)
    dynamics, given = TransformerDynamics(cfg, A, E).double(), sequence(joined=False)
    found, _ = followed(dynamics, given)
    action = given.action.clone()
    action[:, 3] += 1.0
    other, _ = followed(dynamics, given._replace(action=action))
    moved = (other.deter != found.deter).any(dim=(0, 2))
    assert moved.tolist() == [False] * 3 + [True] * 3 + [False] * 3


def uncached(
    dynamics: TransformerDynamics,
    given: Given,
    policy: Callable[[Tensor], Tensor],
    noise: Tensor,
) -> Tensor:
    """Dreams from every state, (I + 1, B*T, F): each step a pass over the whole past again."""
    post, _ = followed(dynamics, given)
    feats = [post.feat.flatten(0, 1).detach()]
    actions: list[Tensor] = []
    for i in range(len(noise)):
        actions.append(policy(feats[-1]))
        deter = []
        for row in range(B * T):
            b, t = divmod(row, T)
            begin = JOIN if b == 1 and t >= JOIN else 0
            led = given.action[b, begin : t + 1] * (~given.first[b, begin : t + 1])[:, None]
            dreamt = torch.stack([action[row] for action in actions])
            before = post.stoch[b, begin : t + 1].flatten(1).detach()
            after = torch.stack([feat[row, : S * K] for feat in feats[1:]]) if i else before[:0]
            samples = torch.cat([torch.zeros(1, S * K), before, after])
            x = dynamics._token(torch.cat([led, dreamt])[None], samples[None])
            nothing = x.new_zeros(1, 0, 2, 2, 8)
            places = torch.zeros(1, x.shape[1], dtype=torch.long)
            hidden, _ = dynamics.attention(x, nothing, places)
            deter.append(dynamics.out(hidden[0, -1]))
        logits = dynamics.prior(torch.stack(deter)).view(-1, S, K)
        sample = one_hot_sample(dynamics.mixed(logits), noise[i])
        feats.append(RSSMState.of(torch.stack(deter), sample, logits).feat)
    return torch.stack(feats)


@pytest.mark.parametrize("window", [1, 2, 4, 20])
def test_a_cached_dream_and_its_gradients_equal_passes_over_the_whole_past(window: int) -> None:
    dynamics, given = model(window).requires_grad_(False), sequence()
    torch.manual_seed(2)
    network = mlp(D + S * K, 9, 1, A).double()
    start, found = followed(dynamics, given)[0].flatten().detach(), []

    def policy(feat: Tensor) -> Tensor:
        action: Tensor = network(feat).tanh()
        return action

    for cached in (True, False):
        torch.manual_seed(3)
        if cached:
            dream = dynamics.imagine(start, policy, I)
        else:
            dream = uncached(dynamics, given, policy, torch.rand(I, B * T, S))
        weight = torch.linspace(-1, 1, dream.numel()).view(dream.shape).double()
        loss = (dream.tanh() * weight).sum()
        found.append((dream, *torch.autograd.grad(loss, list(network.parameters()))))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-9)
    for mine, autograd in zip(found[0][1:], found[1][1:], strict=True):
        assert bool((autograd != 0).any())
        # Straight-through samples pass their gradient in float32.
        torch.testing.assert_close(mine, autograd, rtol=1e-5, atol=1e-6)


def test_a_dream_of_later_steps_does_not_depend_on_how_many_come() -> None:
    dynamics, given = model(), sequence()
    start = followed(dynamics, given)[0].at(6)
    actions = torch.randn(I, B, A).double()
    found = []
    for steps in (2, I):
        torch.manual_seed(3)
        it = iter(actions)
        found.append(dynamics.imagine(start, lambda _, it=it: next(it), steps))
    torch.testing.assert_close(found[0], found[1][:3], rtol=0, atol=1e-9)


def test_one_step_is_the_first_of_a_dream_and_equals_the_prior_of_the_next_frame() -> None:
    dynamics, given = model(), sequence(joined=False)
    post, prior = followed(dynamics, given)
    before = post.until(-1).flatten()
    noise = torch.rand(len(before.feat), S)
    step = dynamics.imagine_step(before, given.action[:, 1:].flatten(0, 1), noise)
    torch.testing.assert_close(step.logits, prior[:, 1:].flatten(0, 1), rtol=0, atol=1e-9)
    torch.testing.assert_close(step.deter, post.deter[:, 1:].flatten(0, 1), rtol=0, atol=1e-9)


def test_beliefs_of_a_sequence_share_its_tokens() -> None:
    """To flatten (B, T) states must not copy T pasts of T steps."""
    dynamics, given = model(), sequence()
    post, _ = followed(dynamics, given)
    tokens = post.memory.tokens
    assert tokens.shape == (B, T, 2, 2, 8)
    many = post.detach().flatten().repeat(3)
    assert many.memory.tokens.data_ptr() == tokens.data_ptr()
    assert not many.memory.tokens.requires_grad
    assert many.feat.shape == (3 * B * T, D + S * K)
    assert many.memory.end.tolist() == [t + 1 for _ in range(B) for t in range(T) for _ in range(3)]
    joined = [JOIN if b and t >= JOIN else 0 for b in range(B) for t in range(T) for _ in range(3)]
    assert many.memory.begin.tolist() == joined


def test_repeated_rows_dream_and_follow_as_they_would_alone() -> None:
    dynamics, given = model(), sequence()
    state = followed(dynamics, given.steps(slice(7)))[0].at(6)
    one, _ = followed(dynamics, given.steps(slice(7, T)), state)
    twice = Given(*(x[:, 7:].repeat_interleave(2, 0) for x in given))
    two, _ = followed(dynamics, twice, state.repeat(2))
    torch.testing.assert_close(two.feat, one.feat.repeat_interleave(2, 0), rtol=0, atol=1e-9)
    action, noise = torch.randn(B, A).double(), torch.rand(B, S)
    alone = dynamics.imagine_step(state, action, noise)
    both = (x.repeat_interleave(2, 0) for x in (action, noise))
    many = dynamics.imagine_step(state.repeat(2), *both)
    torch.testing.assert_close(many.feat, alone.feat.repeat_interleave(2, 0), rtol=0, atol=1e-9)


def test_the_newest_tokens_of_rows_and_where_their_episode_begins() -> None:
    tokens = torch.arange(10.0).view(2, 5, 1, 1, 1).expand(2, 5, 1, 2, 1)
    memory = Memory(tokens, torch.tensor([0, 3, 0, 1]), torch.tensor([2, 5, 5, 1]))
    kept, begin = memory.last(3)
    assert kept[..., 0, 0, 0].tolist()[1:3] == [[2.0, 3.0, 4.0], [7.0, 8.0, 9.0]]
    assert kept[0, 1:, 0, 0, 0].tolist() == [0.0, 1.0]
    assert begin.tolist() == [1, 1, 0, 3]  # two tokens, two, three and none of three


def test_dropout_is_in_training_on_sequences_only() -> None:
    dynamics, given = model(dropout=0.5), sequence()
    exact = followed(dynamics.eval(), given)[0]
    assert torch.equal(followed(dynamics, given)[0].deter, exact.deter)
    dynamics.train()
    torch.manual_seed(0)
    assert not torch.equal(followed(dynamics, given)[0].deter, exact.deter)
    actions = torch.randn(I, B, A).double()
    dreams = []
    for _ in range(2):
        it = iter(actions)
        torch.manual_seed(1)
        dreams.append(dynamics.imagine(exact.at(6), lambda _, it=it: next(it), I))
    assert torch.equal(*dreams)
    assert all(part.training for part in dynamics.dropouts)


def test_acting_has_no_dropout_while_the_model_trains() -> None:
    cfg = small("mapo", "tiny", "env=toy", *backbone("transformer", "mapo"))
    torch.manual_seed(0)
    world = build_finetune(cfg, 2, None)[0].world_model
    assert isinstance(world, RSSMWorldModel)
    batch, found = synthetic(cfg, 2), {}
    for name, training in (("eval", False), ("acting", True), ("train", True)):
        world.train(training)
        torch.manual_seed(1)
        with world.evaluating() if name == "acting" else nullcontext(), torch.no_grad():
            belief = world.observe(batch)
        assert belief.lower is not None
        assert belief.upper is not None
        found[name] = belief.lower.deter, belief.upper.deter
    for i in range(2):
        assert torch.equal(found["acting"][i], found["eval"][i])
        assert not torch.equal(found["train"][i], found["eval"][i])


def test_products_run_in_bfloat16_under_autocast_and_features_stay_float32() -> None:
    dynamics, given = model().float(), sequence()
    given = given._replace(action=given.action.float(), embed=given.embed.float())
    exact, _ = followed(dynamics, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        post, _ = followed(dynamics, given)
        torch.manual_seed(3)
        dream = dynamics.imagine(post.at(6), lambda feat: feat[:, :A], I)
    kept = post.feat, post.logits, post.memory.tokens, dream
    assert {x.dtype for x in kept} == {torch.float32}
    assert not torch.equal(post.deter[:, 0], exact.deter[:, 0])
    torch.testing.assert_close(post.deter[:, 0], exact.deter[:, 0], rtol=0.05, atol=0.05)


def test_short_actions_equal_actions_padded_with_zeros() -> None:
    dynamics, given = model(action_slot=10), sequence()
    padded = torch.nn.functional.pad(given.action, (0, 7))
    short, _ = followed(dynamics, given)
    torch.testing.assert_close(
        short.feat, followed(dynamics, given._replace(action=padded))[0].feat
    )
    with pytest.raises(ConfigError, match="3 numbers but action_slot leaves room for 2"):
        model(action_slot=2)


def test_a_dream_needs_something_to_look_back_at() -> None:
    start = DreamtBelief(torch.zeros(2, D + S * K))
    with pytest.raises(TypeError, match=r"TransformerState, .* got DreamtBelief: start from"):
        model().imagine(start, lambda _: torch.zeros(2, A), 1)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["world_model.upper.transformer.window=51"],
         r"world_model\.upper\.transformer\.window must not exceed 50, .*chunk_length=50.* got 51"),
        (["finetune.chunk_length=20", "world_model.upper.transformer.window=25"],
         r"world_model\.upper\.transformer\.window must not exceed 20"),
        (["world_model.lower.transformer.window=51"],
         r"world_model\.lower\.transformer\.window must not exceed 50, .*clip_length=25.* got 51"),
        (["world_model.upper.transformer.heads=7"],
         r"world_model\.upper\.transformer\.heads must divide width into even parts, got 7"),
        (["world_model.lower.transformer.width=24"],
         r"world_model\.lower\.transformer\.heads .* 8 heads for a width of 24; .* multiple of 16"),
        (["world_model.lower.transformer.dropout=1"],
         r"world_model\.lower\.transformer\.dropout must lie in \[0, 1\), got 1"),
        (["world_model.lower.transformer.layers=0"],
         r"world_model\.lower\.transformer\.layers must be at least 1, got 0"),
        (["world_model.upper.kind=lstm"], r"'world_model\.upper\.kind' must be one of gru, transf"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_one_sentence(words: list[str], sentence: str) -> None:
    kinds = [f"world_model.{name}.kind=transformer" for name in ("lower", "upper")]
    with pytest.raises(ConfigError, match=sentence) as caught:
        configured("size=paper", "env=dmc/walker_run", *kinds, *words)
    assert "\n" not in str(caught.value)


def test_windows_follow_the_sequences_that_are_learned_from() -> None:
    for words, lower, upper in (([], 20, 16), (["size=paper", "env=dmc/walker_run"], 25, 50)):
        cfg = configured(*words, "env=toy" if not words else "seed=0").world_model
        assert cfg.lower is not None
        assert cfg.upper is not None
        assert (cfg.lower.transformer.window, cfg.upper.transformer.window) == (lower, upper)
    # A GRU has no window that could be too long.
    configured("env=toy", "world_model.upper.transformer.window=999")


def test_a_transformer_is_as_large_as_the_gru_that_it_replaces() -> None:
    sizes = RSSMConfig(kind="transformer")
    with torch.device("meta"):
        found = [
            sum(p.numel() for p in kind(sizes, 64, 3072).parameters())
            for kind in (RSSM, TransformerDynamics)
        ]
    assert found == [14_759_936, 13_947_904]
