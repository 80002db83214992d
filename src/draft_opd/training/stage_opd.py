"""Stage 2, Draft-OPD: trace -> replay -> target feedback on accepted and rejected proposals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from draft_opd.decoding.rounds import Traces, by_accepted, tau_of
from draft_opd.decoding.sampling import Sampling
from draft_opd.drafters.base import Drafter
from draft_opd.losses.config import Heads
from draft_opd.losses.heads import with_heads
from draft_opd.losses.objectives import objective_loss, spec_of
from draft_opd.models.target import Target
from draft_opd.training.anchors import choose_blocks
from draft_opd.training.batches import Batch
from draft_opd.training.blocks import Blocks, replay, text_states
from draft_opd.training.config import Opd
from draft_opd.training.stage import StageContext, StepOutput
from draft_opd.training.stopwatch import Stopwatch
from draft_opd.training.values import rounds_ahead, without_cut_ends


def teacher_states(target: Target, batch: Batch, blocks: Blocks) -> Tensor:
    """The target's hidden states [batch, A, K, H] in the draft-induced states s_1..s_K.

    s_1..s_{n+1} lie on the trajectory. The states behind a rejection do not: the drafted tokens
    n+1.. are run as branches over the trajectory's cache.
    """
    num_draft_tokens = blocks.drafted.shape[2]
    states = text_states(batch, blocks)
    offset = torch.arange(1, num_draft_tokens + 1, device=batch.device)
    # The target runs draft token j > n (from the first rejected one on) where offset j + 1 is supervised.
    run = (offset > blocks.accepted[:, :, None]) & (offset < num_draft_tokens)
    run &= torch.cat([blocks.valid[:, :, 1:], torch.zeros_like(blocks.valid[:, :, :1])], 2)
    flat = run.flatten(1)
    width = int(flat.sum(1).max())
    if not width and not target.sharded:  # others may have some: a sharded target needs us all
        return states
    width = max(width, 1)
    order = (~flat).long().argsort(dim=1, stable=True)[:, :width]  # run tokens first, in order
    real = flat.gather(1, order)
    block = order // num_draft_tokens

    def packed(x: Tensor, fill: int) -> Tensor:
        return torch.where(real, x.flatten(1).gather(1, order), fill)

    prefix = (blocks.anchors + blocks.accepted + 1).gather(1, block)
    at = packed(blocks.anchors[:, :, None] + offset, 0)
    branch = torch.where(real, block, -1)
    hidden = target.branches(
        packed(blocks.drafted, 0),
        at,
        (branch[:, :, None] == branch[:, None, :]) & (at[:, None, :] <= at[:, :, None]),
        torch.where(real, prefix, 0),
        batch.cache,
    ).hidden
    states = states.flatten(1, 2).clone()
    row = torch.arange(len(flat), device=flat.device)[:, None].expand_as(order)
    states[row[real], order[real] + 1] = hidden[real].to(states.dtype)
    return states.unflatten(1, (-1, num_draft_tokens))


def opd_loss(
    target: Target,
    drafter: Drafter,
    batch: Batch,
    traces: Traces,
    options: Opd,
    *,
    num_draft_tokens: int,
    seed: str,
    sampling: Sampling | None = None,
    heads: Heads | None = None,
    clock: Stopwatch | None = None,
    total: Callable[[Tensor], Tensor] = Tensor.detach,
) -> tuple[Tensor, dict]:
    """The loss of one batch, given its traces, and figures for the metrics, which add up over
    batches and processes; `total` as in `ReplayedBlocks`."""
    clock, sampling, heads = clock or Stopwatch(), sampling or Sampling(), heads or Heads()
    objective, spec = options.objective, spec_of(options.objective)
    agreement = heads.learns_agreement(sampling.takes_argmax)
    with clock("trace"):
        blocks = choose_blocks(target, drafter, batch, traces, options, num_draft_tokens, sampling, seed)
    with clock("branches"):
        states = None
        if spec.needs_branches:
            states = teacher_states(target, batch, blocks)
        elif spec.needs_target_states or (drafter.has_confidence and not agreement):
            states = text_states(batch, blocks)
    ahead = None
    if spec.needs_values:
        with clock("values"):
            ahead = rounds_ahead(target, drafter, batch, blocks, objective)
            blocks = without_cut_ends(batch, blocks)
    if spec.conditioned_on == "text":
        blocks = replace(blocks, drafted=blocks.labels)
    # torch before 2.10 may have remembered weights in autocast's type without their graph.
    torch.clear_autocast_cache()
    with clock("forward"):
        replayed = replay(target, drafter, batch, blocks, states, objective, total, ahead)
        loss, figures = with_heads(
            replayed,
            lambda r: objective_loss(r, objective),
            heads,
            agreement=agreement,
            along_text=spec.conditioned_on == "text",
            temperature=sampling.temperature or 1.0,
        )
    rounds = [r for trace in traces for r in trace]
    return loss, {
        "anchors": int(blocks.present.sum()),
        "rounds_by_accepted": by_accepted(rounds, num_draft_tokens),
        **figures,
    }


class OpdStage:
    """Draft-OPD on the rollouts' batches."""

    def __init__(self, context: StageContext):
        self.context = context

    def prepare(self, index: int) -> tuple[Batch, Traces, Opd]:
        recipe = self.context.recipe
        objective = recipe.opd.objective.at(index / (recipe.steps * recipe.accumulate))
        return *self.context.rollouts.batch(index), recipe.opd.model_copy(update={"objective": objective})

    def forward_loss(self, prepared: tuple[Batch, Traces, Opd], seed: str) -> StepOutput:
        c, (batch, traces, options) = self.context, prepared
        return StepOutput(
            *opd_loss(
                c.target,
                c.drafter,
                batch,
                traces,
                options,
                sampling=c.recipe.sampling,
                heads=c.recipe.heads,
                clock=c.clock,
                num_draft_tokens=c.num_draft_tokens,
                seed=seed,
                total=c.group.all_reduce_sum,
            )
        )

    def summarize(self, metrics: dict) -> dict:
        return {**metrics, "train_tau": tau_of(metrics["rounds_by_accepted"])}
