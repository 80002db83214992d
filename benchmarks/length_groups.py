"""What the target's forward over a batch costs when rows of unequal length run in several forwards.

    python benchmarks/length_groups.py

Lengths are drawn (lognormal, cut to 20..1000 tokens), batches are sorted by length within pools as training
sorts them; one forward for all rows, or groups, in alternation. One thread.
"""

from __future__ import annotations

import math
import random
import time

import machine
import torch

from draft_opd.data.trajectory import Trajectory
from draft_opd.models.hub import EMBEDDED
from draft_opd.models.target import Target
from draft_opd.training import batches

BATCH, MEDIAN = 16, 200
grouped = batches.length_groups


def together(lengths, _cost):
    return [list(range(len(lengths)))]


def main() -> None:
    torch.set_num_threads(1)
    target, rng, rows = Target.from_pretrained(EMBEDDED, device="cpu"), random.Random(0), []
    for sigma in (0.35, 0.5, 1.0):
        drawn = (int(math.exp(rng.gauss(math.log(MEDIAN), sigma))) for _ in range(32 * BATCH))
        lengths = [min(1000, max(20, n)) for n in drawn]
        texts = [
            Trajectory([3] * 10, [rng.randrange(3, 200) for _ in range(n - 10)], str(i))
            for i, n in enumerate(lengths)
        ]
        at = batches.EpochBatches(texts, BATCH, seed=0)
        source = batches.BatchSource(target, (1, 3, 5))
        times: dict[str, list[float]] = {"together": [], "groups": []}
        padding = []
        for index in range(12):
            batch = at(index)
            long = [len(t.ids) for t in batch]
            padding.append(1 - sum(long) / (max(long) * len(long)))
            for name in list(times)[:: 1 if index % 2 else -1]:
                batches.length_groups = grouped if name == "groups" else together
                began = time.perf_counter()
                source.batch(batch)
                times[name].append(time.perf_counter() - began)
        over = machine.ratio(times["groups"], times["together"])
        rows.append({"sigma": sigma, "padding": sum(padding) / len(padding), "groups_over_together": over})
        print(rows[-1])
    batches.length_groups = grouped
    machine.write("length_groups", {"batch": BATCH, "median_length": MEDIAN, "rows": rows})


if __name__ == "__main__":
    main()
