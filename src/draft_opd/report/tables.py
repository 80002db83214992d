"""The tables of an evaluation, the same on a terminal and on a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from draft_opd.evaluation.result import (
    Advice,
    BatchRate,
    Difference,
    EvaluationResult,
    RoundParts,
    SideResult,
    TaskResult,
)
from draft_opd.report.format import number, same_text, spread, times

GROUPS = {
    "by_context": "τ by context length (tokens before the round)",
    "by_turn": "τ by turn",
    "by_part": "τ by part",
}


@dataclass
class Table:
    """Cells are text or whole numbers; the first column is a name."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence]


def task_table(sides: Sequence[SideResult]) -> Table:
    """A row for each side and task."""
    many = len(sides) > 1
    columns = ["task", "prompts", "tokens", "τ", "95 %", "same text", "target, tok/s", "tok/s", "speed-up"]
    rows = [
        [
            *([s.side] if many else []),
            t.task,
            t.prompts,
            f"{t.tokens:,}",
            number(t.tau),
            spread(t.tau_interval),
            same_text(t),
            number(t.tokens_per_second.target, 1),
            number(t.tokens_per_second.speculative, 1),
            times(t.speedup),
            spread(t.speedup_interval),
        ]
        for s in sides
        for t in s.tasks
    ]
    return Table("", [*(["drafter"] if many else []), *columns, "95 %"], rows)


def comparison_table(differences: Sequence[Difference]) -> Table:
    """Paired differences."""
    rows = [
        [
            c.side,
            c.against,
            c.task,
            f"{c.tau_difference:+.3f}",
            spread(c.tau_interval, "+.2f"),
            times(c.speed_ratio),
            spread(c.speed_interval),
        ]
        for c in differences
    ]
    columns = ["", "against", "task", "Δτ", "95 %", "speed", "95 %"]
    return Table("Differences, paired by prompt", columns, rows)


def _parts(cost: RoundParts) -> tuple[float | None, ...]:
    """Draft, verify, rest and the whole of a round; captured rounds have no parts."""
    whole = cost.draft + cost.verify + cost.rest + cost.captured
    return (None, None, None, whole) if cost.captured else (cost.draft, cost.verify, cost.rest, whole)


def best_length(advice: Advice) -> str:
    """Half a sentence."""
    if not advice.best:
        return "no draft length pays: the target alone is faster"
    return f"draft length {advice.best} is best"


def length_table(advice: Advice) -> Table:
    """What each draft length costs and brings here."""
    rows = [
        [
            str(r.draft_length),
            number(r.tau),
            *(number(ms, 2) for ms in _parts(r.milliseconds)),
            times(r.speedup),
            times(r.measured.speedup if r.measured else None),
        ]
        for r in advice.lengths
    ]
    columns = ["K", "τ", "draft, ms", "verify, ms", "rest, ms", "a round, ms", "predicted", "measured"]
    return Table(f"{advice.drafter}: here {best_length(advice)}", columns, rows)


def elsewhere_table(advice: Advice) -> Table:
    """The best draft length on other hardware, by requests at a time."""
    batches = list(dict.fromkeys(e.batch for e in advice.elsewhere))
    rows: dict[str, list[str]] = {}
    for e in advice.elsewhere:
        device = f"{e.hardware} ({e.gigabytes_per_second:g} GB/s, {e.teraflops:g} TFLOP/s)"
        cells = rows.setdefault(e.hardware, [device])
        cells.append(f"{times(e.speedup)}, K = {e.best}" if e.best else "none pays")
    columns = ["", *(f"{b} at a time" for b in batches)]
    return Table("On other hardware, at best", columns, list(rows.values()))


def batch_table(rates: Sequence[BatchRate]) -> Table:
    """Throughput of our own loop, by batch size."""
    rows = [
        [
            r.side,
            r.batch,
            number(r.tokens_per_second, 1),
            times(r.speedup),
            number(r.seconds_per_request.mean, 2),
            number(r.seconds_per_request.p95, 2),
            number(r.tau),
        ]
        for r in rates
    ]
    columns = ["", "at a time", "tok/s", "speed-up", "s a request", "95 % within, s", "τ"]
    return Table("Requests at a time", columns, rows)


def served_table(task: TaskResult) -> Table:
    """A server by level of concurrency, beside the server of the target alone where there is one."""
    rows = []
    for level in task.concurrency:
        for name, rate in (("target", level.target), ("speculative", level.speculative)):
            if rate is None:
                continue
            ours = name == "speculative"
            rows.append(
                [
                    name,
                    level.in_flight,
                    number(rate.tokens_per_second, 1),
                    times(level.speedup if ours else None),
                    number(rate.milliseconds_to_first_token.p50, 1),
                    number(rate.seconds_per_request.p50, 2),
                    number(rate.seconds_per_request.p95, 2),
                    number(level.tau if ours else None),
                ]
            )
    columns = [
        "server",
        "at a time",
        "tok/s",
        "speed-up",
        "first token, ms",
        "s a request",
        "95 % within, s",
        "τ",
    ]
    return Table(f"Requests at a time: {task.task}", columns, rows)


def round_table(sides: Sequence[SideResult]) -> Table | None:
    """Where the time of a round goes; None where nothing was timed."""
    rows = [
        [
            s.side,
            t.task,
            *(number(x, 2) for x in _parts(per)),
            number(first.target, 1),
            number(first.speculative, 1),
        ]
        for s in sides
        for t in s.tasks
        if (per := t.milliseconds_per_round) and (first := t.milliseconds_to_first_token)
    ]
    columns = [
        "drafter",
        "task",
        "draft",
        "verify",
        "rest",
        "a round",
        "first token, target",
        "first token, with drafter",
    ]
    return Table("", columns, rows) if rows else None


def group_tables(sides: Sequence[SideResult]) -> list[Table]:
    """τ by context, turn and part, a column a side; rounds of all tasks together."""
    tables = []
    for key, title in GROUPS.items():
        sums: dict[str, dict[str, list[float]]] = {}
        for side in sides:
            for task in side.tasks:
                for g in getattr(task, key):
                    cell = sums.setdefault(g.group, {}).setdefault(side.side, [0.0, 0])
                    cell[0] += g.tau * g.rounds
                    cell[1] += g.rounds
        if len(sums) > 1:
            names = [s.side for s in sides]
            rows = [
                [group, *(number(c[n][0] / c[n][1]) if n in c else "–" for n in names)]
                for group, c in sorted(sums.items(), key=lambda pair: _order(pair[0]))
            ]
            tables.append(Table(title, ["", *names], rows))
    return tables


def _order(group: str) -> tuple[bool, int]:
    """Numbers ascend, thinking comes before the answer."""
    digits = group.split("–")[0].split(" ")[0]
    return (False, int(digits)) if digits.isdigit() else (True, group == "answer")


def evaluation_tables(result: EvaluationResult) -> list[Table]:
    """What a terminal shows."""
    found = [task_table(result.every_side())]
    if result.comparison:
        found.append(comparison_table(result.comparison))
    for advice in result.draft_lengths:
        found.append(length_table(advice))
        if advice.elsewhere:
            found.append(elsewhere_table(advice))
    if result.concurrency:
        found.append(batch_table(result.concurrency))
    return found + [served_table(t) for t in result.tasks if t.concurrency]
