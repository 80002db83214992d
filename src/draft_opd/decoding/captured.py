"""Rounds as CUDA graphs: captured once a shape, replayed without Python or launches in between.

A graph belongs to a `StaticBatch`: it reads and writes that storage. All graphs of a batch share one memory
pool. They are captured when a shape is first needed, and the one that was used longest ago goes when there
are too many.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict

import torch
from torch import Tensor

from draft_opd.decoding.sampling import Sampling
from draft_opd.decoding.static import StaticBatch
from draft_opd.drafters.base import Drafter
from draft_opd.models.target import Target
from draft_opd.utils.errors import is_out_of_memory, one_line

GRAPHS = 24  # of one batch
WORKSPACES = 6  # batches that a target keeps: every side of a comparison has one
WARM_UPS = 2  # rounds before a capture: allocators, autotuning, lazily loaded kernels
log = logging.getLogger(__name__)
PIECE = 1024  # capacities are multiples of it, so that a batch serves the next prompts too


class GraphRunner:
    """Runs rounds of one batch. seconds, megabytes: what capturing has taken so far."""

    def __init__(self, most: int = GRAPHS):
        self.most, self.pool = most, None
        self.graphs: OrderedDict[tuple[int, int, int], torch.cuda.CUDAGraph] = OrderedDict()
        self.seconds = self.megabytes = 0.0
        self.captures, self.failed = 0, False

    def __call__(self, batch: StaticBatch, rows: int, slots: int, count: int) -> None:
        with torch.cuda.device(batch.target.device):
            self._run(batch, rows, slots, count)

    def _run(self, batch: StaticBatch, rows: int, slots: int, count: int) -> None:
        key = (rows, slots, count)
        if key not in self.graphs and not self.failed:
            while len(self.graphs) >= self.most:
                self.graphs.popitem(last=False)
            kept = [(state, state.clone()) for state in (batch.anchors, batch.last, batch.table)]
            self._try_capture(batch, kept, key)
        if self.failed:
            batch.round(*key)
            return
        self.graphs.move_to_end(key)
        self.graphs[key].replay()

    def _try_capture(self, batch: StaticBatch, kept: list, key: tuple[int, int, int]) -> None:
        """A graph of that shape; without compiled layers, or without graphs, where that is all there is."""
        if batch.fused and not self.captures:
            log.warning("compiling layers: the first rounds wait for about a minute")
        try:
            self.graphs[key] = self._capture(batch, kept, *key)
            return
        except Exception as error:  # compilers raise what they like
            if is_out_of_memory(error):
                raise
            what = "layers cannot be compiled" if batch.fused else "rounds cannot be captured"
            log.warning("%s (%s): decoding goes on without", what, one_line(error, 120))
        for state, value in kept:
            state.copy_(value)
        if batch.fused:
            batch.fused = False
            self._try_capture(batch, kept, key)
        else:
            self.failed = True

    def _capture(
        self, batch: StaticBatch, kept: list[tuple[Tensor, Tensor]], rows: int, slots: int, count: int
    ) -> torch.cuda.CUDAGraph:
        """kept: states that a round moves on, and what they hold now."""
        began, before = time.perf_counter(), torch.cuda.memory_reserved(batch.target.device)
        # A warm-up moves rows on. What it writes to the caches lies behind what was committed.
        stream = torch.cuda.Stream(batch.target.device)
        stream.wait_stream(torch.cuda.current_stream(batch.target.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                batch.round(rows, slots, count)
                for state, value in kept:
                    state.copy_(value)
        torch.cuda.current_stream(batch.target.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=stream):
            batch.round(rows, slots, count)
        self.pool = self.pool or graph.pool()
        torch.cuda.synchronize(batch.target.device)
        self.captures += 1
        self.seconds += time.perf_counter() - began
        self.megabytes += (torch.cuda.memory_reserved(batch.target.device) - before) / 2**20
        return graph


def workspace(
    target: Target,
    drafter: Drafter | None,
    sampling: Sampling,
    rows: int,
    slots: int,
    fused: bool = False,
    confidence: float | None = None,
) -> tuple[StaticBatch, GraphRunner]:
    """A batch of that many rows with at least so many slots a row, and its graphs; see `StaticBatch`.

    The target keeps the last ones: a drafter's weights may change in place (training), but not move.
    """
    longest = drafter.draft_length if drafter else 0
    weights = next(drafter.parameters()) if drafter else target.head.weight
    key = (id(drafter), weights.data_ptr(), weights.dtype, sampling, rows, fused, confidence)
    kept: OrderedDict = target.workspaces
    if key in kept and kept[key][0].capacity < slots:
        del kept[key]
    if key not in kept:
        while len(kept) >= WORKSPACES:
            kept.popitem(last=False)
        capacity = -(-slots // PIECE) * PIECE
        batch = StaticBatch(target, drafter, sampling, rows, capacity, longest, fused, confidence)
        kept[key] = (batch, GraphRunner())
    kept.move_to_end(key)
    return kept[key]
