"""How many threads pay here and now."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def tune_num_threads(work: Callable[[], object], repeats: int = 3) -> int:
    """Sets and returns the number of torch's CPU threads that does `work` fastest.

    torch's threads wait for each other by spinning, so that on a machine with other work to do two
    can be many times slower than one. Tries 1, 2, 4 … up to what torch would take, in alternation;
    more threads must pay at least a tenth to be chosen.
    """
    most = torch.get_num_threads()
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n < most] + [most]
    best = dict.fromkeys(counts, float("inf"))
    for _ in range(repeats):
        for count in counts:
            torch.set_num_threads(count)
            began = time.perf_counter()
            work()
            best[count] = min(best[count], time.perf_counter() - began)
    chosen = counts[0]
    for count in counts[1:]:
        if best[count] < 0.9 * best[chosen]:
            chosen = count
    torch.set_num_threads(chosen)
    return chosen
