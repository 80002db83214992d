"""How far drafts agree with stored text: the rounds of a trace without the drafts themselves.

Most objectives read a round's anchor and how many tokens it accepted, and nothing of what was rejected.
So the head is asked only whether a draft token would have emitted the text's token, offset after offset,
and only for blocks that have agreed so far.

Greedy and argmax drafts agree where the text's token is their argmax (the lowest id of equal ones).
Sampled drafts agree with probability min(1, q(y) / p(y)), given that the target emitted y
(`trace.draft_given_text`). Coins come from a counter, so a block's fate does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from draft_opd.data.trajectory import Trajectory
from draft_opd.decoding.noise import COIN, row_keys, uniforms
from draft_opd.decoding.rounds import Round, Traces
from draft_opd.decoding.sampling import Sampling
from draft_opd.decoding.verification import accepted_prefix
from draft_opd.drafters.base import Drafter, over_target
from draft_opd.models.target import Target
from draft_opd.utils.machine import logits_at_once

# Block tokens of one forward that drafts at every position. On a CPU a dense mask also computes attention
# between blocks that do not see each other, so larger forwards waste work; a GPU skips such tiles.
BLOCK_TOKENS = {"cpu": 256, "cuda": 1 << 18}
# Logits that cost no more than another call of the head, so that further offsets are looked at with it.
CHEAP = {"cpu": 1 << 19, "cuda": 1 << 24}
KEPT = 0.75  # of the rows of a walk: rows that have ended are dropped once fewer go on


class Judge(Protocol):
    """Whether draft tokens emit the text's. width: logits that a row takes on the way."""

    width: int

    def __call__(self, logits: Tensor, text: Tensor, rows: Tensor, anchors: Tensor, first: int) -> Tensor:
        """logits [n, m, Vd] of offsets first + 1.. of blocks at `anchors` [n] of rows `rows` [n];
        text [n, m] -> booleans [n, m]."""


class Argmax:
    """Drafts are the drafter's argmax."""

    def __init__(self, target: Target, drafter: Drafter):
        self.vocabulary, self.width = drafter.vocabulary, drafter.head(target).weight.shape[0]

    def __call__(self, logits, text, rows, anchors, first):
        best = logits.argmax(-1)
        return (best if self.vocabulary is None else self.vocabulary[best]) == text


class Sampled:
    """Drafts are drawn from q; the text was sampled from p.

    label_probs [rows, L]: p of each token of the text, given those before it.
    """

    def __init__(self, target, drafter, trajectories, ids, hidden, sampling: Sampling, seed: int):
        self.vocabulary, self.width, self.sampling = drafter.vocabulary, target.vocab_size, sampling
        self.label_probs = label_probs(target, trajectories, ids, hidden, sampling)
        texts = [t.ids for t in trajectories]
        self.keys = torch.tensor(row_keys([seed] * len(texts), texts), device=ids.device)
        self.longest = drafter.draft_length

    def __call__(self, logits, text, rows, anchors, first):
        probs = self.sampling.probabilities(over_target(logits, self.vocabulary, self.width))
        q = probs.gather(-1, text[..., None])[..., 0]
        offset = first + torch.arange(text.shape[1], device=text.device)
        at = (anchors[:, None] + 1 + offset).clamp_max(self.label_probs.shape[1] - 1)
        coins = uniforms(self.keys[rows], anchors[:, None] * self.longest + offset, COIN)
        return coins * self.label_probs[rows[:, None], at] < q


def label_probs(
    target: Target, trajectories: Sequence[Trajectory], ids: Tensor, hidden: Tensor, sampling: Sampling
) -> Tensor:
    """p(y) [rows, L] of every response token y, given those before it; zero elsewhere."""
    found = torch.zeros(ids.shape, device=ids.device)
    index = torch.cat(
        [
            torch.stack([torch.full((len(t.response_ids),), i), torch.arange(len(t.prompt_ids), len(t.ids))])
            for i, t in enumerate(trajectories)
        ],
        1,
    ).to(ids.device)
    for rows, at in zip(
        *(x.split(logits_at_once(ids.device, target.vocab_size)) for x in index), strict=True
    ):
        probs = sampling.probabilities(target.logits(hidden[rows, at - 1]))
        found[rows, at] = probs.gather(-1, ids[rows, at][:, None])[:, 0]
    return found


def accepted_lengths(
    target: Target,
    drafter: Drafter,
    context: Any,
    ids: Tensor,
    anchors: Tensor,
    ends: Tensor,
    num_draft_tokens: int,
    judge: Judge,
    rows: Tensor | None = None,
) -> Tensor:
    """How many leading tokens of the block at each of `anchors` [batch, A] agree with the text.

    ids [N, L] texts, ends [N] their last tokens; rows [batch]: which of the N texts the anchors (and
    the context's rows) belong to, default all. Returns [batch, A]. The head is asked about offsets
    1, 2-3, 4-7, .. (more, where that is cheap), each time for the blocks that have agreed so far.
    """
    rows = torch.arange(len(ids), device=ids.device) if rows is None else rows
    where = anchors[:, :, None] + torch.arange(1, num_draft_tokens + 1, device=ids.device)
    known = (where <= ends[rows, None, None]).flatten(0, 1)
    text = ids[rows[:, None, None], where.clamp_max(ids.shape[1] - 1)]
    last = ids[rows[:, None], anchors]
    row_of = rows.repeat_interleave(anchors.shape[1])
    lengths, agreed = torch.zeros_like(anchors).flatten(), known[:, 0].clone()
    flat, anchor = text.flatten(0, 1), anchors.flatten()
    most, done, width = logits_at_once(ids.device, judge.width), 0, 1
    cheap = CHEAP.get(ids.device.type, CHEAP["cuda"]) // judge.width
    for hidden in drafter.hidden_along_text(target, context, anchors, last, text):
        hidden, first = hidden.flatten(0, 1), done
        while done < first + hidden.shape[1]:
            index = agreed.nonzero()[:, 0]
            if not len(index):
                return lengths.view(anchors.shape)
            part = slice(done, min(first + hidden.shape[1], done + max(width, cheap // len(index))))
            size = part.stop - part.start
            for some in index.split(max(1, most // size)):
                states = hidden[some, part.start - first : part.stop - first]
                logits = drafter.draft_logits(target, states)
                same = judge(logits, flat[some, part], row_of[some], anchor[some], part.start)
                reached = accepted_prefix(same & known[some, part])
                lengths[some] += reached
                agreed[some] = reached == size
            done, width = part.stop, 2 * width
    return lengths.view(anchors.shape)


def follow(lengths: Sequence[int], first: int, last: int) -> list[Round]:
    """The rounds from the anchor `first` on; lengths[i]: accepted at anchor first + i. `last`: the
    text's last token."""
    rounds, anchor = [], first
    while anchor < last:
        rounds.append(Round(anchor, [], lengths[anchor - first]))
        anchor += rounds[-1].accepted + 1
    return rounds


def everywhere(
    target: Target,
    drafter: Drafter,
    trajectories: Sequence[Trajectory],
    ids: Tensor,
    context: Any,
    num_draft_tokens: int,
    judge: Judge,
) -> Traces:
    """Traces by drafting at every position in few large forwards. About τ times as many drafts as
    `walk` makes, but none waits for another.

    A block that reaches beyond the target's context is not shortened here, as it is in decoding.
    """
    firsts = [len(t.prompt_ids) - 1 for t in trajectories]
    lasts = [len(t.ids) - 1 for t in trajectories]
    starts, ends = (torch.tensor(x, device=ids.device) for x in (firsts, lasts))
    count = max((last - first for first, last in zip(firsts, lasts, strict=True)), default=0)
    if count <= 0:
        return [[] for _ in trajectories]
    tokens = BLOCK_TOKENS.get(ids.device.type, BLOCK_TOKENS["cuda"])
    size = max(1, max(tokens // 4, tokens // len(ids)) // (num_draft_tokens + 1))
    found = []
    for step in torch.arange(count, device=ids.device).split(size):
        at = torch.minimum(starts[:, None] + step, (ends - 1).clamp_min(0)[:, None])
        found.append(accepted_lengths(target, drafter, context, ids, at, ends, num_draft_tokens, judge))
    lengths = torch.cat(found, 1).tolist()  # the only transfer
    return [follow(*row) for row in zip(lengths, firsts, lasts, strict=True)]


def walk(
    target: Target,
    drafter: Drafter,
    trajectories: Sequence[Trajectory],
    ids: Tensor,
    context: Any,
    num_draft_tokens: int,
    judge: Judge,
) -> Traces:
    """Traces round by round, all rows together: one draft a round. The context is consumed."""
    anchors = [len(t.prompt_ids) - 1 for t in trajectories]
    lasts = [len(t.ids) - 1 for t in trajectories]
    ends = torch.tensor(lasts, device=ids.device)
    traces: Traces = [[] for _ in trajectories]
    kept = list(range(len(trajectories)))  # the rows of the context
    while True:
        going = [i for i in kept if anchors[i] < lasts[i]]
        if not going:
            return traces
        if len(going) < KEPT * len(kept):
            places = [place for place, i in enumerate(kept) if anchors[i] < lasts[i]]
            context.select(torch.tensor(places, device=ids.device))
            kept = going
        at = torch.tensor([[min(anchors[i], lasts[i])] for i in kept], device=ids.device)
        rows = torch.tensor(kept, device=ids.device)
        count = min(num_draft_tokens, target.max_positions - 1 - max(anchors[i] for i in going))
        lengths = [[0]] * len(kept)
        if count:
            lengths = accepted_lengths(target, drafter, context, ids, at, ends, count, judge, rows).tolist()
        for i, (accepted,) in zip(kept, lengths, strict=True):
            if anchors[i] < lasts[i]:
                traces[i].append(Round(anchors[i], [], accepted))
                anchors[i] += accepted + 1
