"""Is what was trained what is served? The engine's own counts against ours, on the text it served.

Lossless text does not depend on the drafter, so hindsight tells what rounds our drafter would have
had on exactly the text that the engine produced. In float32 the counts are equal. Where they are
not, the same is computed for our drafter with one known fault at a time; the fault that reproduces
the engine's counts is the likely cause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import httpx2 as httpx
import torch

from draft_opd.decoding.speculative import speculate
from draft_opd.drafters import Drafter
from draft_opd.errors import UserError
from draft_opd.rollout.hindsight import hindsight_traces
from draft_opd.rollout.prompts import Prompt
from draft_opd.rollout.trace import Round
from draft_opd.rollout.trajectory import Trajectory
from draft_opd.serving.vllm import Acceptance, read_metrics
from draft_opd.target import Target

BATCH = 16
TOLERANCE = 0.02  # of τ: near-ties, which other kernels or types decide otherwise


@dataclass
class Served:
    """What an engine made of prompts: its texts, what it counted, and whose prompt it saw."""

    rows: list[Trajectory]
    counted: Acceptance
    prompts: list[Prompt]


def ask(
    url: str,
    model: str,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Served:
    """Sends prompts through the server's own chat template, as its users do, one at a time.

    Greedy. Raises `UserError` for a server that gives no token ids or counts no drafts.
    """
    before, rows = read_metrics(url), []
    with httpx.Client(base_url=url, timeout=900) as client:
        for i, prompt in enumerate(prompts):
            body = {
                "model": model, "messages": prompt.messages, "max_tokens": max_new_tokens,
                "temperature": 0.0, "repetition_penalty": 1.0, "return_token_ids": True,
            }  # fmt: skip
            try:
                answer = client.post("/v1/chat/completions", json=body)
                answer.raise_for_status()
                found = answer.json()
                choice = found["choices"][0]
                ids = (found["prompt_token_ids"], choice["token_ids"])
                rows.append(Trajectory(*map(list, ids), prompt.id, choice["finish_reason"]))
            except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"server {url} did not answer prompt {prompt.id} with token ids "
                    f"({type(error).__name__}: {' '.join(str(error).split())[:160]})"
                ) from error
            progress(i + 1)
    return Served(rows, read_metrics(url) - before, list(prompts))


def expected(target: Target, drafter: Drafter, rows: Sequence[Trajectory], length: int):
    """What our drafter's rounds on these texts come to, counted as an engine counts.

    Engines take the first token from the prompt's own forward: rounds begin behind it.
    """
    shifted = [
        Trajectory([*t.prompt_ids, t.response_ids[0]], t.response_ids[1:], t.id)
        for t in rows
        if len(t.response_ids) > 1
    ]
    rounds: list[Round] = []
    for start in range(0, len(shifted), BATCH):
        part = shifted[start : start + BATCH]
        traces = hindsight_traces(target, drafter, part, draft_length=length)
        rounds += [r for trace in traces for r in trace[:-1]]
        # Engines count what the last round accepted behind the end of the text as well.
        begun = [t.ids[: trace[-1].anchor + 1] for t, trace in zip(part, traces, strict=True)]
        last = speculate(
            target, drafter, begun, max_new_tokens=length + 1, draft_length=length, stop_ids=()
        )
        rounds += [g.rounds[0] for g in last]
    return Acceptance(len(rounds), [sum(r.accepted > k for r in rounds) for k in range(length)])


@torch.no_grad()
def text_is_the_targets(target: Target, rows: Sequence[Trajectory]) -> list[bool]:
    """For each text, whether every token is the target's argmax behind those before it."""
    found = []
    for t in rows:
        ids = torch.tensor([t.ids], device=target.device)
        at = len(t.prompt_ids) - 1
        logits = target.logits(target.trajectories(ids).hidden[:, at:-1])[0]
        found.append(logits.argmax(-1).tolist() == t.response_ids)
    return found


def distance(a: Acceptance, b: Acceptance) -> int:
    """How many accepted tokens and rounds differ."""
    rest = a - b
    return abs(rest.drafts) + sum(map(abs, rest.by_position))


def agrees(counted: Acceptance, ours: Acceptance) -> bool:
    """Whether what differs is within `TOLERANCE` of all that was accepted (or a few tokens)."""
    size = ours.drafts + sum(ours.by_position)
    return distance(counted, ours) <= max(TOLERANCE * size, 2)


def templates(target: Target, served: Served, thinking: bool | None) -> tuple[int, str | None]:
    """How many prompts the server saw as we would write them, and what it did where not."""
    pairs = list(zip(served.prompts, served.rows, strict=True))

    def same(flag: bool | None) -> int:
        return sum(p.ids(target, flag) == t.prompt_ids for p, t in pairs)

    equal = same(thinking)
    if equal == len(pairs):
        return equal, None
    asked = {None: "as the template has it", True: "on", False: "off"}
    for flag in (True, False, None):
        if flag != thinking and same(flag) == len(pairs):
            return equal, (
                f"the server's chat template runs with thinking {asked[flag]}, the drafter was "
                f"trained with thinking {asked[thinking]}: set enable_thinking in "
                "chat_template_kwargs, or train on such prompts"
            )
    return equal, "the server's chat template gives other prompts than the target's own"


def likely_causes(
    target: Target, drafter: Drafter, served: Served, length: int
) -> Iterator[tuple[str, Acceptance, int]]:
    """(fault, what it would count, distance to what the engine counted), the nearest first."""
    found = []
    for name, other in drafter.faults(target).items():
        counted = expected(target, other.to(drafter.device), served.rows, length)
        found.append((name, counted, distance(counted, served.counted)))
    yield from sorted(found, key=lambda row: row[2])


def compare(
    target: Target, drafter: Drafter, served: Served, length: int, thinking: bool | None
) -> dict:
    """The whole finding, as `check-serving --json` prints it."""
    ours, count = expected(target, drafter, served.rows, length), len(served.rows)
    same_text = text_is_the_targets(target, served.rows)
    same_prompt, causes = templates(target, served, thinking)
    causes = [causes] if causes else []
    equal = agrees(served.counted, ours)
    if not equal:
        limit = distance(ours, served.counted) / 4
        names = []
        for name, _, far in likely_causes(target, drafter, served, length):
            if far > max(count, limit) or (names and far > 2 * names[0][1] + count):
                break
            names.append((name, far))
        causes += [f"{name} (its counts are {far} from the engine's)" for name, far in names]
        if not names:
            causes.append("none of the known faults gives the engine's counts")
    if not all(same_text):
        causes.append(
            "the engine's text is not the target's own greedy text: another target, other weights, "
            "or a type in which near-ties fall otherwise"
        )

    def figures(a: Acceptance) -> dict:
        return {"tau": a.tau, "rounds": a.drafts, "accepted_by_position": a.by_position}

    return {
        "responses": count,
        "tokens": sum(len(t.response_ids) for t in served.rows),
        "served": figures(served.counted),
        "ours": figures(ours),
        "same_text": {"matched": sum(same_text), "of": count},
        "same_prompt": {"matched": same_prompt, "of": count},
        "equal": equal and same_prompt == count and all(same_text),
        "causes": causes,
    }
