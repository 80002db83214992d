"""Acceptance rules of speculative decoding, as pure functions. Decoding, trees, hindsight, training
and check-serving all ask these.

Shapes: N rounds, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from draft_opd.decoding.noise import Noise, pick
from draft_opd.decoding.sampling import Sampling


def accepted_prefix(matches: Tensor) -> Tensor:
    """[N, K] booleans -> [N] length of the leading run of True."""
    return matches.long().cumprod(-1).sum(-1)


def matching_prefix(drafted: Sequence[int], text: Sequence[int]) -> int:
    """How many tokens a draft and a text have in common before they first differ.

    >>> matching_prefix([4, 8, 1], [4, 8, 2, 7])
    2
    """
    for k, (proposed, said) in enumerate(zip(drafted, text, strict=False)):
        if proposed != said:
            return k
    return min(len(drafted), len(text))


def verify(
    drafted: Tensor,
    draft_probs: Tensor | None,
    target_logits: Tensor,
    sampling: Sampling,
    noise: Noise | None = None,
) -> tuple[Tensor, Tensor]:
    """Accepted lengths [N] and bonus tokens [N] of rounds, greedy or sampled.

    drafted [N, K]; draft_probs [N, K, V], None for greedy decoding and where K is 0; target_logits
    [N, K + 1, V]; noise: where the target samples. Raises ValueError where the shapes do not belong
    together.
    """
    if sampling.greedy:
        accepted = verify_greedy(drafted, target_logits)
        rows = torch.arange(len(drafted), device=drafted.device)
        return accepted, target_logits[rows, accepted].argmax(-1)
    if noise is None:
        raise ValueError("verification above temperature 0 needs random numbers")
    probs = sampling.probabilities(target_logits)
    draft_probs = probs[:, :0] if draft_probs is None else draft_probs
    return verify_with_noise(drafted, draft_probs, probs, noise.coin, noise.bonus)


def verify_greedy(drafted: Tensor, target_logits: Tensor) -> Tensor:
    """Greedy verification: accept while the drafted token is the target's argmax.

    >>> import torch
    >>> logits = torch.eye(5)[None, [2, 4, 1]]  # the target says 2, then 4, then 1
    >>> verify_greedy(torch.tensor([[2, 3]]), logits)
    tensor([1])

    Args:
        drafted: [N, K] token ids.
        target_logits: [N, K + 1, V]; row k scores offset k + 1 given the drafted tokens before.

    Returns:
        [N] accepted lengths, 0..K. The bonus token is the argmax at the accepted length.

    Raises:
        ValueError: the shapes do not belong together.
    """
    _check(drafted, target_logits, drafted.shape[-1] + 1)
    return accepted_prefix(drafted == target_logits[:, : drafted.shape[1]].argmax(-1))


def verify_sampled(
    drafted: Tensor,
    draft_probs: Tensor,
    target_probs: Tensor,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Speculative sampling with the exact residual (Leviathan et al. 2023, algorithm 1).

    >>> import torch
    >>> same = torch.full((1, 1, 4), 0.25)  # drafter and target agree: all is accepted
    >>> accepted, bonus = verify_sampled(torch.tensor([[3]]), same, same.repeat(1, 2, 1))
    >>> int(accepted)
    1

    Accepts d_k with probability min(1, p_k(d_k) / q_k(d_k)); at the first rejection draws the
    bonus from max(p_k - q_k, 0) renormalised, after a full accept from p_{K+1}. With a one-hot
    q (a drafter that takes its argmax) this is "draw y ~ p, accept while d = y".

    Args:
        drafted: [N, K] token ids, drawn from `draft_probs`.
        draft_probs: [N, K, V].
        target_probs: [N, K + 1, V].
        generator: source of randomness.

    Returns:
        accepted [N] in 0..K, bonus [N] token ids.

    Raises:
        ValueError: the shapes do not belong together.
    """
    rounds, num_draft_tokens = drafted.shape
    # One column more: the bonus token's number.
    numbers = torch.rand(
        rounds, num_draft_tokens + 1, generator=generator, device=drafted.device, dtype=torch.float64
    )
    coin, bonus = numbers[:, 1:], numbers[:, :1].expand(-1, num_draft_tokens + 1)
    return verify_with_noise(drafted, draft_probs, target_probs, coin, bonus)


def verify_with_noise(
    drafted: Tensor, draft_probs: Tensor, target_probs: Tensor, coin: Tensor, bonus: Tensor
) -> tuple[Tensor, Tensor]:
    """`verify_sampled` with its random numbers as inputs: coin [N, K] for each offset, bonus
    [N, K + 1] for the bonus token behind 0..K accepted ones, all uniform in [0, 1)."""
    num_draft_tokens = drafted.shape[1]
    _check(drafted, target_probs, num_draft_tokens + 1)
    _check(drafted, draft_probs, num_draft_tokens)
    ratio = acceptance_probability(drafted, draft_probs, target_probs[:, :num_draft_tokens])
    accepted = accepted_prefix(coin < ratio)
    probs = bonus_distribution(accepted, draft_probs, target_probs)
    return accepted, pick(probs, bonus.gather(1, accepted[:, None])[:, 0])


def acceptance_probability(drafted: Tensor, draft_probs: Tensor, target_probs: Tensor) -> Tensor:
    """min(1, p(d) / q(d)) for every offset: [N, K], [N, K, V], [N, K, V] -> [N, K]."""
    q = draft_probs.gather(-1, drafted[..., None])[..., 0]
    p = target_probs.gather(-1, drafted[..., None])[..., 0]
    # A token with q = 0 cannot have been drawn; the guard only avoids 0 / 0.
    return torch.where(q > 0, (p / q.clamp_min(torch.finfo(q.dtype).tiny)).clamp_max(1.0), 0.0)


def bonus_distribution(accepted: Tensor, draft_probs: Tensor, target_probs: Tensor) -> Tensor:
    """Distribution [N, V] of the bonus token after `accepted` [N] drafted tokens."""
    rounds, num_draft_tokens, _ = draft_probs.shape
    rows = torch.arange(rounds, device=accepted.device)
    p = target_probs[rows, accepted]
    if num_draft_tokens == 0:
        return p
    q = draft_probs[rows, accepted.clamp_max(num_draft_tokens - 1)]
    q = torch.where((accepted < num_draft_tokens)[:, None], q, torch.zeros_like(q))
    residual = (p - q).clamp_min(0.0)
    mass = residual.sum(-1, keepdim=True)
    # p == q up to rounding: such a draft is rejected with probability ~0, p is as good.
    return torch.where(mass > 0, residual / mass.clamp_min(torch.finfo(p.dtype).tiny), p)


def follow_path(tokens: Tensor, parents: Tensor, chosen: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Walks the tree from its root along the target's tokens.

    tokens, parents, chosen [batch, N]: the nodes, and what the target says behind each. Returns the
    path's nodes [batch, depth + 1] (behind its end the last one again) and how many were accepted
    [batch].
    """
    at = torch.zeros(len(tokens), 1, dtype=torch.long, device=tokens.device)
    accepted = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
    path = [at]
    for _ in range(depth):
        match = (parents == at) & (tokens == chosen.gather(1, at))
        found = match.any(1, keepdim=True)
        at = torch.where(found, match.long().argmax(1, keepdim=True), at)
        accepted += found[:, 0]
        path.append(at)
    return torch.cat(path, 1), accepted


def _check(drafted: Tensor, scores: Tensor, rows: int) -> None:
    if drafted.ndim != 2 or scores.ndim != 3 or scores.shape[:2] != (len(drafted), rows):
        raise ValueError(
            f"drafted {list(drafted.shape)} needs scores [{len(drafted)}, {rows}, V], "
            f"got {list(scores.shape)}"
        )
