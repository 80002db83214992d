"""Traces from stored text: which rounds would this drafter have had on this trajectory?

At temperature 0 lossless decoding emits the same text whatever the drafter is, so the rounds
follow from the text alone: draft at the anchor, count the leading tokens that agree with the
text, go on behind the target's own token. All rows walk together, one draft a round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from draft_opd.decoding.sampling import Sampling
from draft_opd.drafters.base import Drafter
from draft_opd.errors import UserError
from draft_opd.rollout.trace import Round
from draft_opd.rollout.trajectory import Trajectory
from draft_opd.target import Target


def pad_rows(rows: Sequence[Sequence[int]], device: torch.device, fill: int = 0) -> Tensor:
    """Right-pads lists of ids to a tensor [rows, longest]."""
    width = max(map(len, rows))
    return torch.tensor([[*r, *[fill] * (width - len(r))] for r in rows], device=device)


@torch.no_grad()
def walk(
    target: Target,
    drafter: Drafter,
    trajectories: Sequence[Trajectory],
    ids: Tensor,
    context: Any,
    draft_length: int,
) -> list[list[Round]]:
    """Greedy traces of a batch. `ids` [batch, L] and `context` belong to the whole trajectories;
    the context is consumed."""
    choose = Sampling().chooser()
    ends = [len(t.ids) - 1 for t in trajectories]  # index of the last token
    anchors = [len(t.prompt_ids) - 1 for t in trajectories]
    traces: list[list[Round]] = [[] for _ in trajectories]
    active = [i for i in range(len(trajectories)) if anchors[i] < ends[i]]
    rows = torch.tensor(active, device=ids.device)
    if len(active) < len(trajectories):
        drafter.select(context, rows)
    while active:
        at = torch.tensor([anchors[i] for i in active], device=ids.device)
        count = min(draft_length, target.max_positions - 1 - int(at.max()))
        if count:
            drafted, _ = drafter.propose(target, context, at, ids[rows, at], count, choose)
            proposals = drafted.tolist()
        else:
            proposals = [[] for _ in active]
        going = []
        for row, i in enumerate(active):
            anchor, end, proposal = anchors[i], ends[i], proposals[row]
            text = trajectories[i].ids[anchor + 1 : anchor + 1 + count]
            accepted = 0
            while accepted < len(text) and text[accepted] == proposal[accepted]:
                accepted += 1
            traces[i].append(Round(anchor, proposal, accepted))
            anchors[i] = anchor + accepted + 1
            if anchors[i] < end:
                going.append(row)
        if len(going) < len(active):
            drafter.select(context, torch.tensor(going, dtype=torch.long, device=ids.device))
            active = [active[row] for row in going]
            rows = torch.tensor(active, dtype=torch.long, device=ids.device)
    return traces


@torch.no_grad()
def hindsight_traces(
    target: Target,
    drafter: Drafter,
    trajectories: Sequence[Trajectory],
    *,
    draft_length: int | None = None,
    batch_size: int = 32,
) -> list[list[Round]]:
    """Exact greedy traces of many trajectories, in their order, without decoding."""
    length = draft_length or drafter.draft_length
    order = sorted(range(len(trajectories)), key=lambda i: len(trajectories[i].ids))
    traces: list[list[Round]] = [[] for _ in trajectories]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = [trajectories[i] for i in chosen]
        ids = pad_rows([t.ids for t in batch], target.device)
        features = target.trajectories(ids, drafter.target_layers).features
        context = drafter.context(target, ids, features)
        found = walk(target, drafter, batch, ids, context, length)
        for i, trace in zip(chosen, found, strict=True):
            traces[i] = trace
    return traces


def hindsight_trace(
    target: Target,
    drafter: Drafter,
    trajectory: Trajectory,
    temperature: float = 0.0,
    seed: int = 0,
    draft_length: int | None = None,
) -> list[Round]:
    """The rounds real speculative decoding with `drafter` has on `trajectory`.

    Anchors index `prompt_ids + response_ids`. Raises `UserError` for temperatures above 0, which
    are not implemented yet.
    """
    if temperature != 0:
        raise UserError("hindsight traces at temperature > 0 are not implemented yet")
    drafter.check_target(target)
    return hindsight_traces(target, drafter, [trajectory], draft_length=draft_length)[0]
