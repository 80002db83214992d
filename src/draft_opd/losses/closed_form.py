"""Scores and their gradients to the draft logits in closed form, computed in place.

Autograd would keep a matrix [tokens, vocabulary] for every intermediate result. These functions
overwrite the logits that they are given. A test compares them with autograd.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from draft_opd.losses.divergences import Score, cross_entropy, forward_kl, reverse_kl

# (draft logits [n, Vd], target logits [n, V], labels [n], vocabulary [Vd]) -> scores [n] and their
# gradients [n, Vd]. Logits are overwritten; what a score does not look at is None.
Closed = Callable[..., tuple[Tensor, Tensor]]


def _cross_entropy(
    draft: Tensor, _target: Tensor | None, labels: Tensor, vocabulary: Tensor | None
) -> tuple[Tensor, Tensor]:
    """-log q(y); ∂/∂logits = q - [v = y]."""
    log_norm = draft.logsumexp(-1)
    if vocabulary is None:
        at, known = labels[:, None], None
    else:
        order = vocabulary.argsort()
        found = torch.searchsorted(vocabulary, labels, sorter=order)
        at = order[found.clamp_max(len(vocabulary) - 1)][:, None]
        known = vocabulary[at[:, 0]] == labels
    scores = log_norm - draft.gather(-1, at)[:, 0]
    gradient = draft.sub_(log_norm[:, None]).exp_()
    one = torch.ones_like(log_norm)
    if known is not None:  # a token that cannot be drafted has q = 0 whatever the logits are
        scores = torch.where(known, scores, torch.inf)
        one = one * known
    return scores, gradient.scatter_add_(-1, at, -one[:, None])


def _forward_kl(
    draft: Tensor, target: Tensor, _labels: Tensor | None, vocabulary: Tensor | None
) -> tuple[Tensor, Tensor]:
    """KL(p || q) over what can be drafted; ∂/∂logits = q - p."""
    if vocabulary is not None:
        target = target[:, vocabulary]
    p, q = _log_softmax_(target), _log_softmax_(draft)
    weights = p.exp()
    p.sub_(q)
    # Where p is 0 the difference may be infinite, or no number at all.
    scores = p.masked_fill_(weights == 0, 0.0).mul_(weights).sum(-1)
    return scores, q.exp_().sub_(weights)


def _reverse_kl(
    draft: Tensor, target: Tensor, _labels: Tensor | None, vocabulary: Tensor | None
) -> tuple[Tensor, Tensor]:
    """KL(q || p); ∂/∂logits = q (log q - log p - KL)."""
    p, q = _log_softmax_(target), _log_softmax_(draft)
    if vocabulary is not None:
        p = p[:, vocabulary]
    difference = torch.sub(q, p, out=p)
    q.exp_()
    difference.masked_fill_(q == 0, 0.0)
    scores = (q * difference).sum(-1)
    return scores, difference.sub_(scores[:, None]).mul_(q)


def _log_softmax_(logits: Tensor) -> Tensor:
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


CLOSED: dict[Score, Closed] = {
    cross_entropy: _cross_entropy,
    forward_kl: _forward_kl,
    reverse_kl: _reverse_kl,
}
