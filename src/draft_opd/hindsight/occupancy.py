"""Where rounds begin, exactly: acceptance along stored text and the expectation over traces.

Given the text, offset k of a block drafted at anchor a survives with probability α_k: 1 or 0 for a
greedy (or argmax) drafter, min(1, q_k(y) / p_k(y)) for a sampled one. Then a round that begins at a
accepts n tokens with P(n | a) = Π_{k<=n} α_k (1 - α_{n+1}), and the probability that a round begins
at a follows by going forward through the text (method.md §5; EDR, arXiv 2610.10411).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from draft_opd.decoding.sampling import Sampling
from draft_opd.decoding.verification import acceptance_probability
from draft_opd.drafters.base import Drafter
from draft_opd.losses.rounds_to_go import occupancy
from draft_opd.models.rows import pad_rows
from draft_opd.models.target import Target
from draft_opd.utils.machine import logits_at_once

if TYPE_CHECKING:
    from draft_opd.data.trajectory import Trajectory


@torch.no_grad()
def text_acceptance(
    target: Target,
    drafter: Drafter,
    context,
    ids: Tensor,
    hidden: Tensor,
    anchors: Tensor,
    num_draft_tokens: int,
    sampling: Sampling,
    sharpness: float | None = None,
) -> Tensor:
    """α [batch, A, K] of blocks at `anchors` [batch, A] along `ids` [batch, L].

    hidden [batch, L, H]: the target's states, for its distributions. sharpness: β for the smooth surrogate
    q(y)^β, instead of what verification accepts. Past the end of a row the
    values mean nothing.
    """
    batch, count = anchors.shape
    offset = torch.arange(1, num_draft_tokens + 1, device=ids.device)
    where = (anchors[:, :, None] + offset).clamp_max(ids.shape[1] - 1)  # [batch, A, K]
    rows = torch.arange(batch, device=ids.device)[:, None, None]
    text = ids[rows, where]
    alpha = torch.empty(batch, count, num_draft_tokens, device=ids.device)
    step = max(1, logits_at_once(ids.device, target.vocab_size) // (batch * num_draft_tokens))
    for start in range(0, count, step):
        part = slice(start, start + step)
        at = anchors[:, part]
        states = drafter.replay(target, context, at, ids.gather(1, at), text[:, part])
        logits = drafter.logits(target, states)
        if sharpness is not None:
            log_q = logits.float().log_softmax(-1).gather(-1, text[:, part, :, None])
            alpha[:, part] = (sharpness * log_q[..., 0]).exp()
            continue
        if sampling.takes_argmax:
            alpha[:, part] = (logits.argmax(-1) == text[:, part]).float()
            continue
        q = sampling.probabilities(logits).flatten(0, 1)
        p = sampling.probabilities(target.logits(hidden[rows, where[:, part] - 1])).flatten(0, 1)
        # min(1, q(y) / p(y)): the verification's rule with target and drafter exchanged.
        found = acceptance_probability(text[:, part].flatten(0, 1), p, q)
        alpha[:, part] = found.unflatten(0, (batch, -1))
    return alpha


def expected_accepted(alpha: Tensor, valid: Tensor) -> Tensor:
    """Σ_k Π_{j<=k} α_j, [..., A]."""
    return torch.where(valid, alpha.double(), 0.0).cumprod(-1).sum(-1)


@torch.no_grad()
def expected_rounds(
    target: Target,
    drafter: Drafter,
    trajectories: Sequence[Trajectory],
    *,
    draft_length: int | None = None,
    sampling: Sampling | None = None,
) -> tuple[Tensor, Tensor]:
    """Expected number of rounds and of tokens they count (accepted + 1), [trajectories] each.

    Their ratio is the expected τ, without decoding: exact at temperature 0 and for the argmax
    drafter, else the mean over all traces that the stored text may have had.
    """
    sampling = sampling or Sampling()
    drafter.bind(target)
    num_draft_tokens = drafter.checked_length(draft_length)
    rounds, tokens = [], []
    for t in trajectories:
        ids = pad_rows([t.ids], target.device)
        out = target.trajectories(ids, drafter.target_layers)
        context = drafter.build_cache(target, ids, out.features)
        anchors = torch.arange(len(t.prompt_ids) - 1, len(t.ids) - 1, device=ids.device)[None]
        alpha = text_acceptance(
            target, drafter, context, ids, out.hidden, anchors, num_draft_tokens, sampling
        )
        valid = anchors[..., None] + torch.arange(1, num_draft_tokens + 1, device=ids.device) < len(t.ids)
        begins = occupancy(alpha, valid)
        rounds.append(begins.sum())
        tokens.append((begins * (expected_accepted(alpha, valid) + 1)).sum())
    return torch.stack(rounds), torch.stack(tokens)


def expected_tau(target, drafter, trajectories, **options) -> float:
    """Expected acceptance length on stored text; arguments of `expected_rounds`."""
    rounds, tokens = expected_rounds(target, drafter, trajectories, **options)
    return float(tokens.sum() / rounds.sum())
