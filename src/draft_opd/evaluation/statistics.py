"""Intervals for τ and speeds: rounds of one prompt are alike, so prompts are drawn again.

Percentiles of few draws are too narrow: they are widened about the estimate as Student's t is
wider than the normal distribution, and for the bootstrap's variance (n - 1) / n.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from draft_opd.decoding.rounds import Round

DRAWS = 2000
Interval = tuple[float, float]


def totals(rounds: Sequence[Sequence[Round]]) -> list[tuple[int, int]]:
    """Tokens (bonus included) and rounds of each prompt: τ is the ratio of their sums."""
    return [(sum(r.accepted + 1 for r in one), len(one)) for one in rounds]


def interval(
    rounds: Sequence[Sequence[Round]], level: float = 0.95, seed: int = 0, draws: int = DRAWS
) -> Interval | None:
    """Bootstrap interval of τ over prompts, each a list of rounds.

    The same rounds give the same interval; one prompt gives none.
    """
    found = resampled(lambda tau: tau, totals(rounds), level=level, seed=seed, draws=draws)
    # A round commits a token at least, and at most what was drafted and the bonus token.
    return found and (max(1.0, found[0]), min(_longest(rounds) + 1.0, found[1]))


def difference(
    one: Sequence[Sequence[Round]],
    other: Sequence[Sequence[Round]],
    level: float = 0.95,
    seed: int = 0,
    draws: int = DRAWS,
) -> Interval | None:
    """Bootstrap interval of τ(one) - τ(other), paired: both on the same prompts."""
    sides = (totals(one), totals(other))
    found = resampled(lambda a, b: a - b, *sides, level=level, seed=seed, draws=draws)
    return found and (max(-_longest(other), found[0]), min(_longest(one), found[1]))


def _longest(rounds: Sequence[Sequence[Round]]) -> float:
    return float(max((len(r.drafted) for one in rounds for r in one), default=0))


def ratio(
    one: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]], seed: int = 0
) -> Interval | None:
    """Interval of ratio(one) / ratio(other), both positive: widened on the scale of logarithms, so
    that its ends are positive too."""
    found = resampled(lambda a, b: (a / b).log(), one, other, seed=seed)
    return found and (math.exp(found[0]), math.exp(found[1]))


def resampled(
    value: Callable[..., Tensor],
    *sides: Sequence[tuple[float, float]],
    level: float = 0.95,
    seed: int = 0,
    draws: int = DRAWS,
) -> Interval | None:
    """Bootstrap interval of `value(ratio of side 1, ratio of side 2, ..)`.

    A side is [prompts, 2]; its ratio is Σ first / Σ second, over the same drawn prompts on every
    side. None where there are fewer than two prompts.
    """
    count = len(sides[0])
    if any(len(side) != count for side in sides):
        raise ValueError("a paired interval needs the same prompts on every side")
    if count < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(count, (draws, count), generator=generator)
    rows = [torch.tensor(side, dtype=torch.float64) for side in sides]

    def of(chosen: Callable[[Tensor], Tensor]) -> Tensor:
        return value(*(above / below for above, below in (chosen(x).unbind(-1) for x in rows)))

    estimate = of(lambda x: x.sum(0))
    tail = (1 - level) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    drawn = of(lambda x: x[picked].sum(1)).quantile(ends)
    low, high = estimate + _widening(count, level) * (drawn - estimate)
    return (low.item(), high.item())


def _widening(count: int, level: float) -> float:
    normal = statistics.NormalDist().inv_cdf((1 + level) / 2)
    return student(level, count - 1) / normal * math.sqrt(count / (count - 1))


def student(level: float, freedom: int) -> float:
    """Student's t that `level` of the distribution lies within, by its integral over an angle.

    >>> round(student(0.95, 1), 2), round(student(0.95, 10), 3)
    (12.71, 2.228)
    """
    angle = torch.linspace(0, math.pi / 2, 20_001, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(angle.cos() ** (freedom - 1), angle)
    at = int(torch.searchsorted(mass, level * mass[-1])) + 1
    return math.sqrt(freedom) * math.tan(angle[at].item())


def quantile(values: Sequence[float], part: float) -> float:
    """Linear between neighbours."""
    return torch.tensor(values, dtype=torch.float64).quantile(part).item()
