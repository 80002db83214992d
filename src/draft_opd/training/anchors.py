"""Which anchors are replayed, and what was drafted there."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from draft_opd.decoding.rounds import Traces
from draft_opd.decoding.sampling import Sampling
from draft_opd.decoding.verification import accepted_prefix
from draft_opd.drafters.base import Drafter
from draft_opd.hindsight.trace import text_chooser
from draft_opd.losses.objectives import spec_of
from draft_opd.losses.rounds_to_go import occupancy
from draft_opd.models.target import Target
from draft_opd.training.batches import Batch
from draft_opd.training.blocks import Blocks, attach_drafts, pack_anchors, text_states
from draft_opd.training.config import Opd
from draft_opd.training.values import acceptance_everywhere
from draft_opd.utils.machine import logits_at_once


def random_anchors(batch: Batch, count: int | list[int], seed: str) -> list[list[int]]:
    """Distinct response anchors a row, uniform over positions that have a next token."""
    rows = []
    for i, t in enumerate(batch.trajectories):
        rng = random.Random(f"{seed}/{batch.row_ids[i]}")
        first, last = len(t.prompt_ids) - 1, len(t.ids) - 2
        wanted = count if isinstance(count, int) else count[i]
        rows.append(sorted(rng.sample(range(first, last + 1), min(wanted, last + 1 - first))))
    return rows


def choose_rounds(traces: Traces, max_anchors: int, seed: str, row_ids: Sequence[int] = ()) -> Traces:
    """The rounds to replay: at most `max_anchors` a trajectory, drawn without replacement, in order.
    `row_ids`: see `Batch`."""
    chosen = []
    for row_id, trace in zip(row_ids or range(len(traces)), traces, strict=True):
        rng = random.Random(f"{seed}/{row_id}")
        drawn = rng.sample(range(len(trace)), min(max_anchors, len(trace)))
        chosen.append([trace[i] for i in sorted(drawn)])
    return chosen


def choose_blocks(
    target: Target,
    drafter: Drafter,
    batch: Batch,
    traces: Traces,
    options: Opd,
    num_draft_tokens: int,
    sampling: Sampling,
    seed: str,
) -> Blocks:
    """What is replayed: rounds of the trace, or other anchors with the same number of blocks."""
    rounds = choose_rounds(traces, options.max_anchors, seed, batch.row_ids)
    weight = None
    if options.anchors == "trace":
        anchors = [[r.anchor for r in row] for row in rounds]
    elif options.anchors == "random":
        anchors = random_anchors(batch, [len(row) for row in rounds], seed)
    elif options.anchors == "all":
        anchors = random_anchors(batch, options.max_anchors, seed)
    else:
        anchors, weight = _by_occupancy(target, drafter, batch, num_draft_tokens, sampling, options, seed)
    blocks = pack_anchors(batch, anchors, num_draft_tokens)
    if weight is not None:
        blocks = replace(blocks, weight=weight)
    # A trace may not hold what was rejected. Objectives that read it draft again at these anchors: above
    # temperature 0 another draw of the same distribution, given that a round begins there.
    drafted = all(r.drafted and r.drafted[-1] >= 0 for row in rounds for r in row)
    if options.anchors == "trace" and (drafted or spec_of(options.objective).conditioned_on == "text"):
        return attach_drafts(blocks, rounds)
    return draft_at(target, drafter, batch, blocks, sampling, seed)


def _by_occupancy(
    target: Target,
    drafter: Drafter,
    batch: Batch,
    num_draft_tokens: int,
    sampling: Sampling,
    options: Opd,
    seed: str,
) -> tuple[list[list[int]], Tensor]:
    """About `max_anchors` anchors a row, drawn in proportion to the probability that a round begins
    there. Importance weights make means over them unbiased estimates of means over all positions."""
    blocks, alpha = acceptance_everywhere(target, drafter, batch, num_draft_tokens, sampling)
    begins = occupancy(alpha, blocks.valid)
    found = [
        draw_by_weight(row, options.max_anchors, random.Random(f"{seed}/{row_id}").random())
        for row_id, row in zip(batch.row_ids, begins.tolist(), strict=True)
    ]
    anchors = [[start + j for j, _ in row] for start, row in zip(batch.starts.tolist(), found, strict=True)]
    weights = torch.zeros(len(found), max(map(len, found)), device=batch.device)
    for i, row in enumerate(found):
        weights[i, : len(row)] = torch.tensor([w for _, w in row])
    return anchors, weights


def draw_by_weight(weights: list[float], count: int, start: float) -> list[tuple[int, float]]:
    """Systematic sampling: about `count` indices, index i with probability π_i = min(1, λ w_i), as
    (i, w_i / π_i), so that weighted sums keep their expectation. `start` is uniform in [0, 1)."""
    weights = [w if w > 1e-9 else 0.0 for w in weights]
    positive = [w for w in weights if w > 0]
    certain = min(count, len(positive))
    # λ: the largest weights are certain, the others share what is left of `count`.
    ordered = sorted(positive, reverse=True)
    scale, rest = float("inf"), sum(positive)
    for i, w in enumerate(ordered[:certain]):
        if (certain - i) * w < rest:
            scale = (certain - i) / rest
            break
        rest -= w
    drawn, total = [], start
    for i, w in enumerate(weights):
        if w > 0:
            chance = 1.0 if w * scale >= 1 else w * scale
            before, total = total, total + chance
            if int(total) > int(before):
                drawn.append((i, w / chance))
    return drawn or [(weights.index(max(weights)), 1.0)]


@torch.no_grad()
def draft_at(
    target: Target, drafter: Drafter, batch: Batch, blocks: Blocks, sampling: Sampling, seed: str
) -> Blocks:
    """The blocks with what the drafter proposes there, and how much of it the text confirms."""
    num_draft_tokens = blocks.labels.shape[2]
    states = text_states(batch, blocks)
    context = drafter.build_cache(target, batch.ids, batch.features)
    ids = batch.ids.gather(1, blocks.anchors)
    rng = random.Random(f"{seed}/{batch.row_ids[0]}")  # other draws in other processes
    generator = torch.Generator(batch.device).manual_seed(rng.getrandbits(32))
    step = max(1, logits_at_once(ids.device, target.vocab_size) // (len(ids) * num_draft_tokens))
    found = []
    for start in range(0, ids.shape[1], step):
        part = slice(start, start + step)
        choose = text_chooser(
            target,
            sampling,
            blocks.labels[:, part].flatten(0, 1),
            blocks.valid[:, part].flatten(0, 1),
            states[:, part].flatten(0, 1),
            generator,
        )
        at = blocks.anchors[:, part]
        found.append(drafter.propose(target, context, at, ids[:, part], num_draft_tokens, choose)[0])
    drafted = torch.cat(found, 1)
    accepted = accepted_prefix((drafted == blocks.labels) & blocks.valid)
    return replace(blocks, drafted=drafted, accepted=accepted)
