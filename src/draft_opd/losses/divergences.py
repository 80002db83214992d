"""Divergences and objectives of Draft-OPD, as pure functions.

Shapes: N blocks, K offsets, V vocabulary. p is the target's distribution in the draft-induced
state, q the drafter's; both come as logits. `accepted` [N] is the accepted length n: offsets
1..n were accepted, n+1.. rejected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# score(draft logits [..., V], *references) -> [...]; references as they are given: target logits
# [..., V], then labels [...].
Score = Callable[..., Tensor]

# ---- per-token scores: draft logits [..., V], then target logits [..., V], then labels [...] -----


def forward_kl(draft_logits: Tensor, target_logits: Tensor) -> Tensor:
    """KL(p || q) = Σ_v p log(p / q): mass-covering.

    Over what can be drafted: where the draft logits are -inf (a draft vocabulary), p is left out
    and the rest of it normalised.
    """
    log_p = target_logits.masked_fill(draft_logits == -torch.inf, -torch.inf).log_softmax(-1)
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


def rank_of_label(draft_logits: Tensor, labels: Tensor) -> Tensor:
    """How many tokens have a larger logit than the label; no gradient."""
    return (draft_logits > draft_logits.gather(-1, labels[..., None])).sum(-1).to(draft_logits.dtype)


def overlap(draft_logits: Tensor, target_logits: Tensor) -> Tensor:
    """Σ_v min(p, q): the probability that a sampled draft token is accepted."""
    return torch.minimum(draft_logits.softmax(-1), target_logits.softmax(-1)).sum(-1)


def total_variation(draft_logits: Tensor, target_logits: Tensor) -> Tensor:
    """1 - Σ_v min(p, q): the probability that a sampled draft token is rejected."""
    return 1 - overlap(draft_logits, target_logits)


def negative_log_overlap(draft_logits: Tensor, target_logits: Tensor) -> Tensor:
    """-log Σ_v min(p, q)."""
    shared = torch.minimum(draft_logits.log_softmax(-1), target_logits.log_softmax(-1))
    return -shared.logsumexp(-1)


def top_k(score: Score, k: int) -> Score:
    """A divergence over the target's k most likely tokens and one bucket with the rest."""

    def coarse(draft_logits: Tensor, target_logits: Tensor) -> Tensor:
        if score is forward_kl:  # over what can be drafted, as there
            target_logits = target_logits.masked_fill(draft_logits == -torch.inf, -torch.inf)
        log_p, log_q = target_logits.log_softmax(-1), draft_logits.log_softmax(-1)
        kept, ids = log_p.topk(min(k, log_p.shape[-1] - 1), -1)
        # Divergences normalise what they get; k tokens and their rest are normalised already.
        return score(_with_rest(log_q.gather(-1, ids)), _with_rest(kept))

    return coarse


def _with_rest(log_probs: Tensor) -> Tensor:
    tiny = torch.finfo(log_probs.dtype).tiny
    rest = (1 - log_probs.exp().sum(-1, keepdim=True)).clamp_min(tiny).log()
    return torch.cat([log_probs, rest], -1)


LARGEST = 10.0  # nats; of a single-token estimate


def sampled(form: str, direction: str, largest: float = LARGEST) -> Score:
    """Estimates a divergence from one token, as the paper's public code does.

    With r = log q(x) - log p(x): k1, k2, k3 of KL(p || q) are -r, r²/2 and e^r - 1 - r (unbiased
    for x ~ p: k1, k3); of KL(q || p) the same with r negated, for x ~ q. `bernoulli` is the exact
    divergence of the two outcomes "x" and "not x". Log-probabilities are cut at
    -`largest`, the estimate to ±`largest`: one unlikely token would outweigh a batch.
    """
    if form not in ("k1", "k2", "k3", "bernoulli"):
        raise ValueError(f"form must be k1, k2, k3 or bernoulli, not {form!r}")

    def estimate(draft_logits: Tensor, target_logits: Tensor, tokens: Tensor) -> Tensor:
        log_q, log_p = (
            x.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].clamp_min(-largest)
            for x in (draft_logits, target_logits)
        )
        under, over = (log_p, log_q) if direction == "forward" else (log_q, log_p)
        r = over - under
        if form == "bernoulli":
            nearly_one = 1 - torch.finfo(r.dtype).eps
            a, b = under.exp().clamp_max(nearly_one), over.exp().clamp_max(nearly_one)
            value = a * (under - over) + (1 - a) * ((1 - a).log() - (1 - b).log())
        else:
            value = {"k1": -r, "k2": r.square() / 2, "k3": r.expm1() - r}[form]
        return value.clamp(-largest, largest)

    return estimate


# ---- weights -----------------------------------------------------------------------------------


def position_decay(num_draft_tokens: int, gamma: float, like: Tensor) -> Tensor:
    """γ^(k-1) for k = 1..num_draft_tokens."""
    return gamma ** torch.arange(num_draft_tokens, device=like.device, dtype=torch.float64)


@dataclass
class LossParts:
    """0-d tensors; `accepted` and `rejected` are the two streams' means before λ."""

    total: Tensor
    accepted: Tensor
    rejected: Tensor


def stream_weights(
    accepted: Tensor,
    num_draft_tokens: int,
    valid: Tensor | None,
    gamma: float,
    accepted_gamma: float = 1.0,
    correction: bool = False,
    suffix: bool = True,
) -> tuple[Tensor, Tensor]:
    """Raw weights [N, K] of the two streams: γ_acc^(k-1) on offsets 1..n, γ^(k-1) on n+1...

    `correction` puts offset n+1 into the accepted stream too (the public code trains the target's
    own token there); without `suffix` the rejected stream is offset n+1 alone.
    """
    offsets = torch.arange(num_draft_tokens, device=accepted.device)
    n = accepted[:, None]
    valid = torch.ones_like(offsets < n) if valid is None else valid.bool()
    in_accepted = (offsets < n + 1) if correction else (offsets < n)
    in_rejected = (offsets >= n) if suffix else (offsets == n)
    return (
        (in_accepted & valid) * position_decay(num_draft_tokens, accepted_gamma, accepted),
        (in_rejected & valid) * position_decay(num_draft_tokens, gamma, accepted),
    )


def up_to_first_rejection(accepted: Tensor, valid: Tensor) -> Tensor:
    """[N] accepted lengths, [N, K] -> [N, K]: offsets 1..n+1 that are valid."""
    offsets = torch.arange(valid.shape[-1], device=valid.device)
    return (offsets <= accepted[:, None]) & valid


def dpace_weights(label_probability: Tensor, valid: Tensor, alpha: float = 0.5) -> Tensor:
    """D-PACE (arXiv 2605.18810): w_j = Σ_{m>=j} Π_{i<=m} q~_i with q~ = (1 - α) q(y) + α; no
    gradient.

    label_probability, valid: [N, K]; offsets that are not valid end the block.
    """
    smooth = (1 - alpha) * label_probability.detach() + alpha
    survival = torch.where(valid, smooth, 0.0).cumprod(-1)
    return survival.flip(-1).cumsum(-1).flip(-1)


def combine_streams(
    accepted_score: Tensor,
    rejected_score: Tensor,
    accepted_raw: Tensor,
    rejected_raw: Tensor,
    accepted_weight: float,
    rejected_weight: float,
    normalization: str,
    total: Callable[[Tensor], Tensor] = lambda mass: mass,
) -> LossParts:
    """Scores and raw weights of both streams (any equal shapes) -> the loss.

    `total` sums a weight over all processes (all-reduce). The loss is divided by that sum, so the
    losses of all processes add up to the loss of the whole batch.

    `streams` (the paper): (λ_a Σ w_a s_a / Σ w_a + λ_r Σ w_r s_r / Σ w_r) / (λ_a + λ_r).
    `tokens` (its public code): (λ_a Σ w_a s_a + λ_r Σ w_r s_r) / (λ_a Σ w_a + λ_r Σ w_r).
    An empty stream contributes nothing.
    """
    dtype = accepted_score.dtype
    # A score where the weight is zero may be anything (padding): keep it out, not times zero.
    a_sum = torch.where(accepted_raw > 0, accepted_score * accepted_raw.to(dtype), 0.0).sum()
    r_sum = torch.where(rejected_raw > 0, rejected_score * rejected_raw.to(dtype), 0.0).sum()
    a_mass, r_mass = (total(raw.sum()).to(dtype) for raw in (accepted_raw, rejected_raw))
    tiny = torch.finfo(dtype).tiny
    a_mean, r_mean = a_sum / a_mass.clamp_min(tiny), r_sum / r_mass.clamp_min(tiny)
    if normalization == "streams":
        loss = (accepted_weight * a_mean + rejected_weight * r_mean) / (accepted_weight + rejected_weight)
    elif normalization == "tokens":
        mass = accepted_weight * a_mass + rejected_weight * r_mass
        loss = (accepted_weight * a_sum + rejected_weight * r_sum) / mass.clamp_min(tiny)
    else:
        raise ValueError(f"normalization must be 'streams' or 'tokens', not {normalization!r}")
    return LossParts(loss, a_mean, r_mean)


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
    """Draft-OPD's loss (arXiv 2605.29343, its acceptance-aware objective), exact over the
    vocabulary.

    >>> import torch
    >>> p, q = torch.zeros(1, 2, 4), torch.tensor([[[0.0, 0, 0, 0], [2, 0, 0, 0]]])
    >>> loss = acceptance_aware_loss(q, p, torch.tensor([1]))  # offset 1 accepted, 2 rejected
    >>> bool(loss.accepted == 0), bool(loss.rejected > 0)
    (True, True)

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
        draft_logits, target_logits = (x.masked_fill(blank, 0.0) for x in (draft_logits, target_logits))
    if draft_logits.dtype != torch.float64:
        draft_logits, target_logits = draft_logits.float(), target_logits.float()
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
