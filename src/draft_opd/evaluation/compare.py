"""Sides of one run against each other: the same prompts, so differences are paired."""

from __future__ import annotations

from collections.abc import Sequence

from draft_opd.data.tasks import ALL
from draft_opd.decoding.rounds import tau
from draft_opd.evaluation.statistics import difference, ratio
from draft_opd.evaluation.summary import Answer, decode_rate, decode_speed, rounds_by_prompt


def compare(
    one: Sequence[Answer], other: Sequence[Answer], seed: int = 0
) -> dict[str, float | tuple[float, float] | None]:
    """`one` against `other`: τ(one) - τ(other) and the ratio of their decoding speeds, each with
    its 95 % bootstrap interval over prompts (None where there is only one)."""
    rounds = [rounds_by_prompt(side) for side in (one, other)]
    speeds = [decode_speed(side) for side in (one, other)]
    mine, theirs = (tau([r for rows in side for r in rows]) for side in rounds)
    return {
        "tau_difference": mine - theirs,
        "tau_interval": difference(*rounds, seed=seed),
        "speed_ratio": decode_rate(one) / decode_rate(other),
        "speed_interval": ratio(*speeds, seed=seed),
    }


def comparison(
    pairs: Sequence[tuple[str, str]], tasks: dict[str, dict[str, list[Answer]]], seed: int = 0
) -> list[dict]:
    """(side, against) task by task and, as task "all", over the prompts of all tasks together.

    tasks: name -> side -> answers.
    """
    names = {name for pair in pairs for name in pair}
    everything = {s: [a for answers in tasks.values() for a in answers[s]] for s in names}
    groups = {**tasks, **({ALL: everything} if len(tasks) > 1 else {})}
    return [
        {
            "task": name,
            "side": side,
            "against": base,
            **compare(answers[side], answers[base], seed),
        }
        for name, answers in groups.items()
        for side, base in pairs
    ]
