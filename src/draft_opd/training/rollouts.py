"""Which rounds a forward replays: traces of the current drafter, or of a few steps ago."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import NamedTuple

import torch

from draft_opd.data.trajectory import Trajectory
from draft_opd.decoding.generate import speculate
from draft_opd.decoding.rounds import Round, Traces
from draft_opd.decoding.sampling import Sampling
from draft_opd.decoding.static import padded_rows
from draft_opd.drafters.base import Drafter
from draft_opd.hindsight.lengths import Argmax, Judge, Sampled, everywhere, walk
from draft_opd.hindsight.trace import trace_sequential
from draft_opd.losses.objectives import spec_of
from draft_opd.models.target import Target
from draft_opd.training.batches import Batch, BatchSource
from draft_opd.training.config import Recipe
from draft_opd.training.distributed import ParallelContext
from draft_opd.training.precision import autocast
from draft_opd.training.stopwatch import Stopwatch
from draft_opd.utils.machine import synchronized

ROWS = {"cpu": 32, "cuda": 128}  # trajectories that one trace forward looks at: more only take memory

Rows = Callable[[int], list[Trajectory]]  # of all processes, by the forward's index


def hindsight_rollout(
    target: Target,
    drafter: Drafter,
    batch: Batch,
    num_draft_tokens: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    whole: bool = True,
    at_once: bool = False,
) -> Traces:
    """Traces of the current drafter on stored text. whole: with all that was drafted
    (`trace_sequential`); else anchors and accepted lengths only, by `lengths.walk` or, `at_once`, by
    `lengths.everywhere`, which find the same, but where a block reaches beyond the context."""
    sampling = sampling or Sampling()
    with torch.inference_mode():
        context = drafter.build_cache(target, batch.ids, batch.features)
        rows = (target, drafter, batch.trajectories, batch.ids, context, num_draft_tokens)
        if whole:
            return trace_sequential(*rows, batch.hidden, sampling, seed)
        judge: Judge = Argmax(target, drafter)
        if not sampling.takes_argmax:
            judge = Sampled(target, drafter, batch.trajectories, batch.ids, batch.hidden, sampling, seed)
        return (everywhere if at_once else walk)(*rows, judge)


def live_rollout(
    target: Target,
    drafter: Drafter,
    trajectories: list[Trajectory],
    num_draft_tokens: int,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> tuple[list[Trajectory], Traces]:
    """Decodes the prompts again with the current drafter, each to its stored response's length."""
    sampling = sampling or Sampling()
    made = speculate(
        target,
        drafter,
        [t.prompt_ids for t in trajectories],
        max_new_tokens=[len(t.response_ids) for t in trajectories],
        draft_length=num_draft_tokens,
        sampling=sampling,
        seed=seed,
    )
    fresh = [
        Trajectory(g.prompt_ids, g.token_ids, t.id, g.finish_reason, *sampling.as_tuple)
        for t, g in zip(trajectories, made, strict=True)
    ]
    return fresh, [g.rounds for g in made]


class TraceCosts(NamedTuple):
    """Seconds of a round of `walk` (all rows), and of a position of `everywhere`, measured once a run
    for a number of rows."""

    round: float
    position: float

    def choice(self, rows: Sequence[Trajectory], tau: float) -> str:
        """The faster way for these rows at that τ: "walk" or "everywhere"."""
        lengths = [len(t.response_ids) for t in rows]
        walking = self.round * max(lengths, default=0) / max(tau, 1.0)
        return "everywhere" if self.position * sum(lengths) < walking else "walk"


class Rollouts:
    """Batches with their traces, by the forward's index since the run began.

    Traces of `trace_every` steps are made together; `state` is what is left of them. costs: what
    tracing takes, by the number of rows (the next power of two); a checkpoint keeps the main
    process's, so that a resumed run chooses by the same costs.
    `call(part, ...)` runs `part` with the drafter's weights at hand.
    """

    def __init__(
        self,
        recipe: Recipe,
        target: Target,
        drafter: Drafter,
        source: BatchSource,
        rows: Rows,
        num_draft_tokens: int,
        group: ParallelContext,
        call: Callable,
        clock: Stopwatch,
    ):
        self.recipe, self.target, self.drafter, self.source = recipe, target, drafter, source
        self.rows, self.num_draft_tokens, self.group, self.call = rows, num_draft_tokens, group, call
        self.clock, self.tau = clock, 1.0
        self._made: dict[int, Traces] = {}
        self.costs: dict[int, TraceCosts] = {}
        self.rows_at_once = ROWS.get(target.device.type, ROWS["cuda"])

    def batch(self, index: int) -> tuple[Batch, Traces]:
        """This process's part of the forward's batch. The drafter is in `eval` mode."""
        r = self.recipe
        spec = spec_of(r.opd.objective)
        with_cache, reads_drafts = spec.needs_branches, spec.conditioned_on == "draft"
        rows, row_ids = self._own(index)
        seed = r.seed * 1_000_003 + index + (self.group.rank << 40)
        if r.opd.rollout == "live":
            with self.clock("trace"):
                rows, traces = self.call(
                    live_rollout,
                    self.target,
                    self.drafter,
                    rows,
                    self.num_draft_tokens,
                    r.sampling,
                    seed,
                )
            with self.clock("target"):
                return self.source.batch(rows, with_cache, False, row_ids), traces
        if r.opd.trace_every == 1:
            with self.clock("target"):
                batch = self.source.batch(rows, with_cache, row_ids=row_ids)
            with self.clock("trace"):
                return batch, self._now(batch, seed, reads_drafts=reads_drafts)
        if index not in self._made:
            self._make(index, seed, whole=reads_drafts)
        with self.clock("target"):
            return self.source.batch(rows, with_cache, row_ids=row_ids), self._made[index]

    def _own(self, index: int) -> tuple[list[Trajectory], list[int]]:
        rows = self.rows(index)
        return self.group.shard_rows(rows), self.group.shard_rows(range(len(rows)))

    def _make(self, index: int, seed: int, whole: bool) -> None:
        """The traces of this forward and of those that reuse them (`trace_every`). The drafter will
        have changed by then, so they hold what was drafted; `whole`: behind a rejection too."""
        r = self.recipe
        count = r.opd.trace_every * r.accumulate
        every = {i: self.rows(i) for i in range(index, min(index + count, r.steps * r.accumulate))}
        # Rows are split as in the training batches: each process traces the rows that it trains on.
        # All processes run the same number of pieces: sharded models need all of them in a forward.
        own = {i: self.group.shard_rows(rows) for i, rows in every.items()}
        most = sum(ceil(len(rows) / self.group.size) for rows in every.values())
        joint = [t for rows in own.values() for t in rows]
        pieces = ceil(most / self.rows_at_once)
        made: Traces = []
        for k in range(pieces):
            part = slice(k * len(joint) // pieces, (k + 1) * len(joint) // pieces)
            with self.clock("target"):
                batch = self.source.batch(joint[part])
            with self.clock("trace"):
                made += self._now(batch, seed + part.start, whole)
        for i, rows in own.items():
            self._made[i], made = made[: len(rows)], made[len(rows) :]

    def _now(self, batch: Batch, seed: int, whole: bool = False, reads_drafts: bool = False) -> Traces:
        with autocast(self.recipe, self.target.device):
            return self.hindsight(batch, seed, whole, reads_drafts)

    def hindsight(self, batch: Batch, seed: int, whole: bool = False, reads_drafts: bool = False) -> Traces:
        """Traces of the current drafter on stored text. whole: with all that was drafted. reads_drafts:
        the objective reads it, and drafts again at the anchors where a trace does not hold it."""
        kind = self.recipe.opd.trace
        if kind == "auto" and not whole:
            size = padded_rows(len(batch.trajectories))
            if size not in self.costs:
                self.costs[size] = self._measure(batch, seed)
            kind = self.costs[size].choice(batch.trajectories, self.tau)
        # A walk drafts blocks whole anyway: then nothing need be drafted again.
        whole = whole or (reads_drafts and kind == "walk" and self.recipe.sampling.takes_argmax)
        return self._traces(batch, seed, whole, kind == "everywhere")

    def _traces(self, batch: Batch, seed: int, whole: bool, at_once: bool) -> Traces:
        return self.call(
            hindsight_rollout,
            self.target,
            self.drafter,
            batch,
            self.num_draft_tokens,
            self.recipe.sampling,
            seed,
            whole,
            at_once,
        )

    def _measure(self, batch: Batch, seed: int) -> TraceCosts:
        """What both ways take here: the second of two times, since the first warms up and compiles."""
        seconds = {}
        for at_once in (False, True):
            for _ in range(2):
                began = synchronized(self.target.device)
                traces = self._traces(batch, seed, False, at_once)
                seconds[at_once] = synchronized(self.target.device) - began
        positions = sum(len(t.response_ids) for t in batch.trajectories)
        rounds = max(map(len, traces), default=0)
        return TraceCosts(seconds[False] / max(1, rounds), seconds[True] / max(1, positions))

    # -- what a checkpoint keeps ------------------------------------------------------------

    def forget(self, before: int) -> None:
        """Drops the traces of forwards that are done."""
        self._made = {i: t for i, t in self._made.items() if i >= before}

    def state(self) -> list:
        """[[index, [[[anchor, drafted, accepted], ...], ...]], ...], of all processes' rows."""
        own = {
            i: [[[r.anchor, r.drafted, r.accepted] for r in t] for t in traces]
            for i, traces in self._made.items()
        }
        shares = self.group.all_gather(own)
        found = []
        for i in own:
            rows: list = [None] * len(self.rows(i))
            for rank, share in enumerate(shares):
                rows[rank :: len(shares)] = share[i]
            found.append([i, rows])
        return found

    def load(self, state: list) -> None:
        """Takes back what `state` gave, in however many processes."""
        for index, rows in state:
            share = self.group.shard_rows(rows)
            self._made[index] = [[Round(*r) for r in trace] for trace in share]
