"""What a drafter does for a target: τ, acceptance by position, speed, and that nothing changed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from draft_opd.decoding.sampling import Sampling
from draft_opd.decoding.speculative import Generation, Timing, speculate
from draft_opd.drafters.base import Drafter
from draft_opd.evaluation.regret import regret
from draft_opd.evaluation.statistics import interval
from draft_opd.evaluation.tasks import Task
from draft_opd.rollout.prompts import Prompt
from draft_opd.rollout.trace import Round, by_accepted, tau
from draft_opd.target import Target


def acceptance_by_position(rounds: Sequence[Round]) -> list[float]:
    """Share of rounds whose offset k was accepted, k = 1..K (behind the end: not)."""
    length = max((len(r.drafted) for r in rounds), default=0)
    return [sum(r.accepted >= k for r in rounds) / len(rounds) for k in range(1, length + 1)]


def evaluate(
    target: Target,
    drafter: Drafter,
    tasks: list[Task],
    *,
    max_new_tokens: int = 512,
    draft_length: int | None = None,
    tree: Sequence[int] | None = None,
    sampling: Sampling | None = None,
    thinking: bool | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict]:
    """Decodes every prompt with and without the drafter, one at a time and in alternation.

    Speeds are decoding only (no prefill). Losslessness is equality of tokens and only defined for
    greedy decoding; at a temperature above 0 `lossless` is {"matched": None, "of": 0}.
    """
    sampling = sampling or Sampling()
    results = []
    for task in tasks:
        clocks = {"target": Timing(), "speculative": Timing()}
        sides = (("target", None), ("speculative", drafter))
        for _, which in sides:  # warm up: allocators, code paths, caches
            speculate(
                target, which, [task.prompts[0].ids(target, thinking)],
                max_new_tokens=min(16, max_new_tokens),
                draft_length=draft_length if which else None, tree=tree if which else None,
                sampling=sampling, timing=Timing(),
            )  # fmt: skip
        done: list[Answer] = []
        for i, prompt in enumerate(task.prompts):
            done += _converse(
                target, prompt, sides if i % 2 else sides[::-1], clocks, thinking,
                max_new_tokens=max_new_tokens, sampling=sampling, seed=seed + i,
                draft={"draft_length": draft_length, "tree": tree},
            )  # fmt: skip
            if progress:
                progress(task.name, i + 1, len(task.prompts))
        results.append(_summary(task.name, target, done, clocks, sampling.greedy, seed))
    return results


@dataclass
class Answer:
    """One turn, with the target alone and with the drafter."""

    turn: int
    target: Generation
    speculative: Generation


def _converse(
    target: Target, prompt: Prompt, sides, clocks, thinking, *, draft: dict, **options
) -> list[Answer]:
    """A prompt and the turns that follow it; each goes on from the target's own answer."""
    answers, messages = [], list(prompt.messages)
    for turn, more in enumerate((None, *prompt.later)):
        if more is not None:
            told = target.tokenizer.decode(answers[-1].target.token_ids, skip_special_tokens=True)
            messages += [
                {"role": "assistant", "content": told}, {"role": "user", "content": more}
            ]  # fmt: skip
        ids = Prompt(prompt.id, messages).ids(target, thinking)
        if turn and len(ids) >= target.max_positions:
            break
        made = {
            side: speculate(
                target, which, [ids], timing=clocks[side], **(draft if which else {}), **options
            )[0]
            for side, which in sides
        }
        answers.append(Answer(turn, **made))
    return answers


CONTEXTS = (256, 1024, 4096, 16384)  # tokens before a round


def _summary(
    name: str,
    target: Target,
    answers: list[Answer],
    clocks: dict[str, Timing],
    greedy: bool,
    seed: int,
) -> dict:
    made = [a.speculative for a in answers]
    rounds = [r for g in made for r in g.rounds]
    length = max((len(r.drafted) for r in rounds), default=0)
    tokens = {"target": sum(len(a.target.token_ids) for a in answers),
              "speculative": sum(len(g.token_ids) for g in made)}  # fmt: skip
    speed = {side: tokens[side] / max(clocks[side].decode, 1e-9) for side in tokens}
    clock = clocks["speculative"]
    positions = acceptance_by_position(rounds)
    value = {
        "task": name,
        "prompts": sum(a.turn == 0 for a in answers),
        "responses": len(answers),
        "tokens": tokens["speculative"],
        "rounds": len(rounds),
        "tau": tau(rounds),
        "tau_interval": interval([g.rounds for g in made], seed=seed),
        "tau_per_response": sum(g.tau for g in made) / len(made),
        "acceptance_by_position": positions,
        "acceptance_conditional": [
            b / a if a else 0.0 for a, b in zip([1.0, *positions], positions, strict=False)
        ],
        "accepted_histogram": by_accepted(rounds, length),
        "by_context": _grouped(rounds, lambda r: bisect_right(CONTEXTS, r.anchor), _context_name),
        "tokens_per_second": speed,
        "speedup": speed["speculative"] / speed["target"],
        "seconds": {
            "draft": clock.draft,
            "verify": clock.verify,
            "rest": clock.rest,
            "target_alone": clocks["target"].decode,
        },
        "milliseconds_per_round": {
            part: 1000 * getattr(clock, part) / max(len(rounds), 1)
            for part in ("draft", "verify", "rest")
        },
        "milliseconds_to_first_token": {
            side: 1000 * clocks[side].prefill / len(answers) for side in clocks
        },
        "lossless": {
            "matched": sum(a.target.token_ids == a.speculative.token_ids for a in answers)
            if greedy
            else None,
            "of": len(answers) if greedy else 0,
        },
    }
    if any(a.turn for a in answers):
        pairs = [(a.turn, r) for a in answers for r in a.speculative.rounds]
        value["by_turn"] = _grouped(pairs, lambda p: p[0], lambda k: f"{k + 1}", lambda p: p[1])
    if parts := _parts(target, made):
        value["by_part"] = parts
    if greedy and target.dtype != torch.float32:
        value["regret"] = _regret(target, made)
    if target.device.type == "cuda":
        value["peak_memory_bytes"] = torch.cuda.max_memory_allocated(target.device)
    return value


def _context_name(k: int) -> str:
    low = (0, *CONTEXTS)[k]
    return f"{low}–{CONTEXTS[k] - 1}" if k < len(CONTEXTS) else f"{low} and more"


def _grouped(items, key, name, round_of=lambda x: x) -> list[dict]:
    """τ by group, groups in ascending order of `key`."""
    found: dict[int, list[Round]] = {}
    for item in items:
        found.setdefault(key(item), []).append(round_of(item))
    return [
        {"group": name(k), "rounds": len(rows), "tau": tau(rows)}
        for k, rows in sorted(found.items())
    ]


def _parts(target: Target, made: list[Generation]) -> list[dict]:
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


def _regret(target: Target, made: list[Generation]) -> dict:
    gaps = [regret(target, g.prompt_ids, g.token_ids) for g in made]
    gap, bound = (torch.cat(x) for x in zip(*gaps, strict=True))
    return {
        "largest": gap.max().item(),
        "not_argmax": int((gap > 0).sum()),
        "beyond_bound": int((gap > bound).sum()),
        "of": len(gap),
    }


def evaluation_report(
    target_name: str,
    drafter_name: str,
    temperature: float,
    tasks: list[dict],
    **options: object,
) -> dict:
    """The object that `eval.json` holds, `options` included; means are over tasks."""
    return {
        "target": target_name,
        "drafter": drafter_name,
        "temperature": temperature,
        **options,
        "tasks": tasks,
        "mean": {key: sum(t[key] for t in tasks) / len(tasks) for key in ("tau", "speedup")},
    }
