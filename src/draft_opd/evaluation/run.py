"""One evaluation from tasks to files: every side on every task, what they add up to, the report."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import torch

from draft_opd.data.tasks import Task
from draft_opd.decoding.sampling import Sampling
from draft_opd.evaluation.concurrency import throughput
from draft_opd.evaluation.draft_length_advice import HARDWARE, Hardware, advise
from draft_opd.evaluation.measure import BASELINE, Answers, DecodeConfig, check_lengths, measure
from draft_opd.evaluation.regret import regret
from draft_opd.evaluation.result import (
    Advice,
    BatchRate,
    EvaluationResult,
    SideResult,
    Speed,
    TaskResult,
    mean_of,
)
from draft_opd.evaluation.summary import comparison, decode_rate, summarise
from draft_opd.evaluation.token_origin import sample
from draft_opd.models.target import Target
from draft_opd.utils.files import make_folder, write_json, write_lines
from draft_opd.utils.machine import machine

SAMPLES = 3  # responses that the report shows token by token
T = TypeVar("T")
Say = Callable[[str, int, int], None]  # what is being done, done, of


def _in_turn(groups: Iterable[Sequence[T]]) -> list[T]:
    """The first of each group, the second of each, and so on."""
    return [x for row in itertools.zip_longest(*groups) for x in row if x is not None]


class Evaluation:
    """Sides on tasks. `run` decodes; `report` is what eval.json holds; `save` writes a folder."""

    def __init__(
        self,
        target: Target,
        sides: Sequence[DecodeConfig],
        tasks: Sequence[Task],
        *,
        sampling: Sampling | None = None,
        max_new_tokens: int = 512,
        thinking: bool | None = None,
        seed: int = 0,
        say: Say = lambda *_: None,
    ):
        self.target, self.sides, self.tasks, self.say = target, list(sides), list(tasks), say
        self.sampling, self.seed = sampling or Sampling(), seed
        self.options = {"sampling": self.sampling, "max_new_tokens": max_new_tokens}
        self.thinking = thinking
        self.answers: dict[str, Answers] = {}
        self.batch_rates: list[BatchRate] = []
        self.advices: list[Advice] = []
        self._peaks: dict[str, int | None] = {}
        self._results: dict[str, list[TaskResult]] = {}
        self._regrets: dict = {}

    def run(self) -> None:
        """Raises `UserError` for a prompt that leaves no room, before anything is decoded."""
        check_lengths(self.target, self.tasks, self.thinking)
        cuda = self.target.device.type == "cuda"
        for task in self.tasks:
            if cuda:
                torch.cuda.reset_peak_memory_stats(self.target.device)
            self.answers[task.name] = measure(
                self.target,
                self.sides,
                task,
                thinking=self.thinking,
                seed=self.seed,
                progress=self.say,
                **self.options,
            )
            peak = torch.cuda.max_memory_allocated(self.target.device) if cuda else None
            self._peaks[task.name] = peak

    def concurrency(self, batch_sizes: Sequence[int]) -> None:
        """Throughput at these batch sizes, on all prompts."""
        prompts = _in_turn(t.prompts for t in self.tasks)
        self.batch_rates = throughput(
            self.target,
            self.sides,
            [p.ids(self.target, self.thinking) for p in prompts],
            batch_sizes,
            seed=self.seed,
            progress=partial(self.say, "concurrency"),
            **self.options,
        )

    def lengths(self, hardware: Sequence[Hardware] = HARDWARE, lengths: Sequence[int] | None = None) -> None:
        """The best draft length of each drafter, with what was measured beside it."""
        made = [a.made for a in _in_turn(answers[BASELINE] for answers in self.answers.values())]
        self.advices = []
        for side in {s.source: s for s in self.sides}.values():
            advice = advise(
                self.target,
                side.drafter,
                made,
                sampling=self.sampling,
                lengths=lengths,
                hardware=hardware,
                seed=self.seed,
                progress=partial(self.say, "draft lengths"),
            )
            for row in advice.lengths:
                row.measured = self._measured(side.source, row.draft_length)
            advice.drafter = side.source
            self.advices.append(advice)

    def _measured(self, source: str, length: int) -> Speed | None:
        """What this run measured of a drafter at that draft length, all tasks together."""
        for side in self.sides:
            whole = not side.tree and side.confidence is None
            if side.source == source and side.length == length and whole:
                ours, base = (
                    decode_rate([a for answers in self.answers.values() for a in answers[name]])
                    for name in (side.name, BASELINE)
                )
                return Speed(speedup=ours / base)
        return None

    def _summaries(self, name: str) -> list[TaskResult]:
        if name not in self._results:
            side = next(s for s in self.sides if s.name == name)
            self._results[name] = [
                summarise(
                    task,
                    self.target,
                    side.drafter,
                    answers[BASELINE],
                    answers[name],
                    self.sampling.greedy,
                    self.seed,
                    self._peaks[task],
                    self._judge,
                )
                for task, answers in self.answers.items()
            ]
        return self._results[name]

    def _judge(self, target: Target, prompt_ids: list[int], token_ids: list[int]):
        """`regret`, once for a text that several sides wrote."""
        key = (*prompt_ids, -1, *token_ids)
        if key not in self._regrets:
            self._regrets[key] = regret(target, prompt_ids, token_ids)
        return self._regrets[key]

    def report(self) -> EvaluationResult:
        """What eval.json holds.

        The first side is at the top, as if it had been alone; where there are more, all of them
        are in `sides`, and `comparison` has their paired differences.
        """
        sides = []
        for side in self.sides:
            tasks = self._summaries(side.name)
            sides.append(
                SideResult(
                    side=side.name,
                    drafter=side.source,
                    draft_length=side.length,
                    tree=list(side.tree) if side.tree else None,
                    confidence=side.confidence,
                    tasks=tasks,
                    mean=mean_of(tasks),
                )
            )
        first, more = sides[0], {}
        if len(sides) > 1:
            pairs = [(s.name, s.against) for s in self.sides if s.against]
            more = {"sides": sides, "comparison": comparison(pairs, self.answers, self.seed)}
        if self.batch_rates:
            more["concurrency"] = self.batch_rates
        if self.advices:
            more["draft_lengths"] = self.advices
        return EvaluationResult(
            target=self.target.name,
            drafter=first.drafter,
            temperature=self.sampling.temperature,
            draft_length=first.draft_length,
            tree=first.tree,
            confidence=first.confidence,
            dtype=str(self.target.dtype).removeprefix("torch."),
            max_new_tokens=self.options["max_new_tokens"],
            seed=self.seed,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
            draft=self.sampling.draft,
            thinking=self.thinking,
            tasks=first.tasks,
            mean=first.mean,
            **more,
            machine=machine(self.target.device),
        )

    @cached_property
    def samples(self) -> list[dict]:
        """Once everything is decoded: the first responses, token by token; one of each task before
        a second one."""
        decode = self.target.tokenizer.decode
        found = []
        for i in range(SAMPLES):
            for name, answers in self.answers.items():
                if i < len(answers[BASELINE]) and len(found) < SAMPLES:
                    made = {s.name: answers[s.name][i].made for s in self.sides}
                    prompt = decode(answers[BASELINE][i].made.prompt_ids)
                    found.append(sample(name, prompt, self.target.tokenizer, made))
        return found

    def save(self, out: Path, result: EvaluationResult) -> None:
        """eval.json, samples.json, and rounds.jsonl: every round of every response, to recount."""
        folder = make_folder(out)
        lines = (
            {
                "task": name,
                "side": side,
                "prompt": a.prompt,
                "turn": a.turn,
                "prompt_ids": a.made.prompt_ids,
                "token_ids": a.made.token_ids,
                "rounds": [[r.anchor, r.drafted, r.accepted] for r in a.made.rounds],
                "seconds": a.clock.decode,
            }
            for name, answers in self.answers.items()
            for side, rows in answers.items()
            for a in rows
        )
        write_lines(folder / "rounds.jsonl", map(json.dumps, lines))
        write_json(folder / "samples.json", self.samples)
        write_json(folder / "eval.json", result.to_json())
