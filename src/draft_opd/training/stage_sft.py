"""Stage 1: teacher-forced training at random anchors of the target's own text.

Cross-entropy with its tokens (DFlash), or KL to its distributions (EAGLE-3, whose unrolled blocks
are the training-time test).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from draft_opd.drafters.base import Drafter
from draft_opd.losses.objectives import decayed_cross_entropy, decayed_divergence
from draft_opd.models.target import Target
from draft_opd.training.anchors import random_anchors
from draft_opd.training.batches import Batch
from draft_opd.training.blocks import pack_anchors, replay, text_states
from draft_opd.training.precision import autocast
from draft_opd.training.stage import StageContext, StepOutput


def sft_loss(
    target: Target,
    drafter: Drafter,
    batch: Batch,
    *,
    anchors: int,
    num_draft_tokens: int,
    decay: float | None,
    seed: str,
    total: Callable[[Tensor], Tensor] = Tensor.detach,
) -> tuple[Tensor, dict]:
    """The loss of one batch and figures for the metrics; `total` as in `ReplayedBlocks`."""
    rows = random_anchors(batch, anchors, seed)
    blocks = pack_anchors(batch, rows, num_draft_tokens)
    blocks = replace(blocks, drafted=blocks.labels)  # teacher-forced
    states = text_states(batch, blocks) if drafter.soft_labels else None
    replayed = replay(target, drafter, batch, blocks, states, total=total)
    figures = {"supervised": int(replayed.reachable.sum())}
    if drafter.soft_labels:
        return decayed_divergence(replayed, decay), figures
    return decayed_cross_entropy(replayed, decay), figures


class SftStage:
    """SFT on the run's batches."""

    def __init__(self, context: StageContext):
        self.context = context

    def prepare(self, index: int) -> Batch:
        c = self.context
        rows = c.rows(index)
        with c.clock("target"), autocast(c.recipe, c.target.device):
            row_ids = c.group.shard_rows(range(len(rows)))
            return c.source.batch(c.group.shard_rows(rows), row_ids=row_ids)

    def forward_loss(self, prepared: Batch, seed: str) -> StepOutput:
        c, sft = self.context, self.context.recipe.sft
        with c.clock("forward"):
            return StepOutput(
                *sft_loss(
                    c.target,
                    c.drafter,
                    prepared,
                    anchors=sft.anchors,
                    decay=sft.decay,
                    num_draft_tokens=c.num_draft_tokens,
                    seed=seed,
                    total=c.group.all_reduce_sum,
                )
            )

    def summarize(self, metrics: dict) -> dict:
        if self.context.drafter.soft_labels:
            return metrics
        return {**metrics, "perplexity": math.exp(min(metrics["loss"], 50))}
