"""From replayed blocks to a loss: one small function an objective.

Notation: n accepted length, K offsets, p the target's distribution in the draft-induced state, q
the drafter's, y the trajectory's token. Block weights (1 unless anchors are weighted by occupancy)
multiply a block's share of every mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from draft_opd.losses.chunked import chunked_score
from draft_opd.losses.config import Objective
from draft_opd.losses.divergences import (
    Score,
    combine_streams,
    cross_entropy,
    dpace_weights,
    expected_length,
    forward_kl,
    negative_log_overlap,
    rank_of_label,
    reverse_kl,
    sampled,
    stream_weights,
    top_k,
    total_variation,
    up_to_first_rejection,
)
from draft_opd.losses.rounds_to_go import advantages, survival_before
from draft_opd.models.logit_map import IDENTITY, LogitMap


@dataclass
class ReplayedBlocks:
    """What an objective sees; N blocks of K offsets.

    hidden [N, K, H] with gradient; states [N, K, Ht], the target's (None when nothing asks for
    them); labels, drafted [N, K]; accepted [N]; valid [N, K]; weight [N]; head: parts [Vd, H_i] with
    Σ H_i = H, which add up; target_head [V, Ht];
    ahead [N, K + 1]: the text's rounds to go at the positions behind the anchor (None as states);
    decay γ_sft; target_map, draft_map: what is done to logits behind the head (its first part);
    num_candidates: q is 0
    for tokens beyond so many of the head's first part; confidence [N, K]: logits of a drafter that says how
    likely an offset passes, given that those before it did. With a draft
    vocabulary [Vd] q is 0 outside of it, and draftable [N, K] says which
    labels are in it. `total` sums over the processes that share a batch. Losses and figures are
    this process's share; the shares of all processes add up to those of the whole batch.
    """

    hidden: Tensor
    states: Tensor | None
    labels: Tensor
    drafted: Tensor
    accepted: Tensor
    valid: Tensor
    weight: Tensor
    head: Sequence[Tensor]
    target_head: Tensor
    decay: float
    target_map: Callable[[Tensor], Tensor] = lambda logits: logits
    vocabulary: Tensor | None = None
    draftable: Tensor | None = None
    sees_drafts: bool = False
    supervision_temperature: float = 1.0
    draft_temperature: float = 1.0
    total: Callable[[Tensor], Tensor] = Tensor.detach
    ahead: Tensor | None = None
    num_candidates: int | None = None
    confidence: Tensor | None = None
    draft_map: LogitMap = IDENTITY

    @property
    def body(self) -> ReplayedBlocks:
        """The same with the head's first part alone, over all tokens."""
        width = self.head[0].shape[1]
        return replace(self, hidden=self.hidden[..., :width], head=self.head[:1], num_candidates=None)

    def score(self, score: Score, where: Tensor, tokens: Tensor | None = None) -> Tensor:
        """A score against the target, dense [N, K], zero outside `where`."""
        return self._dense(
            where,
            chunked_score(
                score,
                self.hidden[where],
                self.head,
                teacher_hidden=self.states[where],
                teacher_weight=self.target_head,
                teacher_map=self.target_map,
                labels=None if tokens is None else tokens[where],
                temperature=self.supervision_temperature,
                draft_temperature=self.draft_temperature,
                vocabulary=self.vocabulary,
                num_candidates=self.num_candidates,
                draft_map=self.draft_map,
            ),
        )

    @cached_property
    def reachable(self) -> Tensor:
        """[N, K]: valid, and this and all earlier labels of the block are in the draft vocabulary."""
        if self.draftable is None:
            return self.valid
        return self.valid & self.draftable.cumprod(1).bool()

    def _surprise(self, temperature: float) -> Tensor:
        hidden, labels = self.hidden[self.reachable], self.labels[self.reachable]
        values = chunked_score(
            cross_entropy,
            hidden,
            self.head,
            labels=labels,
            teacher_weight=self.target_head,
            draft_temperature=temperature,
            vocabulary=self.vocabulary,
            num_candidates=self.num_candidates,
            draft_map=self.draft_map,
        )
        return self._dense(self.reachable, values)

    @cached_property
    def drafted_label(self) -> Tensor:
        """[N, K]: where the label can be drafted at all. A loss on a label puts it among the candidates, even
        where it is none of them; its q is 0 there all the same."""
        if self.num_candidates is None:
            return self.reachable
        body = self.body
        with torch.no_grad():
            ranks = chunked_score(
                rank_of_label,
                body.hidden[self.reachable].detach(),
                body.head[0].detach(),
                labels=self.labels[self.reachable],
                teacher_weight=self.target_head,
            )
        return self._dense(self.reachable, ranks < self.num_candidates) & self.reachable

    @property
    def label_q(self) -> Tensor:
        """q(y) [N, K] at `draft_temperature`, zero where y cannot be drafted; differentiable."""
        return (-self.label_nll).exp() * self.drafted_label

    @cached_property
    def plain_surprise(self) -> Tensor:
        """-log q(y) at temperature 1, [N, K], zero where not reachable."""
        return self._surprise(1.0)

    @cached_property
    def label_nll(self) -> Tensor:
        """The same at `draft_temperature`."""
        return self.plain_surprise if self.draft_temperature == 1 else self._surprise(self.draft_temperature)

    @staticmethod
    def _dense(where: Tensor, values: Tensor) -> Tensor:
        return torch.zeros(where.shape, dtype=values.dtype, device=values.device).masked_scatter(
            where, values
        )

    def mean(self, values: Tensor, weights: Tensor) -> Tensor:
        """Weighted mean over blocks and offsets, [N, K] each."""
        weights = weights * self.weight[:, None]
        return (values * weights).sum() / self.total(weights.sum()).clamp_min(1e-9)

    def block_mean(self, values: Tensor, valid: Tensor) -> Tensor:
        """Weighted mean of [N] over blocks that have a valid offset."""
        weights = self.weight * valid.any(1)
        return (values * weights).sum() / self.total(weights.sum()).clamp_min(1e-9)


@dataclass(frozen=True)
class ObjectiveSpec:
    """An objective and what it reads.

    loss: replay and options -> loss (0-d) and figures. conditioned_on: whether offset k follows the
    text or the drafted tokens. needs_target_states: whether the target's distribution enters.
    needs_branches: whether it enters behind the first rejection, in states off the trajectory.
    needs_values: whether it reads the rounds to go at the positions of a block.
    """

    loss: Callable[[ReplayedBlocks, Objective], tuple[Tensor, dict]]
    conditioned_on: Literal["text", "draft"] = "text"
    needs_target_states: bool = False
    needs_branches: bool = False
    needs_values: bool = False


OBJECTIVES: dict[str, ObjectiveSpec] = {}


def objective(*kinds: str, **reads):
    """Decorator: the function is the loss of these kinds, which are also named in `losses/config.py`."""

    def add(loss):
        OBJECTIVES.update(dict.fromkeys(kinds, ObjectiveSpec(loss, **reads)))
        return loss

    return add


def decayed_cross_entropy(r: ReplayedBlocks, decay: float | None = None) -> Tensor:
    """Σ w_k (-log q(y_k)) / Σ w_k with w_k = exp(-(k-1)/γ), over reachable offsets (method §3)."""
    return decayed(r, r.plain_surprise, decay)


def decayed(
    r: ReplayedBlocks, values: Tensor, decay: float | None = None, where: Tensor | None = None
) -> Tensor:
    """Mean of values [N, K] over `where` (default: what is reachable), weighted with exp(-(k-1)/γ_sft)."""
    offsets = torch.arange(values.shape[1]).to(values)
    where = r.reachable if where is None else where
    return r.mean(values, where * torch.exp(-offsets / (decay or r.decay)))


def _divergence(objective: Objective, score: Score, direction: str) -> tuple[Score, bool]:
    """The estimator asked for, and whether it looks at the drafted token."""
    if objective.estimator == "exact":
        return score, False
    if objective.estimator == "top_k":
        return top_k(score, objective.top_k), False
    return sampled(objective.estimator, direction), True


STREAMS = {
    "acceptance_aware": ((forward_kl, "forward"), (reverse_kl, "reverse")),
    "forward_kl": ((forward_kl, "forward"),) * 2,
    "reverse_kl": ((reverse_kl, "reverse"),) * 2,
    "total_variation": ((total_variation, ""),) * 2,
    "log_overlap": ((negative_log_overlap, ""),) * 2,
}


@objective(*STREAMS, conditioned_on="draft", needs_target_states=True, needs_branches=True)
def _streams(r: ReplayedBlocks, o: Objective) -> tuple[Tensor, dict]:
    """(λ_a L_acc + λ_r L_rej) / (λ_a + λ_r), method §4."""
    weights = stream_weights(
        r.accepted,
        r.valid.shape[1],
        r.valid,
        o.gamma,
        o.accepted_gamma,
        o.supervise_correction,
        o.suffix,
    )
    lambdas = (o.accepted_weight, o.rejected_weight)
    # A stream that counts nothing is not scored either.
    weights = [w * r.weight[:, None] * (x > 0) for w, x in zip(weights, lambdas, strict=True)]
    # Tokens for single-token estimators. The accepted stream uses the trajectory's: it is the drafted one
    # at accepted offsets, and replaces it at the correction.
    tokens = (r.labels, r.drafted)
    scores = []
    for (score, direction), w, ids in zip(STREAMS[o.kind], weights, tokens, strict=True):
        estimate, single = _divergence(o, score, direction)
        scores.append(r.score(estimate, w > 0, ids if single else None))
    parts = combine_streams(*scores, *weights, *lambdas, o.normalization, r.total)
    used = (weights[0] > 0) | (weights[1] > 0)
    return parts.total, {
        "supervised": int(used.sum()),
        "accepted_loss": parts.accepted.item(),
        "rejected_loss": parts.rejected.item(),
    }


@objective("cross_entropy")
def _cross_entropy(r: ReplayedBlocks, o: Objective) -> tuple[Tensor, dict]:
    return decayed_cross_entropy(r), {}


@objective("auf")
def _auf(r: ReplayedBlocks, o: Objective) -> tuple[Tensor, dict]:
    """Mean of -log q(y_k) over k <= n + 1."""
    used = up_to_first_rejection(r.accepted, r.reachable)
    return r.mean(r.label_nll, used.to(r.label_nll)), {"supervised": int(used.sum())}


@objective("dpace")
def _dpace(r: ReplayedBlocks, o: Objective) -> tuple[Tensor, dict]:
    """Σ w_k (-log q(y_k)) / blocks, w by D-PACE (its authors' normalisation)."""
    weights = dpace_weights(r.label_q, r.reachable, o.dpace_alpha)
    return r.block_mean((r.label_nll * weights).sum(1), r.valid), {}


@objective("rounds", needs_values=True)
def _rounds(r: ReplayedBlocks, o: Objective) -> tuple[Tensor, dict]:
    """Its gradient is that of the expected rounds, V(first), where anchors stand for the occupancy:
    Σ Π_{j<k} α_j (C(k) - V(a + k)) ∇α_k / blocks, with α = q(y)^β (`rounds_to_go`)."""
    accept = (-o.value_sharpness * r.label_nll).exp() * r.drafted_label
    fixed = accept.detach()
    saved = survival_before(fixed) * advantages(fixed, r.ahead)
    return r.block_mean(-(accept * saved).sum(1), r.valid), {}


@objective("advantage", needs_values=True)
def _advantage(r: ReplayedBlocks, o: Objective) -> tuple[Tensor, dict]:
    """Σ w_k (-log q(y_k)) / blocks, w_k = Π_{j<k} s_j (V(a + k) - C(k))₊ with D-PACE's smoothing
    s = (1 - α) q(y) + α, no gradient through w."""
    smooth = ((1 - o.dpace_alpha) * r.label_q.detach() + o.dpace_alpha) * r.reachable
    weights = survival_before(smooth) * advantages(smooth, r.ahead).clamp_min(0)
    return r.block_mean((r.label_nll * weights).sum(1), r.valid), {}


def _length(r: ReplayedBlocks, log_accept: Tensor, valid: Tensor) -> Tensor:
    """1 - Σ accepted / Σ offsets: 0 when every block would be accepted whole."""
    accepted = (expected_length(log_accept, valid) * r.weight).sum()
    offsets = (valid * r.weight[:, None]).sum()
    return (offsets - accepted) / r.total(offsets).clamp_min(1e-9)


@objective("expected_length")
def _expected_length(r: ReplayedBlocks, o: Objective) -> tuple[Tensor, dict]:
    return _length(r, (-r.label_nll).masked_fill(~r.drafted_label, -torch.inf), r.reachable), {}


@objective("expected_overlap", needs_target_states=True)
def _expected_overlap(r: ReplayedBlocks, o: Objective) -> tuple[Tensor, dict]:
    """With p along the trajectory: the expectation over texts of what sampling accepts."""
    log_overlap = -r.score(negative_log_overlap, r.valid)
    return _length(r, log_overlap, r.valid), {"supervised": int(r.valid.sum())}


@objective("chain_tv", needs_target_states=True)
def _chain_tv(r: ReplayedBlocks, o: Objective) -> tuple[Tensor, dict]:
    """Mean over blocks of 1 - Σ_k Π_{j<=k} A_j / (n + 1), A = Σ_v min(p, q), k <= n + 1."""
    valid = up_to_first_rejection(r.accepted, r.valid)
    accepted = expected_length(-r.score(negative_log_overlap, valid), valid)
    loss = r.block_mean(1 - accepted / valid.sum(1).clamp_min(1), valid)
    return loss, {"supervised": int(valid.sum())}


def spec_of(o: Objective) -> ObjectiveSpec:
    """What this objective reads with these options."""
    spec = OBJECTIVES[o.kind]
    return replace(spec, needs_branches=spec.needs_branches and o.suffix and o.rejected_weight > 0)


def objective_loss(r: ReplayedBlocks, o: Objective) -> tuple[Tensor, dict]:
    """The loss (0-d) and figures for the metrics."""
    spec = spec_of(o)
    loss, figures = spec.loss(r, o)
    counted = r.reachable & (r.weight > 0)[:, None]
    figures = {"supervised": int(counted.sum()), **figures}
    if o.trajectory_weight:
        figures["supervised"] = int(counted.sum())
        along = r
        if r.sees_drafts and spec.conditioned_on == "draft":
            # Behind the first wrong proposal q is not conditioned on the text.
            along = replace(r, valid=up_to_first_rejection(r.accepted, r.valid))
        loss = loss + o.trajectory_weight * decayed_cross_entropy(along)
    return loss, figures
