"""Intervals for τ and speeds: rounds of one response are alike, so responses are drawn again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from draft_opd.rollout.trace import Round

DRAWS = 2000
Interval = tuple[float, float]


def totals(rounds: Sequence[Sequence[Round]]) -> list[tuple[int, int]]:
    """Tokens (bonus included) and rounds of each response: τ is the ratio of their sums."""
    return [(sum(r.accepted + 1 for r in one), len(one)) for one in rounds]


def interval(
    rounds: Sequence[Sequence[Round]], level: float = 0.95, seed: int = 0, draws: int = DRAWS
) -> Interval | None:
    """Bootstrap interval of τ over responses, each a list of rounds; percentiles.

    The same rounds give the same interval; one response gives none.
    """
    return resampled(lambda tau: tau, totals(rounds), level=level, seed=seed, draws=draws)


def difference(
    one: Sequence[Sequence[Round]],
    other: Sequence[Sequence[Round]],
    level: float = 0.95,
    seed: int = 0,
    draws: int = DRAWS,
) -> Interval | None:
    """Bootstrap interval of τ(one) - τ(other), paired: both on the same responses."""
    sides = (totals(one), totals(other))
    return resampled(lambda a, b: a - b, *sides, level=level, seed=seed, draws=draws)


def resampled(
    value: Callable[..., Tensor],
    *sides: Sequence[tuple[float, float]],
    level: float = 0.95,
    seed: int = 0,
    draws: int = DRAWS,
) -> Interval | None:
    """Bootstrap interval of `value(ratio of side 1, ratio of side 2, ..)`.

    A side is [responses, 2]; its ratio is Σ first / Σ second, over the same drawn responses on
    every side. None where there are fewer than two responses.
    """
    count = len(sides[0])
    if any(len(side) != count for side in sides):
        raise ValueError("a paired interval needs the same responses on every side")
    if count < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(count, (draws, count), generator=generator)
    ratios = []
    for side in sides:
        above, below = torch.tensor(side, dtype=torch.float64)[picked].sum(1).unbind(-1)
        ratios.append(above / below)
    tail = (1 - level) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = value(*ratios).quantile(ends)
    return (low.item(), high.item())


def quantile(values: Sequence[float], part: float) -> float:
    """Linear between neighbours."""
    return torch.tensor(values, dtype=torch.float64).quantile(part).item()
