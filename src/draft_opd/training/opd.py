"""Stage 2, Draft-OPD: trace -> replay -> target feedback on accepted and rejected proposals."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from draft_opd.decoding.speculative import speculate
from draft_opd.drafters.base import Drafter
from draft_opd.rollout.hindsight import walk
from draft_opd.rollout.trace import Round, tau
from draft_opd.rollout.trajectory import Trajectory
from draft_opd.target import Target
from draft_opd.training.blocks import Blocks, label_scores, pack, replay_hidden
from draft_opd.training.config import Objective, Opd
from draft_opd.training.data import Batch
from draft_opd.training.losses import (
    chunked_score,
    combine_streams,
    cross_entropy,
    expected_length,
    forward_kl,
    reverse_kl,
    stream_weights,
)
from draft_opd.training.sft import decayed_cross_entropy, default_decay, random_anchors


def needs_target_cache(objective: Objective) -> bool:
    """Only scoring rejected suffixes needs the target's keys and values of the trajectory."""
    return objective.kind == "acceptance_aware" and objective.rejected_weight > 0


def hindsight_rollout(
    target: Target, drafter: Drafter, batch: Batch, length: int
) -> list[list[Round]]:
    """Traces of the current drafter on stored text."""
    with torch.no_grad():
        context = drafter.context(target, batch.ids, batch.features)
        return walk(target, drafter, batch.trajectories, batch.ids, context, length)


def live_rollout(
    target: Target, drafter: Drafter, trajectories: list[Trajectory], length: int
) -> tuple[list[Trajectory], list[list[Round]]]:
    """Decodes the prompts again with the current drafter, to the stored responses' length."""
    made = speculate(
        target,
        drafter,
        [t.prompt_ids for t in trajectories],
        max_new_tokens=max(len(t.response_ids) for t in trajectories),
        draft_length=length,
    )
    fresh = [
        Trajectory(g.prompt_ids, g.token_ids, t.id, g.finish_reason)
        for t, g in zip(trajectories, made, strict=True)
    ]
    return fresh, [g.rounds for g in made]


def choose_rounds(traces: list[list[Round]], limit: int, seed: str) -> list[list[Round]]:
    """At most `limit` rounds a trajectory, drawn without replacement, in order."""
    rng = random.Random(seed)
    return [
        [trace[i] for i in sorted(rng.sample(range(len(trace)), min(limit, len(trace))))]
        for trace in traces
    ]


def teacher_states(target: Target, batch: Batch, blocks: Blocks) -> Tensor:
    """The target's hidden states [batch, A, K, H] in the draft-induced states s_1..s_K.

    s_1..s_{n+1} lie on the trajectory. The states behind a rejection do not: the drafted tokens
    n+1.. are run as branches over the trajectory's cache.
    """
    length = blocks.drafted.shape[2]
    offset = torch.arange(1, length + 1, device=batch.device)
    before = blocks.anchors[:, :, None] + offset - 1  # the state's last token
    rows = torch.arange(len(batch.ids), device=batch.device)[:, None, None]
    states = batch.hidden[rows, before.clamp_max(batch.ids.shape[1] - 1)]
    if batch.cache is None:
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


def opd_loss(
    target: Target,
    drafter: Drafter,
    batch: Batch,
    traces: list[list[Round]],
    options: Opd,
    *,
    length: int,
    seed: str,
) -> tuple[Tensor, dict]:
    """The loss of one batch, given its traces, and figures for the metrics."""
    rounds = choose_rounds(traces, options.max_anchors, seed)
    anchors = [[r.anchor for r in row] for row in rounds]
    if options.anchors == "random":
        anchors = random_anchors(batch, [len(row) for row in anchors], seed)
        with torch.no_grad():
            rounds = draft_at(target, drafter, batch, anchors, length)
    blocks = pack(batch, anchors, rounds, length)
    hidden = replay_hidden(target, drafter, batch, blocks)
    objective = options.objective
    figures = {
        "supervised": int(blocks.valid.sum()),
        "anchors": int(blocks.present.sum()),
        "train_tau": tau([r for trace in traces for r in trace]),
    }
    if objective.kind == "acceptance_aware":
        loss = _acceptance_aware(target, drafter, batch, blocks, hidden, objective, figures)
    elif objective.kind == "cross_entropy":
        decay = default_decay(length + 1)
        loss = decayed_cross_entropy(target, drafter, hidden, blocks, decay)
    else:
        log_q = -label_scores(cross_entropy, target, drafter, hidden, blocks)
        accepted = expected_length(log_q.flatten(0, 1), blocks.valid.flatten(0, 1))
        loss = 1 - accepted.sum() / blocks.valid.sum().clamp_min(1)
    if objective.trajectory_weight:
        decay = default_decay(length + 1)
        extra = decayed_cross_entropy(target, drafter, hidden, blocks, decay)
        loss = loss + objective.trajectory_weight * extra
    return loss, figures


def _acceptance_aware(
    target: Target,
    drafter: Drafter,
    batch: Batch,
    blocks: Blocks,
    hidden: Tensor,
    objective: Objective,
    figures: dict,
) -> Tensor:
    length = blocks.drafted.shape[2]
    accepted, rejected = stream_weights(
        blocks.accepted.flatten(), length, blocks.valid.flatten(0, 1), objective.gamma
    )
    states = teacher_states(target, batch, blocks).flatten(0, 1)
    hidden = hidden.flatten(0, 1)
    scores = []
    for score, weights in ((forward_kl, accepted), (reverse_kl, rejected)):
        used = weights > 0
        values = chunked_score(
            score,
            hidden[used],
            drafter.head_weight(target),
            teacher_hidden=states[used],
            teacher_weight=target.head.weight,
            temperature=objective.supervision_temperature,
        )
        scores.append(torch.zeros(used.shape, device=values.device).masked_scatter(used, values))
    parts = combine_streams(
        *scores,
        accepted,
        rejected,
        objective.accepted_weight,
        objective.rejected_weight,
        objective.normalization,
    )
    figures.update(accepted_loss=parts.accepted.item(), rejected_loss=parts.rejected.item())
    return parts.total


@torch.no_grad()
def draft_at(
    target: Target, drafter: Drafter, batch: Batch, anchors: list[list[int]], length: int
) -> list[list[Round]]:
    """What the drafter proposes at given anchors, and how much of it the text confirms."""
    blocks = pack(batch, anchors, [[] for _ in anchors], length)
    hidden = replay_hidden(target, drafter, batch, blocks)
    weight = drafter.head_weight(target)
    drafted = torch.stack(
        [torch.nn.functional.linear(row.to(weight.dtype), weight).argmax(-1) for row in hidden]
    )
    agree = (drafted == blocks.labels) & blocks.valid
    accepted = agree.long().cumprod(-1).sum(-1)
    return [
        [Round(a, drafted[i, j].tolist(), int(accepted[i, j])) for j, a in enumerate(row)]
        for i, row in enumerate(anchors)
    ]
