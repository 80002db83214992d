"""What a drafter does for a target: τ, acceptance by position, speed, and that nothing changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from draft_opd.decoding.sampling import Sampling
from draft_opd.decoding.speculative import Generation, Timing, speculate
from draft_opd.drafters.base import Drafter
from draft_opd.evaluation.tasks import Task
from draft_opd.rollout.trace import Round, tau
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
        made: dict[str, list[Generation]] = {"target": [], "speculative": []}
        prompts = [p.ids(target, thinking) for p in task.prompts]
        sides = (("target", None), ("speculative", drafter))
        for _, which in sides:  # warm up: allocators, code paths, caches
            speculate(
                target, which, prompts[:1], max_new_tokens=min(16, max_new_tokens),
                draft_length=draft_length if which else None, tree=tree if which else None,
                sampling=sampling, timing=Timing(),
            )  # fmt: skip
        for i, ids in enumerate(prompts):
            for side, which in sides if i % 2 else sides[::-1]:
                made[side] += speculate(
                    target,
                    which,
                    [ids],
                    max_new_tokens=max_new_tokens,
                    draft_length=draft_length if which else None,
                    tree=tree if which else None,
                    sampling=sampling,
                    seed=seed + i,
                    timing=clocks[side],
                )
            if progress:
                progress(task.name, i + 1, len(prompts))
        results.append(_summary(task.name, made, clocks, sampling.greedy))
    return results


def _summary(
    name: str, made: dict[str, list[Generation]], clocks: dict[str, Timing], greedy: bool
) -> dict:
    rounds = [r for g in made["speculative"] for r in g.rounds]
    tokens = {side: sum(len(g.token_ids) for g in made[side]) for side in made}
    speed = {side: tokens[side] / max(clocks[side].decode, 1e-9) for side in made}
    pairs = list(zip(made["target"], made["speculative"], strict=True))
    clock = clocks["speculative"]
    return {
        "task": name,
        "prompts": len(pairs),
        "tokens": tokens["speculative"],
        "rounds": len(rounds),
        "tau": tau(rounds),
        "tau_per_response": sum(g.tau for g in made["speculative"]) / len(pairs),
        "acceptance_by_position": acceptance_by_position(rounds),
        "tokens_per_second": speed,
        "speedup": speed["speculative"] / speed["target"],
        "seconds": {
            "draft": clock.draft,
            "verify": clock.verify,
            "rest": clock.rest,
            "target_alone": clocks["target"].decode,
        },
        "lossless": {
            "matched": sum(a.token_ids == b.token_ids for a, b in pairs) if greedy else None,
            "of": len(pairs) if greedy else 0,
        },
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
