"""Stage 1: teacher-forced cross-entropy at random anchors of the target's own text."""

from __future__ import annotations

import math

from torch import Tensor

from draft_opd.drafters.base import Drafter
from draft_opd.target import Target
from draft_opd.training.anchors import random_anchors
from draft_opd.training.blocks import pack, replay
from draft_opd.training.data import Batch
from draft_opd.training.objectives import decayed_cross_entropy


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
