"""Per-token scores through the LM head, in chunks: [tokens, vocabulary] never exists whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from draft_opd.drafters.base import over_target

# score(draft logits [..., V], *references) -> [...]; references as they are given: target logits
# [..., V], then labels [...].
Score = Callable[..., Tensor]


@dataclass(frozen=True)
class _Scoring:
    """What turns a chunk of hidden states into scores, apart from the tensors."""

    score: Score
    draft_scale: float
    target_scale: float
    vocabulary: Tensor | None
    size: int  # of the target's vocabulary

    def __call__(self, hidden, weight, teacher_hidden, teacher_weight, labels) -> Tensor:
        wide = _wide(hidden.dtype)
        logits = F.linear(hidden.to(weight.dtype), weight).to(wide) * self.draft_scale
        references = []
        if teacher_hidden is not None:
            target = F.linear(teacher_hidden.to(teacher_weight.dtype), teacher_weight)
            references.append(target.to(wide) * self.target_scale)
        if labels is not None:
            references.append(labels)
        return self.score(over_target(logits, self.vocabulary, self.size), *references)


class _ChunkedScore(torch.autograd.Function):
    """Per-token scores whose gradient to the hidden states is computed on the way.

    A token's score depends on its own hidden state alone, so ∂s_i/∂h_i [tokens, H] is all that
    has to be kept; logits exist for one chunk at a time.
    """

    @staticmethod
    def forward(ctx, hidden, weight, scoring, chunk, teacher_hidden, teacher_weight, labels):
        scores = hidden.new_empty(len(hidden), dtype=_wide(hidden.dtype))
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for part in _parts(len(hidden), chunk):
            h = hidden[part].detach().requires_grad_(gradient is not None)
            references = (_cut(teacher_hidden, part), teacher_weight, _cut(labels, part))
            with torch.enable_grad():
                s = scoring(h, weight, *references)
                if gradient is not None:
                    gradient[part] = torch.autograd.grad(s.sum(), h)[0]
            scores[part] = s.detach()
        ctx.save_for_backward(gradient)
        return scores

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[:, None].to(gradient.dtype), *[None] * 6)


def _parts(count: int, chunk: int):
    return (slice(start, start + chunk) for start in range(0, count, chunk))


def _cut(x: Tensor | None, part: slice) -> Tensor | None:
    return None if x is None else x[part]


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
    vocabulary: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """`score(hidden @ weight.T, *references)` per token.

    Args:
        score: one of the per-token scores of `losses`.
        hidden: [tokens, H], receives gradient.
        weight: LM head [V, H], or [Vd, H] over a draft vocabulary. Where it is trained, the chunks
            are computed again in the backward pass.
        teacher_hidden, teacher_weight: [tokens, Ht], [V, Ht]: the target's side, when the score
            compares distributions; its logits are divided by `temperature`. With a draft vocabulary
            `teacher_weight` is always needed, for V.
        labels: [tokens], when the score looks at one token.
        draft_temperature: divides the drafter's logits.
        vocabulary: [Vd] the target's ids of the draft vocabulary; other tokens have q = 0.
        chunk: tokens at a time; by default about 16M logits.

    Returns: [tokens] scores, float32 (float64 for float64 input), differentiable in `hidden` and,
    where it is trained, `weight`.
    """
    teacher_weight = weight if teacher_weight is None else teacher_weight
    size = len(teacher_weight)
    chunk = chunk or max(16, (1 << 24) // size)
    scoring = _Scoring(score, 1.0 / draft_temperature, 1.0 / temperature, vocabulary, size)
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return _ChunkedScore.apply(
            hidden, weight, scoring, chunk, teacher_hidden, teacher_weight, labels
        )
    scores = [
        checkpoint(
            scoring, hidden[part], weight, _cut(teacher_hidden, part), teacher_weight,
            _cut(labels, part), use_reentrant=False, preserve_rng_state=False,
        )
        for part in _parts(len(hidden), chunk)
    ]  # fmt: skip
    return torch.cat(scores) if scores else hidden[:, 0].to(_wide(hidden.dtype))
