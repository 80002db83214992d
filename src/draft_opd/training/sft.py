"""Stage 1: teacher-forced cross-entropy at random anchors of the target's own text."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from draft_opd.drafters.base import Drafter
from draft_opd.target import Target
from draft_opd.training.blocks import Blocks, label_scores, pack, replay_hidden
from draft_opd.training.data import Batch
from draft_opd.training.losses import cross_entropy


def default_decay(block_size: int) -> float:
    """γ_sft of the published DFlash recipe: 7 for 16, 5 for 10, 4 for 8 (linear between)."""
    if block_size <= 10:
        return max(1.0, 4 + (block_size - 8) / 2)
    return 5 + (block_size - 10) / 3


def random_anchors(batch: Batch, count: int | list[int], seed: str) -> list[list[int]]:
    """Distinct response anchors a row, uniform over positions that have a next token."""
    rng = random.Random(seed)
    rows = []
    for i, t in enumerate(batch.trajectories):
        first, last = len(t.prompt_ids) - 1, len(t.ids) - 2
        wanted = count if isinstance(count, int) else count[i]
        rows.append(sorted(rng.sample(range(first, last + 1), min(wanted, last + 1 - first))))
    return rows


def decayed_cross_entropy(
    target: Target, drafter: Drafter, hidden: Tensor, blocks: Blocks, decay: float
) -> Tensor:
    """Σ w_k (-log q(y_k)) / Σ w_k with w_k = exp(-(k-1)/γ), over valid offsets."""
    losses = label_scores(cross_entropy, target, drafter, hidden, blocks)
    weights = torch.exp(-torch.arange(losses.shape[-1], device=losses.device) / decay)
    weights = blocks.valid * weights
    return (losses * weights).sum() / weights.sum().clamp_min(1e-9)


def sft_loss(
    target: Target,
    drafter: Drafter,
    batch: Batch,
    *,
    anchors: int,
    length: int,
    decay: float | None,
    seed: str,
) -> tuple[Tensor, dict]:
    """The loss of one batch and figures for the metrics."""
    rows = random_anchors(batch, anchors, seed)
    blocks = pack(batch, rows, [[] for _ in rows], length)
    hidden = replay_hidden(target, drafter, batch, blocks)
    decay = decay or default_decay(length + 1)
    loss = decayed_cross_entropy(target, drafter, hidden, blocks, decay)
    return loss, {
        "supervised": int(blocks.valid.sum()),
        "perplexity": math.exp(min(loss.item(), 50)),
    }
