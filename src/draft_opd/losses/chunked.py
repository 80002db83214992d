"""Per-token scores through the LM head, in chunks: [tokens, vocabulary] never exists whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from draft_opd.drafters.base import over_target
from draft_opd.losses.closed_form import CLOSED
from draft_opd.losses.divergences import Score
from draft_opd.losses.fused_kernels import FUSED, available
from draft_opd.models.cpu_linear import multiplier
from draft_opd.utils.machine import logits_at_once


@dataclass(frozen=True)
class _Scoring:
    """What turns hidden states into scores, apart from what has a gradient."""

    score: Score
    draft_scale: float
    target_scale: float
    vocabulary: Tensor | None
    size: int  # of the target's vocabulary
    chunk: int
    teacher_hidden: Tensor | None
    teacher_weight: Tensor
    labels: Tensor | None
    teacher_map: Callable[[Tensor], Tensor]

    def chunks(
        self, hidden: Tensor, weight: Tensor, gradient: bool
    ) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Rows, their scores and (asked for) the scores' gradients to the LM head's output."""
        draft_logits_of = teacher_logits_of = multiplier(weight, len(hidden))
        if self.teacher_hidden is not None and self.teacher_weight.data_ptr() != weight.data_ptr():
            teacher_logits_of = multiplier(self.teacher_weight, len(hidden))
        wide, fused = _wide(hidden.dtype), None
        if gradient and self.vocabulary is None and wide == torch.float32:
            fused = FUSED.get(self.score) if available(hidden.device) else None
        for start in range(0, len(hidden), self.chunk):
            part = slice(start, start + self.chunk)
            draft = draft_logits_of(hidden[part].to(weight.dtype))
            target = labels = None
            if self.teacher_hidden is not None:
                states = self.teacher_hidden[part].to(self.teacher_weight.dtype)
                target = self.teacher_map(teacher_logits_of(states))
            if self.labels is not None:
                labels = self.labels[part]
            if fused is not None:
                yield part, *fused(draft, target, labels, self.draft_scale, self.target_scale)
                continue
            if target is not None:
                target = _scaled_(target.to(wide), self.target_scale)
            draft = _scaled_(draft.to(wide), self.draft_scale)
            scores, slope = self._scores(draft, target, labels, gradient)
            yield part, scores, None if slope is None else _scaled_(slope, self.draft_scale)

    def _scores(self, draft, target, labels, gradient: bool) -> tuple[Tensor, Tensor | None]:
        if gradient and self.score in CLOSED:
            return CLOSED[self.score](draft, target, labels, self.vocabulary)
        references = [x for x in (target, labels) if x is not None]
        draft.requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            whole = over_target(draft, self.vocabulary, self.size)
            scores = self.score(whole, *references)
            slope = torch.autograd.grad(scores.sum(), draft)[0] if gradient else None
        return scores.detach(), slope


class _ChunkedScore(torch.autograd.Function):
    """A token's score depends on its own hidden state alone. With a frozen head the forward
    pass computes ∂s_i/∂h_i [tokens, H] and keeps nothing else. The gradient of a trained head needs
    the gradient of the scores, so the backward pass computes every chunk again."""

    @staticmethod
    def forward(ctx, hidden, weight, scoring):
        ctx.scoring, ctx.trained = scoring, ctx.needs_input_grad[1]
        kind = hidden.device.type
        enabled = torch.is_autocast_enabled(kind)
        ctx.autocast = (kind, torch.get_autocast_dtype(kind) if enabled else None, enabled)
        scores = hidden.new_empty(len(hidden), dtype=_wide(hidden.dtype))
        early = ctx.needs_input_grad[0] and not ctx.trained
        gradient = torch.empty_like(hidden) if early else None
        back = multiplier(weight.t(), len(hidden)) if early else None
        for part, found, slope in scoring.chunks(hidden.detach(), weight.detach(), early):
            scores[part] = found
            if early:
                gradient[part] = back(slope.to(weight.dtype)).to(gradient.dtype)
        ctx.save_for_backward(*((hidden, weight) if ctx.trained else (gradient,)))
        return scores

    @staticmethod
    def backward(ctx, upstream):
        if not ctx.trained:
            (gradient,) = ctx.saved_tensors
            return gradient * upstream[:, None].to(gradient.dtype), None, None
        hidden, weight = ctx.saved_tensors
        to_hidden, to_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        with torch.autocast(*ctx.autocast):  # as it was: the same logits again
            back = multiplier(weight.t(), len(hidden))
            for part, _, slope in ctx.scoring.chunks(hidden, weight, True):
                slope = slope.mul_(upstream[part, None]).to(weight.dtype)
                to_hidden[part] = back(slope).to(hidden.dtype)
                to_weight += slope.t() @ hidden[part].to(weight.dtype)
        return to_hidden, to_weight, None


def _scaled_(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x.mul_(scale)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunked_score(
    score: Score,
    hidden: Tensor,
    weight: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_map: Callable[[Tensor], Tensor] = lambda logits: logits,
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
        teacher_map: what the target does to its logits behind the head (`LogitMap`).
        labels: [tokens], when the score looks at one token.
        draft_temperature: divides the drafter's logits.
        vocabulary: [Vd] the target's ids of the draft vocabulary; other tokens have q = 0.
        chunk: tokens at a time; by default `logits_at_once`.

    Returns: [tokens] scores, float32 (float64 for float64 input), differentiable in `hidden` and,
    where it is trained, `weight`.
    """
    teacher_weight = weight if teacher_weight is None else teacher_weight
    size = len(teacher_weight)
    chunk = chunk or logits_at_once(hidden.device, size)
    states = None if teacher_hidden is None else teacher_hidden.detach()
    scoring = _Scoring(
        score,
        1.0 / draft_temperature,
        1.0 / temperature,
        vocabulary,
        size,
        chunk,
        states,
        teacher_weight.detach(),
        labels,
        teacher_map,
    )
    return _ChunkedScore.apply(hidden, weight, scoring)
