"""Rounds of speculative decoding and what they add up to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Round:
    """One round: `anchor` indexes prompt + response (the last committed token), `drafted` holds the
    K proposed ids (-1 where nobody looked; none where only lengths were asked for), `accepted` how many of
    them were committed."""

    anchor: int
    drafted: list[int]
    accepted: int


Traces = list[list[Round]]  # one list of rounds a trajectory


def tau(rounds: Iterable[Round]) -> float:
    """Acceptance length: mean of accepted + 1 over rounds (the bonus token counts); 0 if none.

    >>> tau([Round(9, [4, 8, 1], 3), Round(13, [5, 5, 5], 0)])
    2.5
    """
    lengths = [r.accepted + 1 for r in rounds]
    return sum(lengths) / len(lengths) if lengths else 0.0


def tau_of(counts: Sequence[int]) -> float:
    """The same from `by_accepted`'s counts.

    >>> tau_of([1, 0, 0, 1])
    2.5
    """
    rounds = sum(counts)
    return sum((n + 1) * c for n, c in enumerate(counts)) / rounds if rounds else 0.0


def by_accepted(rounds: Iterable[Round], num_draft_tokens: int) -> list[int]:
    """How many rounds accepted 0, 1, .. `num_draft_tokens` tokens."""
    counts = [0] * (num_draft_tokens + 1)
    for r in rounds:
        counts[r.accepted] += 1
    return counts


def committed(
    drafted: Sequence[int], accepted: int, bonus: int, stop_ids: frozenset[int], room: int
) -> tuple[list[int], int, str | None]:
    """Tokens a round commits, cut at a stop token or after `room` tokens.

    Returns the tokens, how many of them were drafted, and why the response ends (None: it goes on).
    """
    tokens = [*drafted[:accepted], bonus]
    for i, token in enumerate(tokens[:room]):
        if token in stop_ids:
            return tokens[: i + 1], min(accepted, i + 1), "stop"
    if len(tokens) >= room:
        return tokens[:room], min(accepted, room), "length"
    return tokens, accepted, None
