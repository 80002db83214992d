"""What to evaluate on: the field's tasks, files of one's own, and the shipped prompts.

Prompts are written as DFlash's and Draft-OPD's benchmarks write them (dflash 0.1.0, benchmark.py;
the paper's protocol). Data come from the hub through `datasets`, or from JSONL with the same rows.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from draft_opd.data.conversation import read_row
from draft_opd.data.prompts import Prompt, read_prompts, to_prompt, usable
from draft_opd.data.row_files import file_rows
from draft_opd.data.skipped import Skipped
from draft_opd.models.hub import EMBEDDED
from draft_opd.utils.errors import RowProblem, UserError, one_line

if TYPE_CHECKING:
    from draft_opd.models.target_info import TargetInfo

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
FUNCTION = "Write a solution to the following problem and make sure that it passes the tests:\n"


@dataclass(frozen=True)
class Task:
    name: str
    prompts: list[Prompt]


@dataclass(frozen=True)
class Source:
    """Where a task's rows are, and the user turns a row becomes."""

    hub: tuple[str, ...]  # arguments of datasets.load_dataset
    split: str
    turns: Callable[[dict], list[str]]
    paper: int  # prompts in the paper's protocol


def _listed(turns: object) -> list[str]:
    """User turns. Raises TypeError for a text alone: the row is then read as a plain prompt."""
    if not isinstance(turns, list):
        raise TypeError("not a list of turns")
    return turns


SOURCES = {
    "gsm8k": Source(("openai/gsm8k", "main"), "test", lambda r: [r["question"] + BOXED], 128),
    "math500": Source(("HuggingFaceH4/MATH-500",), "test", lambda r: [r["problem"] + BOXED], 128),
    "aime2025": Source(("MathArena/aime_2025",), "train", lambda r: [r["problem"] + BOXED], 30),
    "mbpp": Source(("google-research-datasets/mbpp", "sanitized"), "test", lambda r: [r["prompt"]], 128),
    "humaneval": Source(
        ("openai/openai_humaneval",),
        "test",
        lambda r: [f"{FUNCTION}```python\n{r['prompt']}\n```"],
        164,
    ),
    "swe-bench-lite": Source(
        ("princeton-nlp/SWE-bench_Lite",),
        "test",
        lambda r: [f"Problem Statement:\n{r['problem_statement']}\nPlease fix the issue described above."],
        128,
    ),
    "mt-bench": Source(
        ("HuggingFaceH4/mt_bench_prompts",),
        "train",
        lambda r: _listed(r["turns"] if "turns" in r else r["prompt"]),
        80,
    ),
}
PAPER_SEED, PAPER_LENGTH = 0, 8192
ALL = "all"  # in comparisons: the prompts of all tasks together


def load_tasks(
    names: str | None,
    prompts: str | None,
    limit: int | None = None,
    skip: int = 0,
    shuffle: int | None = None,
    skipped: Skipped | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Task]:
    """`names`: comma-separated, each a task, NAME=FILE.jsonl, or `embedded` (its held-out prompts);
    `prompts`: one file of any prompts; shuffle: seed of a random order, before skip and limit.

    skipped, say: see `read_prompts`. Everything is read before any model is loaded; raises `UserError`.
    """
    if not names and not prompts:
        raise UserError("nothing to evaluate on: give --tasks or --prompts")
    # A log may be long: without a shuffle only its beginning is read.
    count = limit + skip if limit and shuffle is None else None
    tasks = []
    for name in filter(None, (names or "").split(",")):
        label, equals, path = name.partition("=")
        tasks.append(Task(label, _rows(label, path if equals else None, count, skipped, say)))
    if prompts:
        tasks.append(Task("prompts", read_prompts(prompts, count, skipped, say)))
    if not tasks:
        raise UserError(f"--tasks '{names}' names no task")
    for name in (t.name for t in tasks):
        if name == ALL or sum(t.name == name for t in tasks) > 1:
            raise UserError(f"task name '{name}' is taken: name files differently, as OTHER=FILE.jsonl")
    return [Task(t.name, chosen(t.prompts, limit, skip, shuffle, t.name)) for t in tasks]


def paper_tasks() -> list[Task]:
    """The paper's seven, with its counts and its order."""
    return [
        Task(name, chosen(_rows(name, None), source.paper, 0, PAPER_SEED, name))
        for name, source in SOURCES.items()
    ]


def chosen(
    prompts: list[Prompt], limit: int | None, skip: int, shuffle: int | None, where: str
) -> list[Prompt]:
    """Shuffled, then without the first `skip`, then the first `limit`."""
    found = list(prompts)
    if shuffle is not None:
        random.Random(shuffle).shuffle(found)
    found = found[skip:][: limit or None]
    if not prompts:
        raise UserError(f"'{where}' holds no prompts")
    if not found:
        raise UserError(f"--skip {skip} leaves no prompts of '{where}'")
    return found


def usable_tasks(
    tasks: list[Task], target: TargetInfo, thinking: bool | None, skipped: Skipped
) -> list[Task]:
    """The same without prompts that the template refuses or that leave no room. Raises `UserError`
    for a task of which nothing is left."""
    found = []
    skipped.seen = max(skipped.seen, sum(len(t.prompts) for t in tasks) + len(skipped.rows))
    for task in tasks:
        prompts = [prompt for prompt, _ in usable(task.prompts, target, thinking, skipped)]
        if not prompts:
            raise UserError(f"no prompt of task '{task.name}' can be used: {skipped.lines()[0]}")
        found.append(Task(task.name, prompts))
    return found


def _rows(
    label: str,
    path: str | None,
    count: int | None = None,
    skipped: Skipped | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Prompt]:
    """A task's prompts (the first `count`), from its file or the hub."""
    source = SOURCES.get(label)
    if path:
        if source is None:
            return read_prompts(path, count, skipped, say)
        skipped, prompts = skipped or Skipped(), []
        for row in itertools.islice(file_rows(Path(path)), count):
            skipped.seen += 1
            try:
                if row.value is None:
                    raise RowProblem(row.problem)
                made = _of_row(source, row.value, str(row.line))
                prompts.append(replace(made, file=row.file, line=row.line))
            except RowProblem as problem:
                skipped.add(row.file, row.line, str(problem))
        return prompts
    if label == EMBEDDED:
        return read_prompts(f"{EMBEDDED}:heldout", count)
    if source is None:
        raise UserError(
            f"unknown task '{label}': there are {', '.join(SOURCES)} and '{EMBEDDED}'; or use "
            'NAME=FILE.jsonl with a line like {"question": "..."} a prompt'
        )
    try:
        from datasets import load_dataset

        rows = load_dataset(*source.hub, split=source.split)
    except ImportError:
        raise UserError(
            f"task '{label}' comes from the hub ({source.hub[0]}), which needs `pip install "
            f"'draft-opd[tasks]'`; or give its rows: {label}=FILE.jsonl"
        ) from None
    except Exception as error:
        line = one_line(error, 160)
        raise UserError(
            f"task '{label}' cannot be loaded from the hub ({source.hub[0]}: {line}); download it, "
            f"and give its rows: {label}=FILE.jsonl"
        ) from error
    return [replace(_of_row(source, row, str(n)), file=source.hub[0], line=n) for n, row in enumerate(rows)]


def _of_row(source: Source, row: dict, number: str) -> Prompt:
    """One row of the task's data; a line of prompts that are ready is taken as it is. Raises
    `RowProblem`."""
    try:
        first, *more = source.turns(row)
    except (KeyError, TypeError, ValueError):
        return to_prompt(read_row(row), number)
    return Prompt(number, [{"role": "user", "content": first}], tuple(more))
