"""Stage 1: teacher-forced training at random anchors of the target's own text.

With the text's tokens, or the target's distributions (EAGLE-3's unrolled blocks are then the training-time
test).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from draft_opd.decoding.sampling import Sampling
from draft_opd.drafters.base import Drafter
from draft_opd.losses.config import Heads
from draft_opd.losses.heads import with_heads
from draft_opd.losses.sft import SFT_LOSSES
from draft_opd.models.target import Target
from draft_opd.training.anchors import random_anchors
from draft_opd.training.batches import Batch
from draft_opd.training.blocks import pack_anchors, replay, text_states
from draft_opd.training.precision import autocast
from draft_opd.training.stage import StageContext, StepOutput


def _loss_kind(drafter: Drafter, asked: str) -> str:
    return drafter.sft_loss if asked == "auto" else asked


def sft_loss(
    target: Target,
    drafter: Drafter,
    batch: Batch,
    *,
    anchors: int,
    num_draft_tokens: int,
    decay: float | None,
    seed: str,
    loss: str = "auto",
    heads: Heads | None = None,
    sampling: Sampling | None = None,
    total: Callable[[Tensor], Tensor] = Tensor.detach,
) -> tuple[Tensor, dict]:
    """The loss of one batch and figures for the metrics; `total` as in `ReplayedBlocks`. sampling: how
    drafts will be picked."""
    heads, sampling = heads or Heads(), sampling or Sampling()
    chosen = SFT_LOSSES[_loss_kind(drafter, loss)]
    agreement = heads.learns_agreement(sampling.takes_argmax)
    rows = random_anchors(batch, anchors, seed)
    blocks = pack_anchors(batch, rows, num_draft_tokens)
    blocks = replace(blocks, drafted=blocks.labels)  # teacher-forced
    soft = chosen.needs_target_states or (drafter.has_confidence and not agreement)
    states = text_states(batch, blocks) if soft else None
    replayed = replay(target, drafter, batch, blocks, states, total=total)
    return with_heads(
        replayed,
        lambda r: (chosen.loss(r, decay), {"supervised": int(r.reachable.sum())}),
        heads,
        agreement=agreement,
        along_text=True,
        temperature=sampling.temperature or 1.0,
        decay=decay,
    )


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
                    loss=sft.loss,
                    heads=c.recipe.heads,
                    sampling=c.recipe.sampling,
                    total=c.group.all_reduce_sum,
                )
            )

    def summarize(self, metrics: dict) -> dict:
        drafter, loss = self.context.drafter, self.context.recipe.sft.loss
        other = drafter.has_confidence or drafter.num_candidates is not None
        if other or _loss_kind(drafter, loss) != "cross_entropy":
            return metrics
        return {**metrics, "perplexity": math.exp(min(metrics["loss"], 50))}
