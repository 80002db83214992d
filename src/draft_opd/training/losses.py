"""Divergences and objectives of Draft-OPD, as pure functions.

Shapes: N blocks, K offsets, V vocabulary. p is the target's distribution in the draft-induced
state, q the drafter's; both come as logits. `accepted` [N] is the accepted length n: offsets
1..n were accepted, n+1.. rejected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- per-token scores: draft logits [..., V], target logits [..., V] or labels [...] -> [...] ----


def forward_kl(draft_logits: Tensor, target_logits: Tensor) -> Tensor:
    """KL(p || q) = Σ_v p log(p / q): mass-covering."""
    log_p = target_logits.log_softmax(-1)
    return _expectation(log_p, log_p - draft_logits.log_softmax(-1))


def reverse_kl(draft_logits: Tensor, target_logits: Tensor) -> Tensor:
    """KL(q || p) = Σ_v q log(q / p): mode-seeking."""
    log_q = draft_logits.log_softmax(-1)
    return _expectation(log_q, log_q - target_logits.log_softmax(-1))


def _expectation(log_weights: Tensor, values: Tensor) -> Tensor:
    """Σ_v w_v x_v, where tokens of no weight count nothing whatever x is (-inf logits)."""
    weights = log_weights.exp()
    return (weights * values.masked_fill(weights == 0, 0.0)).sum(-1)


def cross_entropy(draft_logits: Tensor, labels: Tensor) -> Tensor:
    """-log q(label)."""
    return -draft_logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def overlap(draft_logits: Tensor, target_logits: Tensor) -> Tensor:
    """Σ_v min(p, q): the probability that a sampled draft token is accepted."""
    return torch.minimum(draft_logits.softmax(-1), target_logits.softmax(-1)).sum(-1)


# ---- weights -----------------------------------------------------------------------------------


def position_decay(length: int, gamma: float, like: Tensor) -> Tensor:
    """γ^(k-1) for k = 1..length."""
    return gamma ** torch.arange(length, device=like.device, dtype=torch.float64)


@dataclass
class LossParts:
    """0-d tensors; `accepted` and `rejected` are the two streams' means before λ."""

    total: Tensor
    accepted: Tensor
    rejected: Tensor


def stream_weights(
    accepted: Tensor, length: int, valid: Tensor | None, gamma: float
) -> tuple[Tensor, Tensor]:
    """Raw weights [N, K] of the two streams: 1 on accepted offsets, γ^(k-1) on rejected ones."""
    offsets = torch.arange(length, device=accepted.device)
    is_accepted = offsets < accepted[:, None]
    valid = torch.ones_like(is_accepted) if valid is None else valid.bool()
    decay = position_decay(length, gamma, accepted)
    return (is_accepted & valid).double(), (~is_accepted & valid) * decay


def combine_streams(
    accepted_score: Tensor,
    rejected_score: Tensor,
    accepted_raw: Tensor,
    rejected_raw: Tensor,
    accepted_weight: float,
    rejected_weight: float,
    normalization: str,
) -> LossParts:
    """Scores and raw weights of both streams (any equal shapes) -> the loss.

    `streams` (the paper): (λ_a Σ w_a s_a / Σ w_a + λ_r Σ w_r s_r / Σ w_r) / (λ_a + λ_r).
    `tokens` (its public code): (λ_a Σ w_a s_a + λ_r Σ w_r s_r) / (λ_a Σ w_a + λ_r Σ w_r).
    An empty stream contributes nothing.
    """
    dtype = accepted_score.dtype
    # A score where the weight is zero may be anything (padding): keep it out, not times zero.
    a_sum = torch.where(accepted_raw > 0, accepted_score * accepted_raw.to(dtype), 0.0).sum()
    r_sum = torch.where(rejected_raw > 0, rejected_score * rejected_raw.to(dtype), 0.0).sum()
    a_mass, r_mass = accepted_raw.sum().to(dtype), rejected_raw.sum().to(dtype)
    tiny = torch.finfo(dtype).tiny
    a_mean, r_mean = a_sum / a_mass.clamp_min(tiny), r_sum / r_mass.clamp_min(tiny)
    if normalization == "streams":
        total = (accepted_weight * a_mean + rejected_weight * r_mean) / (
            accepted_weight + rejected_weight
        )
    elif normalization == "tokens":
        mass = accepted_weight * a_mass + rejected_weight * r_mass
        total = (accepted_weight * a_sum + rejected_weight * r_sum) / mass.clamp_min(tiny)
    else:
        raise ValueError(f"normalization must be 'streams' or 'tokens', not {normalization!r}")
    return LossParts(total, a_mean, r_mean)


def acceptance_aware_loss(
    draft_logits: Tensor,
    target_logits: Tensor,
    accepted: Tensor,
    *,
    valid: Tensor | None = None,
    gamma: float = 0.8,
    accepted_weight: float = 1.0,
    rejected_weight: float = 1.0,
    normalization: str = "streams",
) -> LossParts:
    """Draft-OPD's loss (paper, §1.1 of our notes), exact over the vocabulary.

    Forward KL(p || q) on accepted offsets; reverse KL(q || p), weighted γ^(k-1), on rejected ones.

    Args:
        draft_logits, target_logits: [N, K, V]; target logits in the draft-induced state.
        accepted: [N] accepted lengths.
        valid: [N, K], False where an offset carries no supervision (past the end of the text).
        gamma: position decay of the rejected stream; k is the offset in the block, 1-based.
        accepted_weight, rejected_weight: λ_acc, λ_rej.
        normalization: "streams" (paper) or "tokens" (its public code).

    Raises:
        ValueError: shapes do not agree, or an unknown normalization.
    """
    if draft_logits.shape != target_logits.shape or accepted.shape != draft_logits.shape[:1]:
        raise ValueError(
            f"draft logits {list(draft_logits.shape)}, target logits {list(target_logits.shape)} "
            f"and accepted {list(accepted.shape)} do not belong together"
        )
    if valid is not None:
        # Padding may hold anything; 0 times NaN would still spoil the gradient.
        blank = ~valid.bool()[..., None]
        draft_logits, target_logits = (
            x.masked_fill(blank, 0.0) for x in (draft_logits, target_logits)
        )
    a_raw, r_raw = stream_weights(accepted, draft_logits.shape[1], valid, gamma)
    return combine_streams(
        forward_kl(draft_logits, target_logits),
        reverse_kl(draft_logits, target_logits),
        a_raw,
        r_raw,
        accepted_weight,
        rejected_weight,
        normalization,
    )


def expected_length(log_accept: Tensor, valid: Tensor) -> Tensor:
    """Σ_k Π_{j<=k} a_j for log a [N, K] -> [N]: the expected number of accepted draft tokens
    when offset j survives with probability a_j. Offsets that are not `valid` end the block."""
    survival = log_accept.masked_fill(~valid, 0.0).cumsum(-1).exp()
    return (survival * valid).sum(-1)


# ---- the LM head in chunks ---------------------------------------------------------------------

Score = Callable[..., Tensor]


class _ChunkedScore(torch.autograd.Function):
    """Per-token scores whose gradient to the hidden states is computed on the way.

    A token's score depends on its own hidden state alone, so ∂s_i/∂h_i [tokens, H] is all that
    has to be kept; logits exist for one chunk at a time.
    """

    @staticmethod
    def forward(ctx, hidden, weight, score, chunk, teacher_hidden, teacher_weight, scale, labels):
        scores = hidden.new_empty(len(hidden), dtype=_wide(hidden.dtype))
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            h = hidden[part].detach().requires_grad_(gradient is not None)
            reference = labels[part] if labels is not None else None
            if teacher_hidden is not None:
                logits = F.linear(teacher_hidden[part].to(teacher_weight.dtype), teacher_weight)
                reference = logits.to(scores.dtype) * scale
            with torch.enable_grad():
                logits = F.linear(h.to(weight.dtype), weight).to(scores.dtype)
                s = score(logits, reference)
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
    chunk: int | None = None,
) -> Tensor:
    """`score(hidden @ weight.T, reference)` per token, without [tokens, V] ever existing whole.

    Args:
        score: one of the per-token scores above.
        hidden: [tokens, H], receives gradient.
        weight: LM head [V, H], frozen.
        teacher_hidden, teacher_weight: [tokens, Ht], [V, Ht]: the target's side, when the score
            compares distributions; its logits are divided by `temperature`.
        labels: [tokens], when the score compares with a token.
        chunk: tokens at a time; by default about 16M logits.

    Returns: [tokens] scores, float32 (float64 for float64 input), differentiable in `hidden`.
    """
    chunk = chunk or max(16, (1 << 24) // weight.shape[0])
    teacher_weight = weight if teacher_weight is None else teacher_weight
    return _ChunkedScore.apply(
        hidden, weight, score, chunk, teacher_hidden, teacher_weight, 1.0 / temperature, labels
    )
