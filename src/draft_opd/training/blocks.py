"""Draft blocks packed over a batch: anchors, labels, validity, and replaying them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draft_opd.decoding.rounds import Round
from draft_opd.drafters.base import Drafter
from draft_opd.losses.objectives import Replay
from draft_opd.models.target import Target
from draft_opd.training.config import Objective
from draft_opd.training.data import Batch


@dataclass
class Blocks:
    """A anchors a row (padded), K offsets each.

    anchors [batch, A]; present [batch, A]; drafted [batch, A, K]; accepted [batch, A];
    labels [batch, A, K]: the trajectory's tokens; valid [batch, A, K]: offset within the text;
    weight [batch, A]: how often a round begins there (1 when it did).
    """

    anchors: Tensor
    present: Tensor
    drafted: Tensor
    accepted: Tensor
    labels: Tensor
    valid: Tensor
    weight: Tensor


def pack(
    batch: Batch, anchors: Sequence[Sequence[int]], rounds: Sequence[Sequence[Round]], length: int
) -> Blocks:
    """Packs chosen anchors a row; `rounds` gives what was drafted there (empty: nothing known)."""
    rows, width = len(anchors), max(1, max(map(len, anchors)))
    at = torch.zeros(rows, width, dtype=torch.long)
    present = torch.zeros(rows, width, dtype=torch.bool)
    drafted = torch.zeros(rows, width, length, dtype=torch.long)
    accepted = torch.zeros(rows, width, dtype=torch.long)
    proposed = torch.full((rows, width), length)
    for i, row in enumerate(anchors):
        at[i] = int(batch.starts[i])  # padding drafts at the first anchor, unsupervised
        at[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        present[i, : len(row)] = True
        for j, r in enumerate(rounds[i]):
            ids = torch.tensor(r.drafted, dtype=torch.long)
            drafted[i, j, : len(ids)] = ids.clamp_min(0)  # what nobody looked at nobody scores
            proposed[i, j] = len(r.drafted)  # fewer where the context ends
            accepted[i, j] = r.accepted
    at, present, drafted, accepted, proposed = (
        x.to(batch.device) for x in (at, present, drafted, accepted, proposed)
    )
    offset = torch.arange(1, length + 1, device=batch.device)
    where = at[:, :, None] + offset
    valid = (where <= batch.ends[:, None, None]) & present[:, :, None]
    valid &= offset <= proposed[:, :, None]
    rowwise = torch.arange(rows, device=batch.device)[:, None, None]
    labels = batch.ids[rowwise, where.clamp_max(batch.ids.shape[1] - 1)]
    return Blocks(at, present, drafted, accepted, labels, valid, present.float())


def text_states(batch: Batch, blocks: Blocks) -> Tensor:
    """The target's hidden states [batch, A, K, H] along the text: what scores offset k there."""
    before = blocks.anchors[:, :, None] + torch.arange(blocks.valid.shape[2], device=batch.device)
    rows = torch.arange(len(batch.ids), device=batch.device)[:, None, None]
    return batch.hidden[rows, before.clamp_max(batch.ids.shape[1] - 1)]


def replay_hidden(target: Target, drafter: Drafter, batch: Batch, blocks: Blocks) -> Tensor:
    """The drafter's hidden states [batch, A, K, H] at the blocks, with gradient."""
    context = drafter.context(target, batch.ids, batch.features)
    ids = batch.ids.gather(1, blocks.anchors)
    return drafter.replay(target, context, blocks.anchors, ids, blocks.drafted)


def replay(
    target: Target,
    drafter: Drafter,
    batch: Batch,
    blocks: Blocks,
    states: Tensor | None = None,
    objective: Objective | None = None,
    total: Callable[[Tensor], Tensor] = Tensor.detach,
) -> Replay:
    """Replays the blocks, with gradient; `states` [batch, A, K, Ht] are the target's; `total` as
    in `Replay`."""
    temperatures = (
        {}
        if objective is None
        else {
            "supervision_temperature": objective.supervision_temperature,
            "draft_temperature": objective.draft_temperature,
        }
    )
    return Replay(
        hidden=replay_hidden(target, drafter, batch, blocks).flatten(0, 1),
        states=None if states is None else states.flatten(0, 1),
        labels=blocks.labels.flatten(0, 1),
        drafted=blocks.drafted.flatten(0, 1),
        accepted=blocks.accepted.flatten(),
        valid=blocks.valid.flatten(0, 1),
        weight=blocks.weight.flatten(),
        head=drafter.head_weight(target),
        target_head=target.head_weight(),
        decay=drafter.position_decay(blocks.valid.shape[2]),
        vocabulary=drafter.vocabulary,
        sees_drafts=drafter.sees_drafts,
        draftable=drafter.can_draft(blocks.labels).flatten(0, 1),
        total=total,
        **temperatures,
    )
