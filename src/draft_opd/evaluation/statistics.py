"""Intervals for τ: rounds of one response are alike, so responses are what is drawn again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from draft_opd.rollout.trace import Round

DRAWS = 2000


def interval(
    rounds: Sequence[Sequence[Round]], level: float = 0.95, seed: int = 0, draws: int = DRAWS
) -> tuple[float, float] | None:
    """Bootstrap interval of τ over responses, each a list of rounds; percentiles.

    The same rounds give the same interval; one response gives none.
    """
    totals = _totals(rounds)
    if len(totals) < 2:
        return None
    return _percentiles(_ratio(totals, _drawn(len(totals), draws, seed)), level)


def difference(
    one: Sequence[Sequence[Round]],
    other: Sequence[Sequence[Round]],
    level: float = 0.95,
    seed: int = 0,
    draws: int = DRAWS,
) -> tuple[float, float] | None:
    """Bootstrap interval of τ(one) - τ(other), paired: both on the same responses."""
    a, b = _totals(one), _totals(other)
    if len(a) != len(b):
        raise ValueError("a paired difference needs the same responses on both sides")
    if len(a) < 2:
        return None
    picked = _drawn(len(a), draws, seed)
    return _percentiles(_ratio(a, picked) - _ratio(b, picked), level)


def _totals(rounds: Sequence[Sequence[Round]]) -> torch.Tensor:
    """[responses, 2]: tokens (bonus included) and rounds."""
    rows = [[sum(r.accepted + 1 for r in one), len(one)] for one in rounds if len(one)]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 2)


def _drawn(count: int, draws: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(count, (draws, count), generator=generator)


def _ratio(totals: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
    tokens, rounds = totals[picked].sum(1).unbind(-1)
    return tokens / rounds


def _percentiles(values: torch.Tensor, level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low, high = values.quantile(torch.tensor([tail, 1 - tail], dtype=values.dtype))
    return (low.item(), high.item())
