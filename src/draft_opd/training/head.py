"""Per-token scores through the LM head, in chunks: [tokens, vocabulary] never exists whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# score(draft logits [..., V], *references) -> [...]; references as they are given: target logits
# [..., V], then labels [...].
Score = Callable[..., Tensor]


class _ChunkedScore(torch.autograd.Function):
    """Per-token scores whose gradient to the hidden states is computed on the way.

    A token's score depends on its own hidden state alone, so ∂s_i/∂h_i [tokens, H] is all that
    has to be kept; logits exist for one chunk at a time.
    """

    @staticmethod
    def forward(ctx, hidden, weight, score, chunk, teacher_hidden, teacher_weight, scales, labels):
        scores = hidden.new_empty(len(hidden), dtype=_wide(hidden.dtype))
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        draft_scale, target_scale = scales
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            h = hidden[part].detach().requires_grad_(gradient is not None)
            references = []
            if teacher_hidden is not None:
                logits = F.linear(teacher_hidden[part].to(teacher_weight.dtype), teacher_weight)
                references.append(logits.to(scores.dtype) * target_scale)
            if labels is not None:
                references.append(labels[part])
            with torch.enable_grad():
                logits = F.linear(h.to(weight.dtype), weight).to(scores.dtype) * draft_scale
                s = score(logits, *references)
                if gradient is not None:
                    gradient[part] = torch.autograd.grad(s.sum(), h)[0]
            scores[part] = s.detach()
        ctx.save_for_backward(gradient)
        return scores

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[:, None].to(gradient.dtype), *[None] * 7)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunked_score(
    score: Score,
    hidden: Tensor,
    weight: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    draft_temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """`score(hidden @ weight.T, *references)` per token.

    Args:
        score: one of the per-token scores of `losses`.
        hidden: [tokens, H], receives gradient.
        weight: LM head [V, H], frozen.
        teacher_hidden, teacher_weight: [tokens, Ht], [V, Ht]: the target's side, when the score
            compares distributions; its logits are divided by `temperature`.
        labels: [tokens], when the score looks at one token.
        draft_temperature: divides the drafter's logits.
        chunk: tokens at a time; by default about 16M logits.

    Returns: [tokens] scores, float32 (float64 for float64 input), differentiable in `hidden`.
    """
    chunk = chunk or max(16, (1 << 24) // weight.shape[0])
    teacher_weight = weight if teacher_weight is None else teacher_weight
    scales = (1.0 / draft_temperature, 1.0 / temperature)
    return _ChunkedScore.apply(
        hidden, weight, score, chunk, teacher_hidden, teacher_weight, scales, labels
    )
