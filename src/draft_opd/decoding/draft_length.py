"""How many tokens to draft next, from what rounds have cost and brought so far.

The text does not depend on it: any draft length is verified in the same way, and it is chosen from
rounds that are over.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Literal

Length = int | Literal["auto"] | None  # tokens drafted a round; None: as trained
LENGTHS = (0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 31)
RECENT = 4  # timings of a length that count
MEMORY = 64  # rounds in which what was accepted loses most of its weight
PRIOR = 2.0  # rounds that a guess of an acceptance is worth
GOOD = 4.0  # expected tokens a round from which length 0 is not timed at the start
LOOK = 16  # every so many rounds another length is timed: a neighbour of the best one, or another


class DraftLengthController:
    """Chooses draft lengths of 0 (the target alone) to `longest` for one drafter on one machine.

    Call `choose()` before each round and `record()` after it. Reuse one controller for several texts
    to keep what it has learned. The first round at a length warms up and is not counted.
    """

    def __init__(self, longest: int):
        self.lengths = sorted({n for n in LENGTHS if n < longest} | {longest})
        self.rounds = 0
        self._seconds: dict[int, deque[float]] = {}
        self._tried = [0.0] * longest  # rounds that reached offset k, and those that passed it
        self._passed = [0.0] * longest

    def keep_few(self) -> None:
        """From now on at most four lengths, for rounds that are captured once a length."""
        longest = self.lengths[-1]
        self.lengths = sorted({0, longest // 4, longest // 2, longest})

    def choose(self, at_most: int | None = None) -> int:
        """The length whose rounds bring most tokens a second, as far as is known."""
        allowed = [n for n in self.lengths if at_most is None or n <= at_most]
        # First time two distant lengths: the longest and 0. The cost of the others is interpolated.
        # A drafter that brings many tokens is timed at a quarter of the longest instead of 0.
        short = allowed[-1] / 4 if self.tokens(allowed[-1]) >= GOOD else 0
        for length in (allowed[-1], min(allowed, key=lambda n: abs(n - short))):
            if len(self._seconds.get(length, ())) < 2:  # one may have had bad luck
                return length

        def rate(length: int) -> float:
            return self.tokens(length) / self.seconds(length)

        best = max(allowed, key=rate)
        if self.rounds % LOOK < LOOK - 1:
            return best
        at = allowed.index(best)
        # The third candidate is length 0; where 0 is best, the length with the highest predicted rate.
        other = allowed[0] if at else max(allowed[1:] or allowed, key=rate)
        looks = (allowed[max(at - 1, 0)], allowed[min(at + 1, len(allowed) - 1)], other)
        return looks[self.rounds // LOOK % 3]

    def record(self, drafted: int, accepted: Iterable[int], seconds: float) -> None:
        """A round of one row or several: how many tokens each accepted of those drafted."""
        self.rounds += 1
        if drafted not in self._seconds:
            self._seconds[drafted] = deque(maxlen=RECENT)
        else:
            self._seconds[drafted].append(seconds)
        keep = 1 - 1 / MEMORY
        for k in range(drafted):  # offsets that were not drafted keep their weight
            self._tried[k] *= keep
            self._passed[k] *= keep
        for count in accepted:
            for k in range(min(drafted, count + 1)):
                self._tried[k] += 1
                self._passed[k] += k < count

    def tokens(self, length: int) -> float:
        """Expected tokens of a round, the bonus token included."""
        expected = survival = 1.0
        chance = 0.5
        for k in range(length):
            # Where little is known, as at the offset before.
            chance = (self._passed[k] + PRIOR * chance) / (self._tried[k] + PRIOR)
            survival *= chance
            expected += survival
        return expected

    def seconds(self, length: int) -> float:
        """Of a round at this length: the shortest of the last ones, or between its neighbours'."""
        if self._seconds.get(length):
            return min(self._seconds[length])
        known = [n for n in sorted(self._seconds) if self._seconds[n]]
        if not known:
            return math.inf
        return between(length, known, [min(self._seconds[n]) for n in known])


def length_and_controller(asked: Length, longest: int) -> tuple[int | None, DraftLengthController | None]:
    """What `speculate` is told for a draft length, or "auto"."""
    return (None, DraftLengthController(longest)) if asked == "auto" else (asked, None)


def between(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Linear between points, constant beyond them; xs ascending.

    >>> between(3, [2, 4], [10.0, 20.0]), between(9, [2, 4], [10.0, 20.0])
    (15.0, 20.0)
    """
    i = bisect_left(xs, x)
    if i == 0 or i == len(xs):
        return ys[min(i, len(xs) - 1)]
    part = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
    return ys[i - 1] + part * (ys[i] - ys[i - 1])
