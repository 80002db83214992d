"""Losses of stage 1, on the text's tokens or the target's distributions along it; each a decayed mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from draft_opd.losses.divergences import forward_kl, total_variation
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
    """0.1 CE + 0.9 L1, where L1 is twice the total variation (arXiv 2607.05147, without its confidence loss,
    which `heads.py` adds)."""
    distance = 2 * decayed(r, r.score(total_variation, r.reachable), decay)
    return DSPARK_CE * decayed_cross_entropy(r, decay) + DSPARK_L1 * distance


SFT_LOSSES = {
    "cross_entropy": SftLoss(decayed_cross_entropy),
    "forward_kl": SftLoss(decayed_divergence, True),
    "dspark": SftLoss(dspark, True),
}
