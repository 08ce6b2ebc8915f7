"""One training step written plainly, in the style of the published PyTorch code: the yardstick.

Every step of a sequence is computed on its own, with distribution objects; the scene is repeated
for every frame; imagination computes the world model's gradients and throws them away; the policy
is asked a second time for its entropy; Adam loops over parameters. Nothing is hoisted or fused.

It reads the weights of an `RSSMWorldModel` and a `DreamerAgent` and computes the same losses from
the same random numbers, so that each of the two implementations checks the other
(tests/unit/test_reference_step.py) and anyone can measure their ratio (benchmarks/speed.py).
Covered: the residual networks, with and without lower dynamics, context and codebook, bonus.

Shapes: B batch, T time, S groups, K classes, N = B*T, A action.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributions as td
from torch.nn import functional as F

from mapo_lightning.models.agents.dreamer import DreamerAgent
from mapo_lightning.models.rssm_world.decoder import CrossAttention, ResNetDecoder
from mapo_lightning.models.rssm_world.quantizer import Quantizer
from mapo_lightning.models.rssm_world.rssm import RSSM
from mapo_lightning.models.rssm_world.world_model import RSSMWorldModel

State = dict[str, Tensor]
Batch = dict[str, Tensor]


class TruncatedNormal(td.Distribution):
    """Normal cut to [-1, 1], as an object."""

    arg_constraints = {"loc": td.constraints.real, "scale": td.constraints.positive}  # noqa: RUF012
    support = td.constraints.real
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = loc, scale
        super().__init__(loc.shape[:-1], loc.shape[-1:])
        self.low, self.high = (-1.0 - loc) / scale, (1.0 - loc) / scale
        self.cdf_low = 0.5 * (1 + torch.erf(self.low / math.sqrt(2)))
        self.mass = (0.5 * (1 + torch.erf(self.high / math.sqrt(2))) - self.cdf_low).clamp(1e-8)

    def rsample(self, sample_shape: Any = (), uniform: Tensor | None = None) -> Tensor:
        """Draw through the inverse CDF."""
        u = torch.rand_like(self.loc) if uniform is None else uniform
        quantile = (self.cdf_low + u * self.mass).clamp(1e-6, 1 - 1e-6)
        x = self.loc + self.scale * math.sqrt(2) * torch.erfinv(2 * quantile - 1)
        return x + (x.clamp(-1 + 1e-6, 1 - 1e-6) - x).detach()

    def entropy(self) -> Tensor:
        """Nats, summed over the actions."""
        density = [torch.exp(-0.5 * x**2) / math.sqrt(2 * math.pi) for x in (self.low, self.high)]
        edge = (self.low * density[0] - self.high * density[1]) / (2 * self.mass)
        constant = 0.5 * math.log(2 * math.pi * math.e)
        return (constant + self.scale.log() + self.mass.log() + edge).sum(-1)


def one_hot(logits: Tensor) -> td.Independent:
    return td.Independent(td.OneHotCategoricalStraightThrough(logits=logits.float()), 1)


def draw(dist: td.Independent, uniform: Tensor | None) -> Tensor:
    """A straight-through sample; with given noise the class that its inverse CDF picks."""
    if uniform is None:
        return dist.rsample()
    probs = dist.base_dist.probs
    index = (probs.cumsum(-1) <= uniform[..., None]).sum(-1).clamp(max=probs.shape[-1] - 1)
    return F.one_hot(index, probs.shape[-1]) + (probs - probs.detach())


def initial(model: RSSM, batch: int) -> State:
    stoch = torch.zeros(batch, model.cfg.stoch, model.cfg.classes)
    return {"stoch": stoch, "deter": torch.zeros(batch, model.cfg.deter), "logits": stoch}


def feat(state: State) -> Tensor:
    return torch.cat([state["stoch"].flatten(-2), state["deter"]], -1)


def prior_step(model: RSSM, state: State, action: Tensor, uniform: Tensor | None) -> State:
    cfg = model.cfg
    room = torch.zeros(len(action), model.action_slot - action.shape[-1])
    x = model.inp(torch.cat([state["stoch"].flatten(1), action, room], -1))
    gates = model.cell.linear(torch.cat([F.elu(x), state["deter"]], -1))
    reset, candidate, update = model.cell.norm(gates).chunk(3, -1)
    candidate = torch.tanh(torch.sigmoid(reset) * candidate)
    update = torch.sigmoid(update - 1)
    deter = update * candidate + (1 - update) * state["deter"]
    logits = model.prior(deter).view(-1, cfg.stoch, cfg.classes)
    return {"stoch": draw(one_hot(logits), uniform), "deter": deter, "logits": logits}


def observe(
    model: RSSM, action: Tensor, embed: Tensor, first: Tensor, exact: bool
) -> tuple[State, State]:
    """Posterior and prior states, (B, T, ...), one step after the other."""
    batch, steps = first.shape
    cfg, state = model.cfg, initial(model, batch)
    noise = torch.rand(batch, steps, cfg.stoch) if exact else None
    posts, priors = [], []
    for t in range(steps):
        keep = (~first[:, t]).float()[:, None]
        state = {"stoch": state["stoch"] * keep[..., None], "deter": state["deter"] * keep}
        prior = prior_step(model, state, action[:, t] * keep, noise[:, t] if exact else None)
        logits = model.posterior(torch.cat([prior["deter"], embed[:, t]], -1))
        logits = logits.view(-1, cfg.stoch, cfg.classes)
        stoch = draw(one_hot(logits), noise[:, t] if exact else None)
        state = {"stoch": stoch, "deter": prior["deter"], "logits": logits}
        posts.append(state)
        priors.append(prior)
    return tuple(  # type: ignore[return-value]
        {key: torch.stack([s[key] for s in states], 1) for key in states[0]}
        for states in (posts, priors)
    )


def kl(model: RSSM, post: State, prior: State, free: float) -> Tensor:
    def mean_of(p: Tensor, q: Tensor) -> Tensor:
        value = td.kl_divergence(one_hot(p), one_hot(q)).mean()
        return torch.maximum(value, torch.tensor(float(free)))

    balance = model.cfg.kl_balance
    teach = mean_of(post["logits"].detach(), prior["logits"])
    return balance * teach + (1 - balance) * mean_of(post["logits"], prior["logits"].detach())


def attend(layer: CrossAttention, x: Tensor, scene: Tensor) -> Tensor:
    """The scene is repeated for every frame, and every copy is projected."""
    count, width = x.shape[:2]
    scene = scene.repeat_interleave(count // len(scene), 0)
    query = x.flatten(2).transpose(1, 2) + layer.query_position
    key = scene.flatten(2).transpose(1, 2) + layer.key_position
    chosen = torch.rand(count, key.shape[1]).topk(layer.kept, 1).indices
    key = torch.gather(key, 1, chosen[..., None].expand(-1, -1, width)).transpose(0, 1)
    out, _ = F.multi_head_attention_forward(
        query.transpose(0, 1),
        key,
        key,
        width,
        layer.heads,
        layer.in_weight,
        layer.in_bias,
        None,
        None,
        False,
        layer.dropout,
        layer.out.weight,
        layer.out.bias,
        training=layer.training,
    )
    out = F.dropout(out, layer.dropout, layer.training).permute(1, 2, 0).reshape(x.shape)
    return F.relu(x + layer.norm(out))


def decode(decoder: ResNetDecoder, features: Tensor, scene: dict[int, Tensor]) -> Tensor:
    x = decoder.convin(features).view(len(features), -1, decoder.side, decoder.side)
    for stage in decoder.stages:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        side = x.shape[-1]
        attended = attend(decoder.attention[str(side)], x, scene[side]) if side in scene else None
        for i, layer in enumerate(stage):  # type: ignore[arg-type]
            x = layer(x, attended) if i == 0 else layer(x)
    return decoder.convout(x)


def quantize(book: Quantizer, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes with straight-through gradient, and the commitment term."""
    distance = ((rows.detach()[:, None] - book.codes[None]) ** 2).sum(-1)
    index = distance.argmin(1)
    code = book.codes[index]
    error = (rows - code) ** 2
    with torch.no_grad():
        chosen = F.one_hot(index, len(book.codes)).float()
        book.batch_count += chosen.sum(0)
        book.batch_sum += chosen.T @ rows
        picked = torch.multinomial(error.sum(1) + 1e-12, len(book.codes), True)
        book.candidates.copy_(rows[picked])
    return rows + (code - rows).detach(), error.mean()


class ReferenceStep:
    """Plain losses and updates on the weights that it is given.

    Args:
        world_model: Read, and trained by `step`.
        agent: The same; None for pre-training.
        exact: Draw with the random numbers of the fast step, to compare the two.
    """

    def __init__(
        self, world_model: RSSMWorldModel, agent: DreamerAgent | None, exact: bool = False
    ) -> None:
        self.world_model, self.agent, self.exact = world_model, agent, exact
        parts: dict[str, nn.Module] = {"model": world_model}
        if agent is not None:
            parts |= {"actor": agent.actor, "critic": agent.critic}
        self.optimizers = {
            name: torch.optim.Adam(
                part.parameters(), 3e-4, eps=1e-5, weight_decay=1e-6, foreach=False, fused=False
            )
            for name, part in parts.items()
        }

    def context(self, obs: Tensor) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
        """Maps of one frame per clip, and the codebook's term."""
        part = self.world_model.context
        if part is None:
            return {}, {}
        tau = torch.randint(obs.shape[1], (len(obs),))
        frame = obs[torch.arange(len(obs)), tau].permute(0, 3, 1, 2).contiguous().float() / 255
        maps = part.encoder.maps(frame - 0.5)
        maps, terms = {side: maps[side] for side in (16, 8)}, {}
        for side in maps if part.quantizers else ():
            rows = maps[side].permute(0, 2, 3, 1).flatten(0, 2)
            code, error = quantize(part.quantizers[str(side)], rows)  # type: ignore[arg-type]
            shape = (len(obs), side, side, -1)
            maps[side] = code.view(shape).permute(0, 3, 1, 2).contiguous()
            terms["commitment"] = terms.get("commitment", torch.zeros(())) + error
        return maps, terms

    def bonus(self, feat_BTF: Tensor) -> Tensor:
        """Distances by broadcasting, neighbours by sorting."""
        module = self.world_model.bonus
        assert module is not None
        cfg = module.cfg
        window = torch.stack(
            [feat_BTF[:, t : t + cfg.window].mean(1) for t in range(feat_BTF.shape[1] - 4)], 1
        )
        query = (window @ module.projection).flatten(0, 1)
        module.queue.copy_(torch.cat([query, module.queue])[: cfg.queue])
        module.filled.add_(len(query)).clamp_(max=cfg.queue)
        known = module.queue[: int(module.filled)]
        distance = (query[:, None] - known[None]).norm(dim=-1)
        value = distance.topk(min(cfg.neighbours, len(query)), largest=False).values.mean(-1)
        module.scale.lerp_(value.abs().mean(), 1 - cfg.momentum)
        return value.view(window.shape[:2]) / (module.scale + 1e-8)

    def world_model_loss(self, batch: Batch) -> tuple[Tensor, State]:
        """Eq. (2) or (3), and the posterior states of the control dynamics."""
        m = self.world_model
        obs, first = batch["obs"], batch["is_first"]
        frames = obs.permute(0, 1, 4, 2, 3).contiguous().float() / 255 - 0.5
        embed = m.encoder(frames.flatten(0, 1)).view(*first.shape, -1)
        terms: dict[str, Tensor] = {}
        free, seen, post, lower = m.objective.free_nats, embed, {}, None
        if m.lower is not None and m.source is not None:
            lower, prior = observe(m.lower, m.source(batch).action, embed, first, self.exact)
            terms["kl_lower"], post = kl(m.lower, lower, prior, free), lower
            seen = torch.cat([embed, feat(lower)], -1) if m.cfg.concat_embed else feat(lower)
        if m.upper is not None:
            post, prior = observe(m.upper, batch["action"], seen, first, self.exact)
            terms["kl_upper"] = kl(m.upper, post, prior, free)
        scene, more = self.context(obs)
        terms |= more
        mean = decode(m.decoder, feat(post).flatten(0, 1), scene)
        terms["image"] = 0.5 * ((frames.flatten(0, 1) - mean) ** 2).sum((1, 2, 3)).mean()
        if self.agent is not None:
            reward = target = batch["reward"]
            if m.bonus is not None:
                extra = self.bonus((feat(lower) if lower and m.upper else embed).detach())
                target = reward[:, : extra.shape[1]] + m.cfg.bonus.beta * extra
            guess = m.heads.read("reward", feat(post)[:, : target.shape[1]])
            terms["reward"] = 0.5 * ((guess - target) ** 2).mean()
            if m.cfg.aux_reward:
                terms["aux_reward"] = (
                    0.5 * ((m.heads.read("aux_reward", feat(post)) - reward) ** 2).mean()
                )
        scales = m.objective.weights
        return sum((scales[k] * terms[k] for k in terms), torch.zeros(())), post

    def behaviour_losses(self, post: State) -> tuple[Tensor, Tensor]:
        """Eq. (5) and (4): the actor's loss and the critic's."""
        m, agent = self.world_model, self.agent
        assert agent is not None
        cfg, dynamics = agent.cfg, m.upper or m.lower
        assert dynamics is not None
        state = {key: x.detach().flatten(0, 1) for key, x in post.items()}
        rows = len(state["deter"])
        drawn = torch.rand(cfg.horizon, rows, agent.action_dim) if self.exact else None
        noise = torch.rand(cfg.horizon, rows, dynamics.cfg.stoch) if self.exact else None
        states = [state]
        for i in range(cfg.horizon):
            uniform = None if drawn is None else drawn[i]
            action = self.policy(feat(state).detach()).rsample(uniform=uniform)
            driven = action if m.upper or not m.source else m.source({"action": action}).action
            state = prior_step(dynamics, state, driven, None if noise is None else noise[i])
            states.append(state)
        features = torch.stack([feat(s) for s in states])
        reward, value = m.heads.read("reward", features), agent.target(features).squeeze(-1)
        discount = torch.full_like(reward, cfg.discount)
        targets, last = [], value[-1]
        for i in reversed(range(cfg.horizon)):
            onward = (1 - cfg.lam) * value[i + 1] + cfg.lam * last
            last = reward[i] + discount[i] * onward
            targets.insert(0, last)
        target = torch.stack(targets)
        weight = torch.cumprod(torch.cat([torch.ones_like(discount[:1]), discount[:-1]]), 0)
        entropy = self.policy(features[:-2].detach()).entropy()
        actor = -(weight[:-2].detach() * (target[1:] + cfg.entropy * entropy)).mean()
        guess = agent.critic(features[:-1].detach()).squeeze(-1)
        critic = (weight[:-1].detach() * 0.5 * (guess - target.detach()) ** 2).mean()
        return actor, critic

    def policy(self, features: Tensor) -> TruncatedNormal:
        """What to do in states with these features."""
        assert self.agent is not None
        mean, std = self.agent.actor(features).float().chunk(2, -1)
        return TruncatedNormal(torch.tanh(mean), 2 * torch.sigmoid(std / 2) + 0.1)

    def step(self, batch: Batch) -> None:
        """Update the world model, then the actor, then the critic."""
        total, post = self.world_model_loss(batch)
        self._update("model", total)
        if self.agent is not None:
            actor, critic = self.behaviour_losses(post)
            self._update("actor", actor)
            self._update("critic", critic)

    def _update(self, name: str, loss: Tensor) -> None:
        optimizer = self.optimizers[name]
        optimizer.zero_grad()
        loss.backward()
        params = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(params, 100.0, foreach=False)
        optimizer.step()
        loss.item()  # logged
