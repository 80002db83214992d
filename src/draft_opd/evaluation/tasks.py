"""Named sets of prompts to evaluate on."""

from __future__ import annotations

from dataclasses import dataclass

from draft_opd.errors import UserError
from draft_opd.rollout.prompts import Prompt, read_prompts
from draft_opd.text import EMBEDDED


@dataclass(frozen=True)
class Task:
    name: str
    prompts: list[Prompt]


def load_tasks(
    names: str | None, prompts: str | None, limit: int | None = None, skip: int = 0
) -> list[Task]:
    """`names`: comma-separated, each `embedded` (its held-out prompts) or NAME=FILE.jsonl;
    `prompts`: one file. Everything is read before any model is loaded; raises `UserError`."""

    def read(label: str, path: str) -> Task:
        found = read_prompts(path, limit and limit + skip)[skip:]
        if not found:
            raise UserError(f"--skip {skip} leaves no prompts of '{path}'")
        return Task(label, found)

    if not names and not prompts:
        raise UserError("nothing to evaluate on: give --tasks or --prompts")
    tasks = []
    for name in filter(None, (names or "").split(",")):
        label, equals, path = name.partition("=")
        if equals:
            tasks.append(read(label, path))
        elif name == EMBEDDED:
            tasks.append(read(name, f"{EMBEDDED}:heldout"))
        else:
            raise UserError(
                f"unknown task '{name}': use '{EMBEDDED}' or NAME=FILE.jsonl with a line like "
                '{"question": "..."} a prompt'
            )
    if prompts:
        tasks.append(read("prompts", prompts))
    if not tasks:
        raise UserError(f"--tasks '{names}' names no task")
    return tasks
