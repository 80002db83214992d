"""Draft blocks packed over a batch: anchors, labels, validity, and replaying them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from draft_opd.decoding.rounds import Round
from draft_opd.drafters.base import Drafter
from draft_opd.losses.config import Objective
from draft_opd.losses.objectives import ReplayedBlocks
from draft_opd.models.target import Target
from draft_opd.training.batches import Batch


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


def pack_anchors(batch: Batch, anchors: Sequence[Sequence[int]], num_draft_tokens: int) -> Blocks:
    """Blocks of K = `num_draft_tokens` offsets at anchors [row][anchor], with nothing drafted in them yet."""
    rows, width = len(anchors), max(1, max(map(len, anchors)))
    at = torch.zeros(rows, width, dtype=torch.long)
    present = torch.zeros(rows, width, dtype=torch.bool)
    for i, row in enumerate(anchors):
        at[i] = int(batch.starts[i])  # padding drafts at the first anchor, unsupervised
        at[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        present[i, : len(row)] = True
    at, present = at.to(batch.device), present.to(batch.device)
    where = at[:, :, None] + torch.arange(1, num_draft_tokens + 1, device=batch.device)
    valid = (where <= batch.ends[:, None, None]) & present[:, :, None]
    rowwise = torch.arange(rows, device=batch.device)[:, None, None]
    labels = batch.ids[rowwise, where.clamp_max(batch.ids.shape[1] - 1)]
    nothing, none = torch.zeros_like(labels), torch.zeros_like(at)
    return Blocks(at, present, nothing, none, labels, valid, present.float())


def attach_drafts(blocks: Blocks, rounds: Sequence[Sequence[Round]]) -> Blocks:
    """The same blocks with what was drafted at each anchor; `rounds` [row][anchor]. What was not drafted
    stays 0, and is never scored."""
    count, size = blocks.anchors.shape[1], blocks.drafted.shape[2]
    accepted = [[r.accepted for r in row] + [0] * (count - len(row)) for row in rounds]
    found = replace(blocks, accepted=torch.tensor(accepted).view(-1, count).to(blocks.anchors.device))
    if not any(r.drafted for row in rounds for r in row):
        return found
    # Fewer where the context ends, none where only lengths were asked for.
    drafts = [[*r.drafted, *[-1] * (size - len(r.drafted))] for row in rounds for r in row]
    proposed = [len(r.drafted) or size for row in rounds for r in row]
    place = [i * count + j for i, row in enumerate(rounds) for j in range(len(row))]
    drafted = torch.zeros(len(rounds) * count, size, dtype=torch.long)
    drafted[place] = torch.tensor(drafts).clamp_min(0)
    limit = torch.full((len(rounds) * count,), size)
    limit[place] = torch.tensor(proposed)
    within = torch.arange(size) < limit[:, None]
    drafted, within = (x.view(-1, count, size).to(blocks.anchors.device) for x in (drafted, within))
    return replace(found, drafted=drafted, valid=blocks.valid & within)


def text_states(batch: Batch, blocks: Blocks) -> Tensor:
    """The target's hidden states [batch, A, K, H] along the text: what scores offset k there."""
    before = blocks.anchors[:, :, None] + torch.arange(blocks.valid.shape[2], device=batch.device)
    rows = torch.arange(len(batch.ids), device=batch.device)[:, None, None]
    return batch.hidden[rows, before.clamp_max(batch.ids.shape[1] - 1)]


def replay_hidden(target: Target, drafter: Drafter, batch: Batch, blocks: Blocks) -> Tensor:
    """The drafter's hidden states [batch, A, K, H] at the blocks, with gradient."""
    context = drafter.build_cache(target, batch.ids, batch.features)
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
    ahead: Tensor | None = None,
) -> ReplayedBlocks:
    """Replays the blocks, with gradient; `states` [batch, A, K, Ht] are the target's; `total` and
    `ahead` [batch, A, K + 1] as in `ReplayedBlocks`."""
    temperatures = (
        {}
        if objective is None
        else {
            "supervision_temperature": objective.supervision_temperature,
            "draft_temperature": objective.draft_temperature,
        }
    )
    hidden = replay_hidden(target, drafter, batch, blocks)
    ids = batch.ids.gather(1, blocks.anchors)[:, :, None]
    confidence = drafter.confidence(hidden, torch.cat([ids, blocks.drafted[:, :, :-1]], 2))
    return ReplayedBlocks(
        hidden=hidden.flatten(0, 1),
        states=None if states is None else states.flatten(0, 1),
        labels=blocks.labels.flatten(0, 1),
        drafted=blocks.drafted.flatten(0, 1),
        accepted=blocks.accepted.flatten(),
        valid=blocks.valid.flatten(0, 1),
        weight=blocks.weight.flatten(),
        head=drafter.head_weights(target),
        target_head=target.head_weight(),
        target_map=target.logit_map,
        draft_map=drafter.logit_map,
        decay=drafter.position_decay(blocks.valid.shape[2]),
        vocabulary=drafter.vocabulary,
        sees_drafts=drafter.sees_drafts,
        draftable=drafter.can_draft(blocks.labels).flatten(0, 1),
        total=total,
        ahead=None if ahead is None else ahead.flatten(0, 1),
        num_candidates=drafter.num_candidates,
        confidence=None if confidence is None else confidence.flatten(0, 1),
        **temperatures,
    )
