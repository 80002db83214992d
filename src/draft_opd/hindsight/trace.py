"""Traces from stored text: which rounds would this drafter have had on this trajectory?

Lossless decoding emits text of the target's distribution whatever the drafter is, so the rounds
follow from stored text: draft at the anchor, count the leading tokens that agree with the text, go
on behind the target's own token. A greedy or argmax draft is determined by the text, so its trace
is exact. A sampled draft is drawn from its exact distribution given the text the target
emitted (`Conditional`). All rows walk together, one draft a round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from draft_opd.data.trajectory import Trajectory
from draft_opd.decoding.rounds import Round
from draft_opd.decoding.sampling import Sampling
from draft_opd.decoding.verification import (
    acceptance_probability,
    matching_prefix,
)
from draft_opd.drafters.base import Drafter
from draft_opd.models.rows import pad_rows
from draft_opd.models.target import Target


def draft_given_text(text: Tensor, draft_probs: Tensor, target_probs: Tensor) -> Tensor:
    """Distribution [..., V] of the draft token at an offset where the target emitted `text` [...].

    Emitting y by accepting it has probability min(p, q)(y); drafting x, rejecting it and emitting y
    has max(q - p, 0)(x) · max(p - q, 0)(y) / Σ max(p - q, 0). So, given y, the draft was y with
    probability min(1, q(y) / p(y)), else it follows max(q - p, 0), which is zero at such a y.
    """
    # The verification's rule with target and drafter exchanged.
    kept = acceptance_probability(text, target_probs, draft_probs)
    excess = (draft_probs - target_probs).clamp_min(0.0)
    mass = excess.sum(-1, keepdim=True)
    # Where q nowhere exceeds p a rejection has probability zero; rounding must not make it fail.
    excess = torch.where(mass > 0, excess / mass.clamp_min(torch.finfo(mass.dtype).tiny), draft_probs)
    mixed = (1 - kept)[..., None] * excess
    return mixed.scatter_add(-1, text[..., None], kept[..., None])


class Conditional:
    """Chooses draft tokens given the text, as they were in sampled verification.

    Up to and including the first rejected one they are drawn from `draft_given_text`. Behind it, and
    past the end of the text, they are drawn from q.

    Args:
        text: [rows, K] the emitted tokens; known: [rows, K], False past the end.
        target_probs: [rows, K, V], p along the text.
    """

    def __init__(
        self,
        sampling: Sampling,
        text: Tensor,
        known: Tensor,
        target_probs: Tensor,
        generator: torch.Generator,
    ):
        self.sampling, self.generator = sampling, generator
        self.text, self.known, self.p = text, known, target_probs
        self.on_path = torch.ones(len(text), 1, dtype=torch.bool, device=text.device)
        self.offset = 0

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The next m offsets: logits [rows, m, V] -> ids [rows, m], their q [rows, m, V]."""
        part = slice(self.offset, self.offset + logits.shape[1])
        self.offset = part.stop
        text, q = self.text[:, part], self.sampling.probabilities(logits)
        tied = self._draw(draft_given_text(text, q, self.p[:, part]))
        follows = (tied == text) & self.known[:, part]
        path = torch.cat([self.on_path, follows], 1).cumprod(1).bool()
        self.on_path = path[:, -1:]
        return torch.where(path[:, :-1] & self.known[:, part], tied, self._draw(q)), q

    def _draw(self, probs: Tensor) -> Tensor:
        drawn = torch.multinomial(probs.flatten(0, 1), 1, generator=self.generator)
        return drawn.view(probs.shape[:2])


def text_chooser(
    target: Target,
    sampling: Sampling,
    text: Tensor,
    known: Tensor,
    states: Tensor,
    generator: torch.Generator,
):
    """How a drafter chose tokens at offsets where the target emitted `text` [rows, K].

    states [rows, K, H]: the target's hidden states that its distributions follow from.
    """
    if sampling.takes_argmax:
        return Sampling().chooser()
    return Conditional(sampling, text, known, sampling.probabilities(target.logits(states)), generator)


@torch.inference_mode()
def trace_sequential(
    target: Target,
    drafter: Drafter,
    trajectories: Sequence[Trajectory],
    ids: Tensor,
    context: Any,
    draft_length: int,
    hidden: Tensor,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> list[list[Round]]:
    """Traces of a batch with whole drafts. `ids` [batch, L], `hidden` [batch, L, H] (the target's states)
    and `context` belong to the whole trajectories; the context is consumed.
    """
    sampling = sampling or Sampling()
    generator = torch.Generator(ids.device).manual_seed(seed)
    ends = [len(t.ids) - 1 for t in trajectories]  # index of the last token
    anchors = [len(t.prompt_ids) - 1 for t in trajectories]
    traces: list[list[Round]] = [[] for _ in trajectories]
    active = [i for i in range(len(trajectories)) if anchors[i] < ends[i]]
    rows = torch.tensor(active, device=ids.device)
    if len(active) < len(trajectories):
        context.select(rows)
    while active:
        at = torch.tensor([anchors[i] for i in active], device=ids.device)
        count = min(draft_length, target.max_positions - 1 - int(at.max()))
        if count:
            where = at[:, None] + torch.arange(1, count + 1, device=ids.device)
            known = where <= torch.tensor([[ends[i]] for i in active], device=ids.device)
            where = where.clamp_max(ids.shape[1] - 1)
            row, last = rows[:, None], ids[rows, at]
            choose = text_chooser(target, sampling, ids[row, where], known, hidden[row, where - 1], generator)
            drafted, _ = drafter.propose(target, context, at[:, None], last[:, None], count, choose)
            proposals = drafted[:, 0].tolist()
        else:
            proposals = [[] for _ in active]
        unfinished = []
        for row, i in enumerate(active):
            anchor, end, proposal = anchors[i], ends[i], proposals[row]
            text = trajectories[i].ids[anchor + 1 : anchor + 1 + count]
            accepted = matching_prefix(proposal, text)
            traces[i].append(Round(anchor, proposal, accepted))
            anchors[i] = anchor + accepted + 1
            if anchors[i] < end:
                unfinished.append(row)
        if len(unfinished) < len(active):
            context.select(torch.tensor(unfinished, dtype=torch.long, device=ids.device))
            active = [active[row] for row in unfinished]
            rows = torch.tensor(active, dtype=torch.long, device=ids.device)
    return traces


@torch.inference_mode()
def hindsight_traces(
    target: Target,
    drafter: Drafter,
    trajectories: Sequence[Trajectory],
    *,
    draft_length: int | None = None,
    batch_size: int = 32,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> list[list[Round]]:
    """Traces of many trajectories, in their order, without decoding. See `hindsight_trace`."""
    num_draft_tokens = drafter.checked_length(draft_length)
    options = {"batch_size": batch_size, "sampling": sampling, "seed": seed}
    return traces_by_length(target, drafter, trajectories, [num_draft_tokens], **options)[num_draft_tokens]


@torch.inference_mode()
def traces_by_length(
    target: Target,
    drafter: Drafter,
    trajectories: Sequence[Trajectory],
    lengths: Sequence[int],
    *,
    batch_size: int = 32,
    sampling: Sampling | None = None,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[int, list[list[Round]]]:
    """The same at several draft lengths, {draft length: traces}, with one forward of the target."""
    drafter.bind(target)
    order = sorted(range(len(trajectories)), key=lambda i: len(trajectories[i].ids))
    traces: dict[int, list[list[Round]]] = {n: [[] for _ in trajectories] for n in lengths}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = [trajectories[i] for i in chosen]
        ids = pad_rows([t.ids for t in batch], target.device)
        out = target.trajectories(ids, drafter.target_layers)
        for num_draft_tokens in lengths:
            context = drafter.build_cache(target, ids, out.features)
            found = trace_sequential(
                target, drafter, batch, ids, context, num_draft_tokens, out.hidden, sampling, seed + start
            )
            for i, trace in zip(chosen, found, strict=True):
                traces[num_draft_tokens][i] = trace
        progress(min(start + batch_size, len(order)))
    return traces


def hindsight_trace(
    target: Target,
    drafter: Drafter,
    trajectory: Trajectory,
    temperature: float = 0.0,
    seed: int = 0,
    draft_length: int | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    draft: str = "sample",
) -> list[Round]:
    """The rounds real speculative decoding with `drafter` has on `trajectory`.

    At temperature 0, and with `draft="argmax"`, these are the very rounds. With a sampled drafter
    they are one draw from the distribution of rounds that the text may have had. The text must
    have been sampled with the same temperature, top-k and top-p.

    Anchors index `prompt_ids + response_ids`. Raises `UserError` when the drafter does not fit.

    >>> import draft_opd as d
    >>> from draft_opd.drafters import FAMILIES
    >>> target = d.Target.from_pretrained("embedded", device="cpu")
    >>> drafter = FAMILIES["dflash"].create(target)
    >>> prompt = target.chat_ids([{"role": "user", "content": "Hi"}])
    >>> made = d.generate(target, drafter, prompt, max_new_tokens=8)
    >>> text = d.Trajectory(prompt_ids=made.prompt_ids, response_ids=made.token_ids)
    >>> d.hindsight_trace(target, drafter, text) == made.rounds
    True
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, draft=draft)
    return hindsight_traces(
        target, drafter, [trajectory], draft_length=draft_length, sampling=sampling, seed=seed
    )[0]
