"""Throughput and latency against batch size, in our own decode loop (the paper's Table 2).

A batch begins together and shrinks as its rows end; nothing is put in their place, so a server
with continuous batching does better at the tail of a batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from draft_opd.decoding.generate import speculate
from draft_opd.decoding.rounds import tau
from draft_opd.decoding.sampling import Sampling
from draft_opd.evaluation.measure import BASELINE, DecodeConfig, rotated
from draft_opd.evaluation.result import BatchRate, Spread
from draft_opd.evaluation.statistics import quantile
from draft_opd.models.target import Target


def throughput(
    target: Target,
    sides: Sequence[DecodeConfig],
    prompts: Sequence[list[int]],
    batch_sizes: Sequence[int],
    *,
    max_new_tokens: int = 512,
    sampling: Sampling | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[BatchRate]:
    """One row a batch size and side, the target alone among them; prefill is part of the time.

    Batches are full: where the prompts do not fill the last one, the first are taken again.
    Each batch is decoded by every side in turn. `speedup` is against the target alone at the same
    batch size, `seconds_per_request` from the start of its batch.
    """
    sides = [DecodeConfig(BASELINE, None), *sides]
    rows = []
    for done, size in enumerate(batch_sizes, 1):
        count = -(-len(prompts) // size) * size
        full = [prompts[i % len(prompts)] for i in range(count)]
        batches = [full[i : i + size] for i in range(0, count, size)]
        found = {s.name: {"tokens": 0, "seconds": 0.0, "ends": [], "rounds": []} for s in sides}
        for i, batch in enumerate([batches[0], *batches]):  # the first one warms up
            for side in rotated(sides, i):
                ends = [0.0] * len(batch)

                def note(row, *_, ends=ends):
                    ends[row] = time.perf_counter()

                began = time.perf_counter()
                made = speculate(
                    target,
                    side.drafter,
                    batch,
                    max_new_tokens=max_new_tokens if i else 8,
                    sampling=sampling,
                    seed=seed + i,
                    on_round=note,
                    **side.how(size),
                )
                if not i:
                    continue
                sums = found[side.name]
                sums["seconds"] += time.perf_counter() - began
                sums["tokens"] += sum(len(g.token_ids) for g in made)
                sums["ends"] += [end - began for end in ends]
                sums["rounds"] += [r for g in made for r in g.rounds]
        base = found[BASELINE]["tokens"] / found[BASELINE]["seconds"]
        for side, sums in found.items():
            rate = sums["tokens"] / sums["seconds"]
            rows.append(
                BatchRate(
                    batch=size,
                    requests=count,
                    side=side,
                    tokens_per_second=rate,
                    speedup=rate / base,
                    seconds_per_request=Spread(
                        mean=sum(sums["ends"]) / len(sums["ends"]),
                        p95=quantile(sums["ends"], 0.95),
                    ),
                    tau=tau(sums["rounds"]),
                )
            )
        if progress:
            progress(done, len(batch_sizes))
    return rows
