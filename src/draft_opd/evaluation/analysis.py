"""Where a drafter fails, seen along its own traces (method §6; the paper's analysis figures)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from draft_opd.drafters.base import Drafter
from draft_opd.evaluation.measure import acceptance_by_position
from draft_opd.rollout.trace import tau
from draft_opd.rollout.trajectory import Trajectory
from draft_opd.target import Target
from draft_opd.training.blocks import pack, replay_hidden
from draft_opd.training.data import BatchSource
from draft_opd.training.losses import chunked_score, forward_kl, overlap, reverse_kl
from draft_opd.training.opd import hindsight_rollout, teacher_states

GROUPS = ("accepted", "first_rejected", "suffix")
SCORES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "overlap": overlap}
BINS = 10


@torch.no_grad()
def analyse(
    target: Target,
    drafter: Drafter,
    trajectories: list[Trajectory],
    *,
    draft_length: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> dict:
    """Greedy traces of `drafter` on stored text, and p against q in the states they visit.

    Groups: offsets that were accepted, the first rejected offset, the suffix behind it (scored in
    the drafted states, by the branch forward). `overlap` is Σ min(p, q). Only offsets inside the
    text count. `anchors` counts rounds by tenth of the response.
    """
    length = draft_length or drafter.draft_length
    source = BatchSource(target, drafter.target_layers)
    tokens = dict.fromkeys(GROUPS, 0)
    sums = {name: dict.fromkeys(GROUPS, 0.0) for name in SCORES}
    anchors, rounds = [0] * BINS, []
    for start in range(0, len(trajectories), batch_size):
        batch = source.batch(trajectories[start : start + batch_size], with_cache=True)
        traces = hindsight_rollout(target, drafter, batch, length)
        for t, trace in zip(batch.trajectories, traces, strict=True):
            rounds += trace
            for r in trace:
                part = (r.anchor + 1 - len(t.prompt_ids)) / len(t.response_ids)
                anchors[min(BINS - 1, int(part * BINS))] += 1
        blocks = pack(batch, [[r.anchor for r in trace] for trace in traces], traces, length)
        hidden = replay_hidden(target, drafter, batch, blocks)
        states = teacher_states(target, batch, blocks)
        offset = torch.arange(length, device=batch.device)
        accepted = blocks.accepted[:, :, None]
        masks = (offset < accepted, offset == accepted, offset > accepted)
        for group, mask in zip(GROUPS, masks, strict=True):
            used = mask & blocks.valid
            tokens[group] += int(used.sum())
            for name, score in SCORES.items():
                values = chunked_score(
                    score,
                    hidden[used],
                    drafter.head_weight(target),
                    teacher_hidden=states[used],
                    teacher_weight=target.head.weight,
                )
                sums[name][group] += float(values.double().sum())
        if progress:
            progress(min(start + batch_size, len(trajectories)))
    total = max(1, sum(tokens.values()))
    half = BINS // 2
    return {
        "trajectories": len(trajectories),
        "rounds": len(rounds),
        "tau": tau(rounds),
        "draft_length": length,
        "acceptance_by_position": acceptance_by_position(rounds),
        "tokens": tokens,
        "share": {g: tokens[g] / total for g in GROUPS},
        **{
            name: {g: sums[name][g] / tokens[g] if tokens[g] else None for g in GROUPS}
            for name in SCORES
        },
        "anchors": {
            "by_tenth": anchors,
            "first_half": sum(anchors[:half]),
            "second_half": sum(anchors[half:]),
        },
    }
