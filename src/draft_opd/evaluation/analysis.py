"""Where a drafter fails, seen along its own traces (method §6; the paper's analysis figures)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from draft_opd.data.trajectory import Trajectory
from draft_opd.decoding.rounds import by_accepted, tau
from draft_opd.drafters.base import Drafter
from draft_opd.evaluation.calibration import Calibration
from draft_opd.evaluation.summary import acceptance_by_position
from draft_opd.losses.divergences import forward_kl, overlap, reverse_kl
from draft_opd.models.target import Target
from draft_opd.training.batches import BatchSource
from draft_opd.training.blocks import attach_drafts, pack_anchors, replay, text_states
from draft_opd.training.rollouts import hindsight_rollout
from draft_opd.training.stage_opd import teacher_states

REPLAYED = ("accepted", "first_rejected", "suffix")
GROUPS = ("trajectory", *REPLAYED)
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
    the drafted states, by the branch forward); and `trajectory`, the same offsets all scored on
    the text, as teacher forcing sees them. With a draft vocabulary KL(p‖q) is over it (p normalised
    there). `overlap` is Σ min(p, q). Only offsets inside the text
    count. `share` is the composition of the replayed tokens. `anchors` counts rounds by tenth of
    the response; `rounds_by_accepted` by accepted length 0..K;
    `confidence` as in `Calibration`.
    """
    drafter.bind(target)
    num_draft_tokens = drafter.checked_length(draft_length)
    source = BatchSource(target, drafter.target_layers)
    tokens = dict.fromkeys(GROUPS, 0)
    sums = {name: dict.fromkeys(GROUPS, 0.0) for name in SCORES}
    anchors, rounds, sure = [0] * BINS, [], Calibration()
    for start in range(0, len(trajectories), batch_size):
        batch = source.batch(trajectories[start : start + batch_size], with_cache=True)
        traces = hindsight_rollout(target, drafter, batch, num_draft_tokens)
        for t, trace in zip(batch.trajectories, traces, strict=True):
            rounds += trace
            for r in trace:
                part = (r.anchor + 1 - len(t.prompt_ids)) / len(t.response_ids)
                anchors[min(BINS - 1, int(part * BINS))] += 1
        at = [[r.anchor for r in trace] for trace in traces]
        blocks = attach_drafts(pack_anchors(batch, at, num_draft_tokens), traces)
        drafted = replay(target, drafter, batch, blocks, teacher_states(target, batch, blocks))
        sure.add(drafted)
        on_text = replay(
            target,
            drafter,
            batch,
            replace(blocks, drafted=blocks.labels),
            text_states(batch, blocks),
        )
        offset = torch.arange(num_draft_tokens, device=batch.device)
        n = drafted.accepted[:, None]
        views = {
            "trajectory": (on_text, offset >= 0),
            "accepted": (drafted, offset < n),
            "first_rejected": (drafted, offset == n),
            "suffix": (drafted, offset > n),
        }
        for group, (view, mask) in views.items():
            used = mask & view.valid
            tokens[group] += int(used.sum())
            for name, score in SCORES.items():
                sums[name][group] += float(view.score(score, used).double().sum())
        if progress:
            progress(min(start + batch_size, len(trajectories)))
    total = max(1, sum(tokens[g] for g in REPLAYED))
    half = BINS // 2
    return {
        "trajectories": len(trajectories),
        "rounds": len(rounds),
        "tau": tau(rounds),
        "draft_length": num_draft_tokens,
        "acceptance_by_position": acceptance_by_position(rounds),
        "tokens": tokens,
        "share": {g: tokens[g] / total for g in REPLAYED},
        "rounds_by_accepted": by_accepted(rounds, num_draft_tokens),
        **{name: {g: sums[name][g] / tokens[g] if tokens[g] else None for g in GROUPS} for name in SCORES},
        "support": _support(drafter),
        "confidence": sure.result(num_draft_tokens),
        "anchors": {
            "by_tenth": anchors,
            "first_half": sum(anchors[:half]),
            "second_half": sum(anchors[half:]),
        },
    }


def _support(drafter: Drafter) -> int | None:
    if drafter.num_candidates is not None:
        return drafter.num_candidates
    return None if drafter.vocabulary is None else len(drafter.vocabulary)
