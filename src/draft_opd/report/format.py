"""How figures are written, on a page and on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from draft_opd.evaluation.result import TaskResult


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def times(value: float | None) -> str:
    return f"{value:.2f}×" if value else "–"


def spread(ends: Sequence[float] | None, form: str = ".2f") -> str:
    return f"{ends[0]:{form}} to {ends[1]:{form}}" if ends else "–"


def same_text(task: TaskResult) -> str:
    found = task.lossless
    text = f"{found.matched}/{found.of}" if found.of else "–"
    if task.regret:
        text += f"; beyond rounding {task.regret.beyond_bound}/{task.regret.of}"
    return text
