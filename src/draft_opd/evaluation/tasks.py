"""Named sets of prompts to evaluate on."""

from __future__ import annotations

from dataclasses import dataclass

from draft_opd.errors import UserError
from draft_opd.rollout.prompts import Prompt, read_prompts
from draft_opd.target import EMBEDDED


@dataclass(frozen=True)
class Task:
    name: str
    prompts: list[Prompt]


def load_tasks(names: str | None, prompts: str | None, limit: int | None) -> list[Task]:
    """`names`: comma-separated, each `embedded` (its held-out prompts) or NAME=FILE.jsonl;
    `prompts`: one file. Everything is read before any model is loaded; raises `UserError`."""
    if not names and not prompts:
        raise UserError("nothing to evaluate on: give --tasks or --prompts")
    tasks = []
    for name in filter(None, (names or "").split(",")):
        label, equals, path = name.partition("=")
        if equals:
            tasks.append(Task(label, read_prompts(path, limit)))
        elif name == EMBEDDED:
            tasks.append(Task(name, read_prompts(f"{EMBEDDED}:heldout", limit)))
        else:
            raise UserError(
                f"unknown task '{name}': use '{EMBEDDED}' or NAME=FILE.jsonl with a line like "
                '{"question": "..."} a prompt'
            )
    if prompts:
        tasks.append(Task("prompts", read_prompts(prompts, limit)))
    return tasks
