"""Per-token scores through the LM head, in chunks: [tokens, vocabulary] never exists whole.

A head may have several parts, which add up: a drafter's hidden states are then as many vectors side by side,
as with a frozen head and a trained correction that depends on the token before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draft_opd.drafters.base import over_target
from draft_opd.losses.closed_form import CLOSED
from draft_opd.losses.divergences import Score
from draft_opd.losses.fused_kernels import FUSED, available
from draft_opd.models.cpu_linear import multiplier
from draft_opd.models.logit_map import IDENTITY, LogitMap
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
    num_candidates: int | None
    draft_map: LogitMap

    def chunks(
        self, hidden: Tensor, weights: Sequence[Tensor], gradient: bool
    ) -> Iterator[tuple[slice, Tensor, Tensor | None, Tensor | None]]:
        """Rows, their scores, and (asked for) the scores' gradients to the logits, and `draft_map`'s slope,
        with which those are multiplied for the head's first part."""
        products = [multiplier(weight, len(hidden)) for weight in weights]
        teacher_logits_of = products[0]
        if self.teacher_hidden is not None and self.teacher_weight.data_ptr() != weights[0].data_ptr():
            teacher_logits_of = multiplier(self.teacher_weight, len(hidden))
        wide, fused = _wide(hidden.dtype), None
        if gradient and self.vocabulary is None and self.num_candidates is None and wide == torch.float32:
            fused = FUSED.get(self.score) if available(hidden.device) else None
        for start in range(0, len(hidden), self.chunk):
            part = slice(start, start + self.chunk)
            pieces = _pieces(hidden[part], weights)
            draft, bend = products[0](pieces[0].to(weights[0].dtype)), None
            if not self.draft_map.is_identity:
                raw = draft.to(wide)
                draft, bend = self.draft_map(raw), self.draft_map.slope(raw) if gradient else None
            unary = draft
            for product, piece, weight in zip(products[1:], pieces[1:], weights[1:], strict=True):
                draft = draft + product(piece.to(weight.dtype)).to(draft.dtype)
            target = labels = None
            if self.teacher_hidden is not None:
                states = self.teacher_hidden[part].to(self.teacher_weight.dtype)
                target = self.teacher_map(teacher_logits_of(states))
            if self.labels is not None:
                labels = self.labels[part]
            if self.num_candidates is not None:
                draft = draft.masked_fill(~candidate_mask(unary, self.num_candidates, labels), -torch.inf)
            if fused is not None:
                yield part, *fused(draft, target, labels, self.draft_scale, self.target_scale), bend
                continue
            if target is not None:
                target = _scaled_(target.to(wide), self.target_scale)
            draft = _scaled_(draft.to(wide), self.draft_scale)
            scores, slope = self._scores(draft, target, labels, gradient)
            yield part, scores, None if slope is None else _scaled_(slope, self.draft_scale), bend

    def _scores(self, draft, target, labels, gradient: bool) -> tuple[Tensor, Tensor | None]:
        if gradient and self.score in CLOSED and self.num_candidates is None:
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
    def forward(ctx, hidden, scoring, *weights):
        ctx.scoring, ctx.trained = scoring, ctx.needs_input_grad[2:]
        kind = hidden.device.type
        enabled = torch.is_autocast_enabled(kind)
        ctx.autocast = (kind, torch.get_autocast_dtype(kind) if enabled else None, enabled)
        scores = hidden.new_empty(len(hidden), dtype=_wide(hidden.dtype))
        early = ctx.needs_input_grad[0] and not any(ctx.trained)
        gradient = torch.empty_like(hidden) if early else None
        back = _Back(weights, hidden) if early else None
        for part, found, slope, bend in scoring.chunks(hidden.detach(), [w.detach() for w in weights], early):
            scores[part] = found
            if early:
                gradient[part] = back(_by_part(slope, bend, len(weights)))
        ctx.save_for_backward(*((hidden, *weights) if any(ctx.trained) else (gradient,)))
        return scores

    @staticmethod
    def backward(ctx, upstream):
        if not any(ctx.trained):
            (gradient,) = ctx.saved_tensors
            return gradient * upstream[:, None].to(gradient.dtype), None, *(None for _ in ctx.trained)
        hidden, *weights = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden)
        to_weights = [torch.zeros_like(w) if t else None for w, t in zip(weights, ctx.trained, strict=True)]
        with torch.autocast(*ctx.autocast):  # as it was: the same logits again
            back = _Back(weights, hidden)
            for part, _, slope, bend in ctx.scoring.chunks(hidden, weights, True):
                slopes = _by_part(slope.mul_(upstream[part, None]), bend, len(weights))
                to_hidden[part] = back(slopes)
                for found, piece, own in zip(to_weights, _pieces(hidden[part], weights), slopes, strict=True):
                    if found is not None:
                        found += own.to(found.dtype).t() @ piece.to(found.dtype)
        return to_hidden, None, *to_weights


class _Back:
    """Gradients to the output of each of the head's parts [n, Vd] -> those of the hidden states [n, H]."""

    def __init__(self, weights: Sequence[Tensor], hidden: Tensor):
        self.weights, self.dtype = weights, hidden.dtype
        self.products = [multiplier(w.t(), len(hidden)) for w in weights]

    def __call__(self, slopes: Sequence[Tensor]) -> Tensor:
        found = [
            product(slope.to(w.dtype)).to(self.dtype)
            for product, w, slope in zip(self.products, self.weights, slopes, strict=True)
        ]
        return found[0] if len(found) == 1 else torch.cat(found, -1)


def _by_part(slope: Tensor, bend: Tensor | None, parts: int) -> list[Tensor]:
    """The gradient [n, Vd] to each part's own output; `bend` is that of the map behind the first."""
    return [slope if bend is None else slope * bend, *[slope] * (parts - 1)]


def _pieces(hidden: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """The parts of hidden states [n, H] that the head's parts multiply."""
    return (hidden,) if len(weights) == 1 else hidden.split([w.shape[1] for w in weights], -1)


def candidate_mask(unary: Tensor, count: int, labels: Tensor | None = None) -> Tensor:
    """Where logits [..., V] are among the `count` largest; and at `labels` [...]: a loss must reach them."""
    mask = torch.zeros_like(unary, dtype=torch.bool)
    mask.scatter_(-1, unary.topk(min(count, unary.shape[-1]), -1).indices, True)
    return mask if labels is None else mask.scatter_(-1, labels[..., None], True)


def _scaled_(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x.mul_(scale)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunked_score(
    score: Score,
    hidden: Tensor,
    weight: Tensor | Sequence[Tensor],
    *,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_map: Callable[[Tensor], Tensor] = lambda logits: logits,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    draft_temperature: float = 1.0,
    vocabulary: Tensor | None = None,
    num_candidates: int | None = None,
    draft_map: LogitMap = IDENTITY,
    chunk: int | None = None,
) -> Tensor:
    """`score(hidden @ weight.T, *references)` per token.

    Args:
        score: one of the per-token scores of `losses`.
        hidden: [tokens, H], receives gradient.
        weight: LM head [V, H], or [Vd, H] over a draft vocabulary. Where it is trained, the chunks
            are computed again in the backward pass. Several parts [V, H_i]: their products with the parts
            of hidden, Σ H_i = H, are added.
        teacher_hidden, teacher_weight: [tokens, Ht], [V, Ht]: the target's side, when the score
            compares distributions; its logits are divided by `temperature`. With a draft vocabulary
            `teacher_weight` is always needed, for V.
        teacher_map: what the target does to its logits behind the head (`LogitMap`).
        labels: [tokens], when the score looks at one token.
        draft_temperature: divides the drafter's logits.
        vocabulary: [Vd] the target's ids of the draft vocabulary; other tokens have q = 0.
        num_candidates: tokens beyond so many of the head's first part have q = 0, but for the label.
        draft_map: what the drafter does to the output of the head's first part.
        chunk: tokens at a time; by default `logits_at_once`.

    Returns: [tokens] scores, float32 (float64 for float64 input), differentiable in `hidden` and,
    where it is trained, `weight`.
    """
    weights = (weight,) if isinstance(weight, Tensor) else tuple(weight)
    teacher_weight = weights[0] if teacher_weight is None else teacher_weight
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
        num_candidates,
        draft_map,
    )
    return _ChunkedScore.apply(hidden, scoring, *weights)
