"""Bootstrap intervals for τ and speeds. The unit that is drawn again is the prompt, since rounds of
one prompt are alike.

A percentile bootstrap over few prompts is too narrow. Its interval is widened about the estimate by
Student's t over the normal distribution, and by sqrt(n / (n - 1)) for the bootstrap's variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

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
    """Interval of ratio(one) / ratio(other), both positive. It is widened on the scale of logarithms,
    so that its ends are positive too."""
    found = resampled(lambda a, b: np.log(a / b), one, other, seed=seed)
    return found and (math.exp(found[0]), math.exp(found[1]))


def resampled(
    value: Callable[..., np.ndarray],
    *sides: Sequence[tuple[float, float]],
    level: float = 0.95,
    seed: int = 0,
    draws: int = DRAWS,
) -> Interval | None:
    """Bootstrap interval of `value(ratio of side 1, ratio of side 2, ..)`.

    A side is [prompts, 2]; its ratio is Σ first / Σ second, over the same drawn prompts on every
    side. None where there are fewer than two prompts. Raises ValueError for sides of other prompts.
    """
    count = len(sides[0])
    if any(len(side) != count for side in sides):
        raise ValueError("a paired interval needs the same prompts on every side")
    if count < 2:
        return None
    rows = [np.asarray(side, dtype=np.float64) for side in sides]

    def statistic(chosen: np.ndarray, axis: int = -1) -> np.ndarray:
        # chosen [.., prompts]: the drawn prompts by index.
        sums = (row[chosen.astype(int)].sum(axis=axis - 1 if axis < 0 else axis) for row in rows)
        return value(*(s[..., 0] / s[..., 1] for s in sums))

    estimate = float(statistic(np.arange(count)))
    drawn = stats.bootstrap(
        (np.arange(count),),
        statistic,
        n_resamples=draws,
        confidence_level=level,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    wide = _widening(count, level)
    return (estimate + wide * float(drawn.low - estimate), estimate + wide * float(drawn.high - estimate))


def _widening(count: int, level: float) -> float:
    tail = (1 + level) / 2
    return float(stats.t.ppf(tail, count - 1) / stats.norm.ppf(tail)) * math.sqrt(count / (count - 1))


def quantile(values: Sequence[float], part: float) -> float:
    """Linear between neighbours."""
    return float(np.quantile(values, part))
