"""Stage 1: teacher-forced cross-entropy at random anchors of the target's own text."""

from __future__ import annotations

import math
import random

from torch import Tensor

from draft_opd.drafters.base import Drafter
from draft_opd.target import Target
from draft_opd.training.blocks import pack, replay
from draft_opd.training.data import Batch
from draft_opd.training.objectives import decayed_cross_entropy


def random_anchors(batch: Batch, count: int | list[int], seed: str) -> list[list[int]]:
    """Distinct response anchors a row, uniform over positions that have a next token."""
    rng = random.Random(seed)
    rows = []
    for i, t in enumerate(batch.trajectories):
        first, last = len(t.prompt_ids) - 1, len(t.ids) - 2
        wanted = count if isinstance(count, int) else count[i]
        rows.append(sorted(rng.sample(range(first, last + 1), min(wanted, last + 1 - first))))
    return rows


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
    loss = decayed_cross_entropy(replay(target, drafter, batch, blocks), decay)
    return loss, {
        "supervised": int(blocks.valid.sum()),
        "perplexity": math.exp(min(loss.item(), 50)),
    }
