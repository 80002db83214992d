"""How a drafter grows a tree of drafts, depth by depth (EAGLE-2's expansion, without its second
ranking)."""

from __future__ import annotations

from torch import Tensor


def best_children(logits: Tensor, score: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `width` most probable children of W nodes.

    logits [batch, W, V], score [batch, W] (log-probability of the path so far). Returns their
    tokens, parents (0..W-1) and scores, [batch, width] each, best first.
    """
    total = logits.float().log_softmax(-1) + score[..., None]
    scores, flat = total.flatten(1).topk(min(width, total[0].numel()), -1)
    size = logits.shape[-1]
    return flat % size, flat // size, scores
