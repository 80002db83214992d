"""Losses of stage 1, on the text's tokens or the target's distributions along it; each a decayed mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from draft_opd.losses.divergences import cross_entropy, forward_kl, total_variation
from draft_opd.losses.objectives import ReplayedBlocks, decayed, decayed_cross_entropy

# Weights of the DSpark paper (arXiv 2607.05147) and its code: of CE, and of L1 = Σ_v |q - p|.
DSPARK_CE, DSPARK_L1 = 0.1, 0.9


@dataclass(frozen=True)
class SftLoss:
    """loss(replay, γ_sft or None for the family's) -> 0-d; whether it reads the target's distributions."""

    loss: Callable[[ReplayedBlocks, float | None], Tensor]
    needs_target_states: bool = False


def decayed_divergence(r: ReplayedBlocks, decay: float | None = None) -> Tensor:
    """`decayed_cross_entropy` with KL(p || q): the soft cross-entropy up to a constant."""
    return decayed(r, r.score(forward_kl, r.reachable), decay)


def dspark(r: ReplayedBlocks, decay: float | None = None) -> Tensor:
    """0.1 CE + 0.9 L1 (arXiv 2607.05147, without its confidence loss, which `heads.py` adds)."""
    return decayed(r, r.score(_cross_entropy_and_l1, r.reachable, r.labels), decay)


def _cross_entropy_and_l1(draft_logits: Tensor, target_logits: Tensor, labels: Tensor) -> Tensor:
    """Both at once: the head is multiplied once. L1 is twice the total variation."""
    distance = 2 * total_variation(draft_logits, target_logits)
    return DSPARK_CE * cross_entropy(draft_logits, labels) + DSPARK_L1 * distance


SFT_LOSSES = {
    "cross_entropy": SftLoss(decayed_cross_entropy),
    "forward_kl": SftLoss(decayed_divergence, True),
    "dspark": SftLoss(dspark, True),
}
