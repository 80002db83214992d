"""Is what was trained what is served? The engine's own counts against ours, on the text it served.

Lossless text does not depend on the drafter, so hindsight tells what rounds our drafter would have
had on exactly the text that the engine produced. In float32 the counts are equal. Where they are
not, the same is computed for our drafter with one known fault at a time; a fault that reproduces
the engine's counts is the likely cause.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx2 as httpx
import torch

from draft_opd.data.openai_client import Server, chat_body, sampling_params
from draft_opd.data.prompts import Prompt
from draft_opd.data.trajectory import Trajectory
from draft_opd.decoding.sampling import Sampling
from draft_opd.decoding.verification import verify_greedy
from draft_opd.drafters import Drafter
from draft_opd.evaluation.regret import regret
from draft_opd.hindsight.trace import hindsight_traces
from draft_opd.models.rows import pad_rows
from draft_opd.models.target import Target
from draft_opd.serving.vllm_process import Acceptance, read_metrics
from draft_opd.utils.errors import UserError, one_line

BATCH = 16
ENOUGH = 20  # rounds below which nothing is shown


@dataclass
class Served:
    """What an engine made of prompts: its texts, what it counted, and whose prompt it saw."""

    rows: list[Trajectory]
    counted: Acceptance
    prompts: list[Prompt]


def ask(
    server: Server,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Served:
    """Sends prompts through the server's own chat template, as its users do, one at a time.

    Greedy. Raises `UserError` for a server that gives no token ids, counts no drafts, or answers
    others meanwhile (its counters are for all).
    """
    before, rows = read_metrics(server), []
    with server.client() as client:
        for i, prompt in enumerate(prompts):
            body = {
                "model": server.model,
                **chat_body(prompt, {}),
                "max_tokens": max_new_tokens,
                **sampling_params(Sampling()),
                "return_token_ids": True,
            }
            try:
                answer = client.post("/v1/chat/completions", json=body)
                answer.raise_for_status()
                found = answer.json()
                choice = found["choices"][0]
                ids = (found["prompt_token_ids"], choice["token_ids"])
                rows.append(Trajectory(*map(list, ids), prompt.id, choice["finish_reason"]))
            except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"server {server.url} did not answer prompt {prompt.id} with token ids "
                    f"({type(error).__name__}: {one_line(error, 160)})"
                ) from error
            progress(i + 1)
    counted = read_metrics(server) - before
    if counted.requests > len(rows):
        raise UserError(
            f"server {server.url} answered {counted.requests} requests where {len(rows)} were "
            "ours: its counters mix them, so check it while nobody else uses it"
        )
    return Served(rows, counted, list(prompts))


def expected(
    target: Target, drafter: Drafter, rows: Sequence[Trajectory], num_draft_tokens: int
) -> Acceptance:
    """What our drafter's rounds on these texts come to, counted as an engine counts.

    Engines emit the first token in the prefill, so their first round begins behind it. They also count
    tokens that the last round accepted beyond the end of the text.
    """
    begun = [
        Trajectory([*t.prompt_ids, t.response_ids[0]], t.response_ids[1:], t.id)
        for t in rows
        if len(t.response_ids) > 1
    ]
    accepted: list[int] = []
    for start in range(0, len(begun), BATCH):
        part = begun[start : start + BATCH]
        traces = hindsight_traces(target, drafter, part, draft_length=num_draft_tokens)
        accepted += [r.accepted for trace in traces for r in trace[:-1]]
        last = [t.ids[: trace[-1].anchor + 1] for t, trace in zip(part, traces, strict=True)]
        accepted += next_round(target, drafter, last, num_draft_tokens)
    return Acceptance(len(accepted), [sum(a > k for a in accepted) for k in range(num_draft_tokens)])


@torch.no_grad()
def next_round(target: Target, drafter: Drafter, texts: list[list[int]], num_draft_tokens: int) -> list[int]:
    """How many tokens the target accepts of a greedy draft behind each text."""
    ids = pad_rows(texts, target.device)
    anchors = torch.tensor([[len(t) - 1] for t in texts], device=target.device)
    features = target.trajectories(ids, drafter.target_layers).features
    context = drafter.build_cache(target, ids, features)
    drafted, _ = drafter.propose(
        target, context, anchors, ids.gather(1, anchors), num_draft_tokens, lambda x: (x.argmax(-1), None)
    )
    drafted = drafted[:, 0]
    whole = [t + d for t, d in zip(texts, drafted.tolist(), strict=True)]
    hidden = target.trajectories(pad_rows(whole, target.device)).hidden
    where = anchors + torch.arange(num_draft_tokens + 1, device=target.device)
    logits = target.logits(hidden.gather(1, where[..., None].expand(-1, -1, hidden.shape[-1])))
    return verify_greedy(drafted, logits).tolist()


def text_is_the_targets(target: Target, rows: Sequence[Trajectory]) -> list[bool]:
    """For each text, whether every token is the target's argmax behind those before it, up to what
    the type's rounding leaves open."""
    found = []
    for t in rows:
        gap, bound = regret(target, t.prompt_ids, t.response_ids)
        found.append(bool((gap <= bound).all()))
    return found


def distance(a: Acceptance, b: Acceptance) -> int:
    """How many accepted tokens and rounds differ."""
    rest = a - b
    return abs(rest.drafts) + sum(map(abs, rest.by_position))


def agrees(counted: Acceptance, ours: Acceptance, dtype: torch.dtype) -> bool:
    """Equal, up to a near-tie; in 16 bit up to 2 % of rounds and accepted tokens."""
    size = ours.drafts + ours.accepted
    allowed = 0.002 if dtype == torch.float32 else 0.02
    return distance(counted, ours) <= max(allowed * size, 1)


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
    target: Target, drafter: Drafter, served: Served, num_draft_tokens: int, ours: Acceptance
) -> list[str]:
    """Faults whose counts are the engine's, where ours are not; the nearest first."""
    base, found = distance(ours, served.counted), []
    for name, change in drafter.known_faults(target.num_layers).items():
        other = drafter.with_fault(change)  # one at a time: a drafter may be a good part of memory
        if other is not None and other.draft_length >= num_draft_tokens:
            counted = expected(target, other, served.rows, num_draft_tokens)
            found.append((distance(counted, served.counted), name))
    found.sort()
    nearest = found[0][0]
    # A cause explains nearly all of the difference, and about as much as the best one does.
    good = [(far, name) for far, name in found if far <= base / 10 and far <= 2 * nearest + 2]
    if served.counted.accepted < ours.accepted / 5 and (len(good) != 1 or nearest > 2):
        # Whatever drafts nothing right looks alike.
        return [
            "the engine accepts next to nothing of what it should: a weight that was not loaded "
            "(engines may pass over a misnamed tensor), or the drafter of another target"
        ]
    if good:
        return [f"{name} (its counts are {far} from the engine's, ours {base})" for far, name in good]
    return [
        "none of the known faults gives the engine's counts: try --dtype float32 (near-ties), --engine-args "
        "--enforce-eager (compiled kernels), another export format with --served, another engine version"
    ]


def compare(
    target: Target, drafter: Drafter, served: Served, num_draft_tokens: int, thinking: bool | None
) -> dict:
    """The whole finding, as `check-serving --json` prints it."""
    ours, count = expected(target, drafter, served.rows, num_draft_tokens), len(served.rows)
    same_text = text_is_the_targets(target, served.rows)
    same_prompt, template = templates(target, served, thinking)
    causes = [template] if template else []
    if min(ours.drafts, served.counted.drafts) < ENOUGH:
        causes.append(
            f"{served.counted.drafts} rounds are too few to tell: give more prompts or a larger "
            "--max-new-tokens"
        )
    elif not agrees(served.counted, ours, target.dtype):
        causes += likely_causes(target, drafter, served, num_draft_tokens, ours)
    if not all(same_text):
        causes.append(
            "the engine's text is not the target's own greedy text: another target, other weights, "
            "or kernels that round otherwise"
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
        "equal": not causes,
        "causes": causes,
    }
