"""What the positions of a batch are worth: the rounds that the drafter needs from each to the end."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from draft_opd.decoding.sampling import Sampling
from draft_opd.drafters.base import Drafter
from draft_opd.hindsight.occupancy import text_acceptance
from draft_opd.losses.config import Objective
from draft_opd.losses.rounds_to_go import rounds_to_go
from draft_opd.models.target import Target
from draft_opd.training.batches import Batch
from draft_opd.training.blocks import Blocks, pack_anchors


@torch.no_grad()
def acceptance_everywhere(
    target: Target,
    drafter: Drafter,
    batch: Batch,
    num_draft_tokens: int,
    sampling: Sampling,
    sharpness: float | None = None,
) -> tuple[Blocks, Tensor]:
    """Blocks at every position of the responses, and α [batch, A, K] there, see `text_acceptance`."""
    every = [range(len(t.prompt_ids) - 1, len(t.ids) - 1) for t in batch.trajectories]
    places = pack_anchors(batch, every, num_draft_tokens)
    context = drafter.build_cache(target, batch.ids, batch.features)
    where = (batch.ids, batch.hidden, places.anchors, num_draft_tokens)
    return places, text_acceptance(target, drafter, context, *where, sampling, sharpness)


@torch.no_grad()
def rounds_ahead(
    target: Target, drafter: Drafter, batch: Batch, blocks: Blocks, objective: Objective
) -> Tensor:
    """V [batch, A, K + 1] at the positions 1..K + 1 behind each anchor. It drafts at every position of the
    batch. Argmax drafts count as accepted with probability q(y)^β, so that V is smooth."""
    count = blocks.valid.shape[2]
    sharpness = objective.value_sharpness
    places, alpha = acceptance_everywhere(target, drafter, batch, count, Sampling(), sharpness)
    values = rounds_to_go(alpha, places.valid).to(alpha.dtype)
    first = batch.starts[:, None, None]
    behind = blocks.anchors[:, :, None] + torch.arange(1, count + 2, device=batch.device) - first
    rows = torch.arange(len(values), device=batch.device)[:, None, None]
    return values[rows, behind.clamp_max(values.shape[1] - 1)]


def without_cut_ends(batch: Batch, blocks: Blocks) -> Blocks:
    """Blocks within K + 1 positions of the end of a text that was cut count nothing: what would have come
    behind is not known."""
    cut = torch.tensor([t.finish_reason == "length" for t in batch.trajectories], device=batch.device)
    near = blocks.anchors + blocks.valid.shape[2] + 1 > batch.ends[:, None]
    return replace(blocks, weight=blocks.weight * ~(cut[:, None] & near))
