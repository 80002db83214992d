"""Stage 2, Draft-OPD: trace -> replay -> target feedback on accepted and rejected proposals."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from draft_opd.decoding.sampling import Sampling
from draft_opd.decoding.speculative import speculate
from draft_opd.drafters.base import Drafter
from draft_opd.rollout.hindsight import text_chooser, walk
from draft_opd.rollout.occupancy import occupancy, text_acceptance
from draft_opd.rollout.trace import Round, by_accepted, tau
from draft_opd.rollout.trajectory import Trajectory
from draft_opd.target import Target
from draft_opd.training.blocks import Blocks, pack, replay, replay_hidden
from draft_opd.training.config import Opd
from draft_opd.training.data import Batch
from draft_opd.training.objectives import needs_branches, needs_states, objective_loss
from draft_opd.training.sft import random_anchors
from draft_opd.training.stopwatch import Stopwatch

Traces = list[list[Round]]


def hindsight_rollout(
    target: Target,
    drafter: Drafter,
    batch: Batch,
    length: int,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> Traces:
    """Traces of the current drafter on stored text."""
    with torch.no_grad():
        context = drafter.context(target, batch.ids, batch.features)
        return walk(
            target, drafter, batch.trajectories, batch.ids, context, length, batch.hidden,
            sampling, seed,
        )  # fmt: skip


def live_rollout(
    target: Target,
    drafter: Drafter,
    trajectories: list[Trajectory],
    length: int,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> tuple[list[Trajectory], Traces]:
    """Decodes the prompts again with the current drafter, each to its stored response's length."""
    sampling = sampling or Sampling()
    made = speculate(
        target,
        drafter,
        [t.prompt_ids for t in trajectories],
        max_new_tokens=[len(t.response_ids) for t in trajectories],
        draft_length=length,
        sampling=sampling,
        seed=seed,
    )
    fresh = [
        Trajectory(g.prompt_ids, g.token_ids, t.id, g.finish_reason, *sampling.filters)
        for t, g in zip(trajectories, made, strict=True)
    ]
    return fresh, [g.rounds for g in made]


def choose_rounds(traces: Traces, options: Opd, length: int, seed: str) -> Traces:
    """The rounds to replay: every `stride`-th, at most `max_anchors` (and `max_tokens` worth of
    blocks) a trajectory, drawn without replacement, in order."""
    rng = random.Random(seed)
    limit = options.max_anchors
    if options.max_tokens is not None:
        limit = max(1, min(limit, options.max_tokens // length))
    chosen = []
    for trace in traces:
        kept = trace[rng.randrange(options.stride) :: options.stride] or trace[:1]
        drawn = rng.sample(range(len(kept)), min(limit, len(kept)))
        chosen.append([kept[i] for i in sorted(drawn)])
    return chosen


def teacher_states(target: Target, batch: Batch, blocks: Blocks, branches: bool = True) -> Tensor:
    """The target's hidden states [batch, A, K, H] in the draft-induced states s_1..s_K.

    s_1..s_{n+1} lie on the trajectory. The states behind a rejection do not: the drafted tokens
    n+1.. are run as branches over the trajectory's cache. Without `branches` the trajectory's
    states are returned throughout.
    """
    length = blocks.drafted.shape[2]
    offset = torch.arange(1, length + 1, device=batch.device)
    before = blocks.anchors[:, :, None] + offset - 1  # the state's last token
    rows = torch.arange(len(batch.ids), device=batch.device)[:, None, None]
    states = batch.hidden[rows, before.clamp_max(batch.ids.shape[1] - 1)]
    if not branches:
        return states
    # Draft token j is run when it is behind the first acceptance and state j + 1 is supervised.
    run = (offset > blocks.accepted[:, :, None]) & (offset < length)
    run &= torch.cat([blocks.valid[:, :, 1:], torch.zeros_like(blocks.valid[:, :, :1])], 2)
    flat = run.flatten(1)
    width = int(flat.sum(1).max())
    if not width:
        return states
    order = (~flat).long().argsort(dim=1, stable=True)[:, :width]  # run tokens first, in order
    real = flat.gather(1, order)
    block = order // length

    def packed(x: Tensor, fill: int) -> Tensor:
        return torch.where(real, x.flatten(1).gather(1, order), fill)

    prefix = (blocks.anchors + blocks.accepted + 1).gather(1, block)
    hidden = target.branches(
        packed(blocks.drafted, 0),
        packed(blocks.anchors[:, :, None] + offset, 0),
        torch.where(real, block, -1),
        torch.where(real, prefix, 0),
        batch.cache,
    )
    states = states.flatten(1, 2).clone()
    row = torch.arange(len(flat), device=flat.device)[:, None].expand_as(order)
    states[row[real], order[real] + 1] = hidden[real].to(states.dtype)
    return states.unflatten(1, (-1, length))


def choose_blocks(
    target: Target,
    drafter: Drafter,
    batch: Batch,
    traces: Traces,
    options: Opd,
    length: int,
    sampling: Sampling,
    seed: str,
) -> Blocks:
    """What is replayed: rounds of the trace, or other anchors with the same number of blocks."""
    rounds = choose_rounds(traces, options, length, seed)
    if options.anchors == "trace":
        return pack(batch, [[r.anchor for r in row] for row in rounds], rounds, length)
    every = [range(len(t.prompt_ids) - 1, len(t.ids) - 1) for t in batch.trajectories]
    weights = None
    if options.anchors == "random":
        anchors = random_anchors(batch, [len(row) for row in rounds], seed)
    elif options.anchors == "all":
        anchors = random_anchors(batch, [options.max_anchors] * len(every), seed)
    else:
        anchors, weights = _by_occupancy(
            target, drafter, batch, every, length, sampling, options, seed
        )
    rounds = draft_at(target, drafter, batch, anchors, length, sampling, seed)
    blocks = pack(batch, anchors, rounds, length)
    if weights is not None:
        blocks.weight = weights
    return blocks


def _by_occupancy(
    target: Target,
    drafter: Drafter,
    batch: Batch,
    every: list[range],
    length: int,
    sampling: Sampling,
    options: Opd,
    seed: str,
) -> tuple[list[list[int]], Tensor]:
    """About `max_anchors` anchors a row, drawn in proportion to the probability that a round begins
    there; their weights make every mean that of all positions."""
    blocks = pack(batch, every, [[] for _ in every], length)
    with torch.no_grad():
        context = drafter.context(target, batch.ids, batch.features)
        alpha = text_acceptance(
            target, drafter, context, batch.ids, batch.hidden, blocks.anchors, length, sampling
        )
        begins = occupancy(alpha, blocks.valid)
    rng = random.Random(seed)
    found = [
        draw_by_weight(row.tolist(), options.max_anchors, rng.random()) for row in begins.cpu()
    ]
    anchors = [[every[i][j] for j, _ in row] for i, row in enumerate(found)]
    weights = torch.zeros(len(found), max(map(len, found)), device=batch.device)
    for i, row in enumerate(found):
        weights[i, : len(row)] = torch.tensor([w for _, w in row])
    return anchors, weights


def draw_by_weight(weights: list[float], count: int, start: float) -> list[tuple[int, float]]:
    """Systematic sampling: about `count` indices, index i with probability π_i = min(1, λ w_i), as
    (i, w_i / π_i), so that weighted sums keep their expectation. `start` is uniform in [0, 1)."""
    weights = [w if w > 1e-9 else 0.0 for w in weights]
    positive = [w for w in weights if w > 0]
    certain = min(count, len(positive))
    # λ: the largest weights are certain, the others share what is left of `count`.
    ordered = sorted(positive, reverse=True)
    scale, rest = float("inf"), sum(positive)
    for i, w in enumerate(ordered[:certain]):
        if (certain - i) * w < rest:
            scale = (certain - i) / rest
            break
        rest -= w
    drawn, total = [], start
    for i, w in enumerate(weights):
        if w > 0:
            chance = 1.0 if w * scale >= 1 else w * scale
            before, total = total, total + chance
            if int(total) > int(before):
                drawn.append((i, w / chance))
    return drawn or [(weights.index(max(weights)), 1.0)]


def opd_loss(
    target: Target,
    drafter: Drafter,
    batch: Batch,
    traces: Traces,
    options: Opd,
    *,
    length: int,
    seed: str,
    sampling: Sampling | None = None,
    clock: Stopwatch | None = None,
) -> tuple[Tensor, dict]:
    """The loss of one batch, given its traces, and figures for the metrics."""
    clock = clock or Stopwatch()
    objective = options.objective
    with clock("trace"):
        blocks = choose_blocks(
            target, drafter, batch, traces, options, length, sampling or Sampling(), seed
        )
    with clock("branches"):
        states = None
        if needs_states(objective):
            states = teacher_states(target, batch, blocks, needs_branches(objective))
    with clock("forward"):
        replayed = replay(target, drafter, batch, blocks, states, objective)
        loss, figures = objective_loss(replayed, objective)
    rounds = [r for trace in traces for r in trace]
    return loss, {
        "anchors": int(blocks.present.sum()),
        "train_tau": tau(rounds),
        "rounds_by_accepted": by_accepted(rounds, length),
        **figures,
    }


@torch.no_grad()
def draft_at(
    target: Target,
    drafter: Drafter,
    batch: Batch,
    anchors: list[list[int]],
    length: int,
    sampling: Sampling,
    seed: str,
) -> Traces:
    """What the drafter proposes at given anchors, and how much of it the text confirms."""
    blocks = pack(batch, anchors, [[] for _ in anchors], length)
    hidden = replay_hidden(target, drafter, batch, blocks)
    states = teacher_states(target, batch, blocks, branches=False)
    weight = drafter.head_weight(target)
    generator = torch.Generator(batch.device).manual_seed(random.Random(seed).getrandbits(32))
    drafted = torch.stack(
        [
            text_chooser(target, sampling, blocks.labels[i], blocks.valid[i], states[i], generator)(
                F.linear(row.to(weight.dtype), weight)
            )[0]
            for i, row in enumerate(hidden)
        ]
    )
    agree = (drafted == blocks.labels) & blocks.valid
    accepted = agree.long().cumprod(-1).sum(-1)
    return [
        [Round(a, drafted[i, j].tolist(), int(accepted[i, j])) for j, a in enumerate(row)]
        for i, row in enumerate(anchors)
    ]
