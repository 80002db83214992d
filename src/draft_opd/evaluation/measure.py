"""Decodes prompts with the target alone and with drafters, one at a time and in alternation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TypeVar

from draft_opd.data.prompts import Prompt
from draft_opd.data.tasks import Task
from draft_opd.decoding.draft_length import DraftLengthController, Length, length_and_controller
from draft_opd.decoding.generate import Generation, Timing, check_confidence, speculate
from draft_opd.decoding.sampling import Sampling
from draft_opd.drafters.base import Drafter
from draft_opd.evaluation.summary import Answer
from draft_opd.models.target import Target
from draft_opd.utils.errors import UserError

BASELINE = "target alone"
Progress = Callable[[str, int, int], None]  # task, prompts done, prompts


@dataclass(frozen=True)
class DecodeConfig:
    """A way to decode: a drafter (from `source`, a path) and how much of it is used; `against`
    names the side that it is compared with; confidence: see `speculate`."""

    name: str
    drafter: Drafter | None
    draft_length: Length = None
    tree: Sequence[int] | None = None
    source: str = ""
    against: str | None = None
    confidence: float | None = None
    paces: dict[int, DraftLengthController] = field(default_factory=dict)

    @property
    def length(self) -> int | str:
        """Tokens drafted a round (a tree: its depth), or "auto"."""
        if self.drafter is None:
            return 0
        return len(self.tree) if self.tree else self.draft_length or self.drafter.draft_length

    def how(self, rows: int = 1) -> dict:
        """What `speculate` is told for a batch of so many rows."""
        length, pace = length_and_controller(
            self.draft_length, self.drafter.draft_length if self.drafter else 0
        )
        if pace:
            pace = self.paces.setdefault(rows, pace)
        return {"draft_length": length, "tree": self.tree, "pace": pace, "confidence": self.confidence}


T = TypeVar("T")


def rotated(sides: Sequence[T], by: int) -> list[T]:
    """The same in an order that begins `by` places further on, for alternation."""
    first = by % len(sides)
    return [*sides[first:], *sides[:first]]


Answers = dict[str, list[Answer]]  # side -> its answers, every side's in the same order


def sides_of(
    drafters: dict[str, tuple[str, Drafter]],
    lengths: Sequence[Length] = (None,),
    tree: Sequence[int] | None = None,
    baseline: str | None = None,
    confidences: Sequence[float | None] = (None,),
) -> list[DecodeConfig]:
    """Every drafter, {name: (path, drafter)}, at every draft length and confidence, named by what differs.

    Every drafter is compared with the baseline (default: the first one) decoded the same way, the
    baseline with itself at its first length and confidence. Raises `UserError` for a length that a drafter
    was not trained for, and for a confidence where it has none.
    """

    def label(name: str, length: Length, least: float | None) -> str:
        more = [f"K={length}"] if len(lengths) > 1 else []
        if least is not None:
            more.append(f"confidence {least}")
        elif len(confidences) > 1:
            more.append("whole drafts")
        return " ".join([name, *more])

    def ways(name: str) -> list[tuple[Length, float | None]]:
        """Where whole drafts are among the sides, what cannot be had is left out."""
        drafter, found = drafters[name][1], []
        for length, least in product(lengths, confidences):
            if length not in (None, "auto"):
                drafter.checked_length(length)
            fixed = tree is None and length != "auto"
            if least is not None and (None not in confidences or (drafter.has_confidence and fixed)):
                check_confidence(drafter, least, not fixed, f"drafter '{name}'")
            elif least is not None:
                continue
            found.append((length, least))
        return found

    made, first = [], baseline or next(iter(drafters))
    base = ways(first)
    for name, (source, drafter) in drafters.items():
        for way in ways(name):
            same = way if way in base and name != first else base[0]
            mine, other = label(name, *way), label(first, *same)
            against = None if mine == other else other
            made.append(DecodeConfig(mine, drafter, way[0], tree, source, against, way[1]))
    return made


def check_lengths(target: Target, tasks: Sequence[Task], thinking: bool | None) -> None:
    """Raises `UserError` for the first prompt that leaves no room: before hours of decoding."""
    for task in tasks:
        for prompt in task.prompts:
            count = len(prompt.ids(target, thinking))
            if not 0 < count < target.max_positions:
                raise UserError(
                    f"task '{task.name}', prompt {prompt.id}: {count} tokens, the target's context "
                    f"holds {target.max_positions}"
                )


def measure(
    target: Target,
    sides: Sequence[DecodeConfig],
    task: Task,
    *,
    max_new_tokens: int = 512,
    sampling: Sampling | None = None,
    thinking: bool | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Answers:
    """Every prompt (and the turns behind it) by the target alone and by every side.

    The order of the sides turns from prompt to prompt, so that no side always has the warm cache
    or the machine's bad moment.
    """
    sides = [DecodeConfig(BASELINE, None), *sides]
    options = {"max_new_tokens": max_new_tokens, "sampling": sampling or Sampling()}
    warm = {**options, "max_new_tokens": min(16, max_new_tokens)}
    for side in sides:  # allocators, code paths, caches
        _decode(target, side, task.prompts[0].ids(target, thinking), **warm)
    done: Answers = {side.name: [] for side in sides}
    for i, prompt in enumerate(task.prompts):
        _converse(target, prompt, rotated(sides, i), done, thinking, seed=seed + i, **options)
        if progress:
            progress(task.name, i + 1, len(task.prompts))
    return done


def _decode(target: Target, side: DecodeConfig, ids: list[int], **options) -> tuple[Generation, Timing]:
    clock = Timing()
    made = speculate(
        target,
        side.drafter,
        [ids],
        timing=clock,
        **side.how(),
        **options,
    )[0]
    return made, clock


def _converse(
    target: Target,
    prompt: Prompt,
    sides: Sequence[DecodeConfig],
    done: Answers,
    thinking: bool | None,
    **options,
) -> None:
    """A prompt and the turns that follow it; each goes on from the target's own answer."""
    messages = list(prompt.messages)
    for turn, more in enumerate((None, *prompt.later)):
        if more is not None:
            answer_ids = done[BASELINE][-1].made.token_ids
            answer_text = target.tokenizer.decode(answer_ids, skip_special_tokens=True)
            messages += [{"role": "assistant", "content": answer_text}, {"role": "user", "content": more}]
        ids = replace(prompt, messages=messages).ids(target, thinking)
        if turn and len(ids) >= target.max_positions:
            break
        for side in sides:
            made = _decode(target, side, ids, **options)
            done[side.name].append(Answer(prompt.id, turn, *made))
