"""What answers add up to: τ, acceptance by position, speed, equality of text, and one side of a run
against another on the same prompts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from draft_opd.data.tasks import ALL
from draft_opd.decoding.generate import Generation, Timing
from draft_opd.decoding.rounds import Round, by_accepted, tau
from draft_opd.drafters.base import Drafter
from draft_opd.evaluation.regret import regret
from draft_opd.evaluation.result import (
    Difference,
    Group,
    Lossless,
    Memory,
    Regret,
    RoundParts,
    Sides,
    TaskResult,
)
from draft_opd.evaluation.statistics import difference, interval, ratio
from draft_opd.models.target import Target


@dataclass
class Answer:
    """One turn of one prompt, by one side."""

    prompt: str
    turn: int
    made: Generation
    clock: Timing


def acceptance_by_position(rounds: Sequence[Round]) -> list[float]:
    """Share of the rounds that drafted offset k where it was accepted, k = 1..K."""
    length = max((len(r.drafted) for r in rounds), default=0)
    return [_share(r.accepted >= k for r in rounds if len(r.drafted) >= k) for k in range(1, length + 1)]


def acceptance_conditional(rounds: Sequence[Round]) -> list[float]:
    """The same, of those where the offset before was accepted."""
    length = max((len(r.drafted) for r in rounds), default=0)
    return [
        _share(r.accepted >= k for r in rounds if len(r.drafted) >= k and r.accepted >= k - 1)
        for k in range(1, length + 1)
    ]


def _share(hits: Iterable[bool]) -> float:
    found = list(hits)
    return sum(found) / len(found) if found else 0.0


CONTEXTS = (256, 1024, 4096, 16384)  # tokens before a round


def summarise(
    name: str,
    target: Target,
    drafter: Drafter,
    alone: Sequence[Answer],
    answers: Sequence[Answer],
    greedy: bool,
    seed: int = 0,
    peak: int | None = None,
    judge: Callable[[Target, list[int], list[int]], tuple[Tensor, Tensor]] = regret,
) -> TaskResult:
    """One side on one task against the target alone.

    Speeds are decoding only (no prefill). Losslessness is equality of tokens and only defined for
    greedy decoding; at a temperature above 0 `lossless` has matched None and of 0. peak: bytes
    that were held at most while these answers were made; judge: `regret`, or one that remembers.
    """
    made = [a.made for a in answers]
    rounds = [r for g in made for r in g.rounds]
    length = max((len(r.drafted) for r in rounds), default=0)
    sides = {"target": alone, "speculative": answers}
    speeds = {side: decode_speed(rows) for side, rows in sides.items()}
    rate = {side: decode_rate(rows) for side, rows in sides.items()}
    clock = sum((a.clock for a in answers), Timing())
    parts = {part: getattr(clock, part) for part in ("draft", "verify", "rest", "captured")}
    same = sum(a.made.token_ids == b.made.token_ids for a, b in zip(alone, answers, strict=True))
    value = TaskResult(
        task=name,
        prompts=sum(a.turn == 0 for a in answers),
        responses=len(answers),
        tokens=sum(len(g.token_ids) for g in made),
        rounds=len(rounds),
        tau=tau(rounds),
        tau_interval=interval(rounds_by_prompt(answers), seed=seed),
        tau_per_response=sum(g.tau for g in made) / len(made),
        acceptance_by_position=acceptance_by_position(rounds),
        acceptance_conditional=acceptance_conditional(rounds),
        accepted_histogram=by_accepted(rounds, length),
        by_context=_grouped(rounds, lambda r: bisect_right(CONTEXTS, r.anchor), _context_name),
        tokens_per_second=Sides(**rate),
        speedup=rate["speculative"] / rate["target"],
        speedup_interval=ratio(speeds["speculative"], speeds["target"], seed=seed),
        seconds=RoundParts(**parts, target_alone=sum(a.clock.decode for a in alone)),
        milliseconds_per_round=RoundParts(**{k: 1000 * s / max(len(rounds), 1) for k, s in parts.items()}),
        milliseconds_to_first_token=Sides(
            **{k: 1000 * sum(a.clock.first_token for a in rows) / len(rows) for k, rows in sides.items()}
        ),
        memory_bytes=Memory(target=weights_bytes(target.model), drafter=weights_bytes(drafter), peak=peak),
        lossless=Lossless(matched=same if greedy else None, of=len(answers) if greedy else 0),
    )
    if any(a.turn for a in answers):
        pairs = [(a.turn, r) for a in answers for r in a.made.rounds]
        value.by_turn = _grouped(pairs, lambda p: p[0], lambda k: f"{k + 1}", lambda p: p[1])
    if found := _parts(target, made):
        value.by_part = found
    if greedy and target.dtype != torch.float32:
        value.regret = _regret(target, made, judge)
    return value


def _by_prompt(answers: Sequence[Answer]) -> list[list[Answer]]:
    """A conversation's turns together: they are no more independent than its rounds are."""
    found: list[list[Answer]] = []
    for a in answers:
        if a.turn == 0:
            found.append([])
        found[-1].append(a)
    return found


def rounds_by_prompt(answers: Sequence[Answer]) -> list[list[Round]]:
    return [[r for a in turns for r in a.made.rounds] for turns in _by_prompt(answers)]


def decode_speed(answers: Sequence[Answer]) -> list[tuple[int, float]]:
    """Tokens and seconds of decoding, prompt by prompt."""
    return [
        (sum(len(a.made.token_ids) for a in turns), sum(a.clock.decode for a in turns))
        for turns in _by_prompt(answers)
    ]


def decode_rate(answers: Sequence[Answer]) -> float:
    """Tokens per second of decoding, all answers together."""
    tokens = sum(len(a.made.token_ids) for a in answers)
    return tokens / max(sum(a.clock.decode for a in answers), 1e-9)


def weights_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _context_name(k: int) -> str:
    low = (0, *CONTEXTS)[k]
    return f"{low}–{CONTEXTS[k] - 1}" if k < len(CONTEXTS) else f"{low} and more"


def _grouped(items, key, name, round_of=lambda x: x) -> list[Group]:
    """τ by group, groups in ascending order of `key`."""
    found: dict[int, list[Round]] = {}
    for item in items:
        found.setdefault(key(item), []).append(round_of(item))
    return [Group(group=name(k), rounds=len(rows), tau=tau(rows)) for k, rows in sorted(found.items())]


def _parts(target: Target, made: list[Generation]) -> list[Group]:
    """τ of thinking and answer, where the target's tokenizer has a token that ends thinking."""
    end = target.tokenizer.get_vocab().get("</think>") if target.tokenizer is not None else None
    if end is None:
        return []
    pairs = []
    for g in made:
        ids = [*g.prompt_ids, *g.token_ids]
        at = ids.index(end, len(g.prompt_ids)) if end in g.token_ids else len(ids)
        at = 0 if end in g.prompt_ids[-8:] else at  # thinking was off: the template closed it
        pairs += [(int(r.anchor >= at), r) for r in g.rounds]
    return _grouped(pairs, lambda p: p[0], ("thinking", "answer").__getitem__, lambda p: p[1])


def _regret(target: Target, made: list[Generation], judge) -> Regret:
    gaps = [judge(target, g.prompt_ids, g.token_ids) for g in made]
    gap, bound = (torch.cat(x) for x in zip(*gaps, strict=True))
    return Regret(
        largest=gap.max().item(),
        not_argmax=int((gap > 0).sum()),
        beyond_bound=int((gap > bound).sum()),
        of=len(gap),
    )


def compare(one: Sequence[Answer], other: Sequence[Answer], seed: int = 0, **names: str) -> Difference:
    """`one` against `other`, on the same prompts in the same order.

    names: `task`, `side` and `against` of the result.
    """
    rounds = [rounds_by_prompt(side) for side in (one, other)]
    speeds = [decode_speed(side) for side in (one, other)]
    mine, theirs = (tau([r for rows in side for r in rows]) for side in rounds)
    return Difference(
        **names,
        tau_difference=mine - theirs,
        tau_interval=difference(*rounds, seed=seed),
        speed_ratio=decode_rate(one) / decode_rate(other),
        speed_interval=ratio(*speeds, seed=seed),
    )


def comparison(
    pairs: Sequence[tuple[str, str]], tasks: dict[str, dict[str, list[Answer]]], seed: int = 0
) -> list[Difference]:
    """(side, against) task by task and, as task "all", over the prompts of all tasks together.

    tasks: name -> side -> answers.
    """
    names = {name for pair in pairs for name in pair}
    everything = {s: [a for answers in tasks.values() for a in answers[s]] for s in names}
    groups = {**tasks, **({ALL: everything} if len(tasks) > 1 else {})}
    return [
        compare(answers[side], answers[base], seed, task=name, side=side, against=base)
        for name, answers in groups.items()
        for side, base in pairs
    ]
