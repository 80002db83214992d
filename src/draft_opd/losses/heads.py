"""Losses of what some families have beside the logits that they draft from.

DSpark's confidence head says how likely an offset passes, given that those before it did. A DFlash2 drafter
chooses among candidates of its body, so the body needs a loss of its own: the selector's reaches only what
is a candidate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from draft_opd.losses.chunked import chunked_score
from draft_opd.losses.config import Heads
from draft_opd.losses.divergences import overlap, up_to_first_rejection
from draft_opd.losses.objectives import ReplayedBlocks, decayed


def with_heads(
    r: ReplayedBlocks,
    loss_of: Callable[[ReplayedBlocks], tuple[Tensor, dict]],
    heads: Heads,
    *,
    agreement: bool,
    along_text: bool,
    temperature: float = 1.0,
    decay: float | None = None,
) -> tuple[Tensor, dict]:
    """`loss_of(r)` and the losses of the other heads, as far as the drafter has them.

    agreement: the confidence learns whether the argmax is the text's token; else the overlap Σ min(p, q) at
    `temperature`. along_text: the blocks hold the text's tokens; else they do so up to the first rejection.
    decay: γ_sft; None: the family's.
    """
    loss, figures = loss_of(r)
    if r.num_candidates is not None and heads.body_weight:
        loss = loss + heads.body_weight * loss_of(r.body)[0]
    if r.confidence is not None and not heads.confidence_weight:
        loss = loss + 0 * r.confidence.sum()  # DDP waits for every parameter's gradient
    elif r.confidence is not None:
        where = reached(r) if along_text else up_to_first_rejection(r.accepted, reached(r))
        confidence = confidence_loss(r, where, agreement, temperature, decay)
        loss = loss + heads.confidence_weight * confidence
        figures = {**figures, "confidence_loss": confidence.item()}
    return loss, figures


def reached(r: ReplayedBlocks) -> Tensor:
    """[N, K]: valid, and all earlier labels of the block can be drafted. This one need not: it then fails."""
    if r.draftable is None:
        return r.valid
    before = torch.cat([torch.ones_like(r.draftable[:, :1]), r.draftable[:, :-1]], 1)
    return r.valid & before.cumprod(1).bool()


def confidence_loss(
    r: ReplayedBlocks, where: Tensor, agreement: bool, temperature: float = 1.0, decay: float | None = None
) -> Tensor:
    """Σ w_k BCE(c_k, a_k) / Σ w_k, SFT's weights, over `where` [N, K]; a: what passes, without gradient."""
    if agreement:
        passed = agreed(r, where)
    else:
        warm = {"supervision_temperature": temperature, "draft_temperature": temperature}
        passed = replace(r, hidden=r.hidden.detach(), **warm).score(overlap, where)
    values = F.binary_cross_entropy_with_logits(
        r.confidence.float(), passed.float().clamp(0, 1), reduction="none"
    )
    return decayed(r, values, decay, where)


@torch.no_grad()
def agreed(r: ReplayedBlocks, where: Tensor) -> Tensor:
    """[N, K]: 1 where the drafter's argmax is the text's token, 0 elsewhere and outside of `where`."""
    found = chunked_score(
        _is_argmax,
        r.hidden[where].detach(),
        [w.detach() for w in r.head],
        labels=r.labels[where],
        teacher_weight=r.target_head,
        vocabulary=r.vocabulary,
        draft_map=r.draft_map,
    )
    return torch.zeros(where.shape, dtype=found.dtype, device=found.device).masked_scatter(where, found)


def _is_argmax(draft_logits: Tensor, labels: Tensor) -> Tensor:
    return (draft_logits.argmax(-1) == labels).to(draft_logits.dtype)
