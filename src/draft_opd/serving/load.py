"""A running server as a side of `eval`: what its users see, and the acceptance that it counts.

Requests go through the OpenAI-compatible API (streaming, the server's own chat template), so many
in flight at a time. τ is the engine's own: vLLM's counters over the run, or the average that SGLang
keeps since it was started.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx2 as httpx

from draft_opd.decoding.sampling import Sampling
from draft_opd.errors import UserError
from draft_opd.evaluation.statistics import quantile
from draft_opd.evaluation.tasks import Task
from draft_opd.rollout.prompts import Prompt
from draft_opd.rollout.server import Server, why
from draft_opd.serving.vllm import Acceptance, read_metrics

# Servers with a reasoning parser stream thinking under a name of its own.
SAID = ("reasoning", "reasoning_content", "content")


@dataclass
class Reply:
    """One answer: its text, how many tokens it was made of, seconds to the first and to the last"""

    text: str
    tokens: int
    first: float
    seconds: float


async def _ask(client: httpx.AsyncClient, body: dict, url: str) -> Reply:
    """Streams one chat completion. Raises `UserError` for anything that is none."""
    began, first, text, tokens, ended = time.perf_counter(), None, [], 0, False
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                raise UserError(f"server {url}: {why(answer)}")
            async for line in answer.aiter_lines():
                data = line.removeprefix("data:").strip()
                ended = ended or data == "[DONE]"
                if not line.startswith("data:") or ended:
                    continue
                part = json.loads(data)
                for choice in part.get("choices") or ():
                    delta = choice.get("delta") or {}
                    said = "".join(
                        delta.get(key) or ""
                        for key in ("reasoning", "reasoning_content", "content")
                    )
                    if said:
                        first = first or time.perf_counter() - began
                        text.append(said)
                tokens = (part.get("usage") or {}).get("completion_tokens", tokens)
    except httpx.HTTPError as error:
        raise UserError(f"server {url} broke off ({type(error).__name__})") from error
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"server {url} does not stream chat completions ({error})") from error
    seconds = time.perf_counter() - began
    if not ended:
        raise UserError(f"server {url} broke off in the middle of an answer")
    if not tokens:
        raise UserError(f"server {url} does not say how many tokens it made (stream_options)")
    return Reply("".join(text), tokens, first or seconds, seconds)


def ask_all(
    server: Server,
    prompts: Sequence[Prompt],
    in_flight: int,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    thinking: bool | None = None,
    seed: int = 0,
) -> tuple[list[Reply], float]:
    """All prompts (and the turns behind them), `in_flight` at a time: replies in the prompts'
    order, and seconds in all."""
    common = {
        "model": server.model, "max_tokens": max_new_tokens, "seed": seed, "stream": True,
        "stream_options": {"include_usage": True}, "temperature": sampling.temperature,
        "top_p": sampling.top_p, "top_k": sampling.top_k or -1, "repetition_penalty": 1.0,
    }  # fmt: skip
    if thinking is not None:
        common["chat_template_kwargs"] = {"enable_thinking": thinking}

    async def everything() -> list[list[Reply]]:
        gate = asyncio.Semaphore(in_flight)
        async with server.client(httpx.AsyncClient) as client:

            async def one(prompt: Prompt) -> list[Reply]:
                async with gate:
                    messages, replies = list(prompt.messages), []
                    for more in (None, *prompt.later):
                        if more is not None:
                            messages += [
                                {"role": "assistant", "content": replies[-1].text},
                                {"role": "user", "content": more},
                            ]
                        body = {**common, "messages": messages}
                        replies.append(await _ask(client, body, server.url))
                    return replies

            tasks = [asyncio.create_task(one(p)) for p in prompts]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

    server.in_flight = max(server.in_flight, in_flight)
    began = time.perf_counter()
    found = asyncio.run(everything())
    return [r for replies in found for r in replies], time.perf_counter() - began


def counters(server: Server) -> Acceptance | None:
    """vLLM's counters, None where there are none."""
    try:
        return read_metrics(server)
    except UserError:
        return None


def average(server: Server) -> float | None:
    """SGLang's acceptance length since its start, None for other servers."""
    for path in ("/server_info", "/get_server_info"):
        try:
            with server.client() as client:
                found = client.get(path, timeout=30).json()
            return float(found["internal_states"][0]["avg_spec_accept_length"])
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError):
            continue
    return None


def measure_server(
    server: Server,
    baseline: Server | None,
    task: Task,
    concurrency: Sequence[int],
    *,
    progress: Callable[[str, int, int], None] | None = None,
    **options,
) -> dict:
    """What `eval.json` says of a task on a server; options as in `ask_all`.

    baseline: a server of the target alone. The two are asked one after the other at each level of
    concurrency, so each has the machine to itself if the other is idle. Texts are compared at the
    first level (in 16 bit they may differ by near-ties).
    """
    levels, first = [], None
    total = Acceptance(0)
    for i, in_flight in enumerate(concurrency):
        row = {"in_flight": in_flight}
        sides = {"speculative": server, **({"target": baseline} if baseline else {})}
        texts = {}
        for side, which in sides.items():
            before = counters(which)
            replies, seconds = ask_all(which, task.prompts, in_flight, **options)
            row[side] = {
                "tokens": sum(r.tokens for r in replies),
                "tokens_per_second": sum(r.tokens for r in replies) / seconds,
                "seconds_per_request": _spread([r.seconds for r in replies]),
                "milliseconds_to_first_token": _spread([1000 * r.first for r in replies]),
            }
            texts[side] = [r.text for r in replies]
            if side == "speculative" and before is not None:
                counted = counters(which) - before
                if counted.requests > len(replies):
                    raise UserError(
                        f"server {server.url} answered {counted.requests} requests where "
                        f"{len(replies)} were ours: measure it while nobody else uses it"
                    )
                row["rounds"], row["tau"] = counted.drafts, counted.tau
                total = total + counted
        if baseline:
            row["speedup"] = (
                row["speculative"]["tokens_per_second"] / row["target"]["tokens_per_second"]
            )
        first = first or {"texts": texts, "row": row}
        levels.append(row)
        if progress:
            progress(task.name, i + 1, len(concurrency))
    row, texts = first["row"], first["texts"]
    since_start = None if total.drafts else average(server)
    greedy = options["sampling"].greedy
    both = baseline is not None and greedy
    return {
        "task": task.name,
        "prompts": len(task.prompts),
        "responses": len(texts["speculative"]),
        "tokens": row["speculative"]["tokens"],
        "rounds": total.drafts or None,
        "tau": total.tau if total.drafts else since_start,
        "tau_from": "vLLM's counters over this run"
        if total.drafts
        else since_start and "SGLang's average since its start",
        "tau_per_response": None,
        "acceptance_by_position": [n / total.drafts for n in total.by_position],
        "tokens_per_second": {
            side: row[side]["tokens_per_second"] if side in row else None
            for side in ("target", "speculative")
        },
        "speedup": row.get("speedup"),
        "lossless": {
            "matched": sum(map(str.__eq__, *texts.values())) if both else None,
            "of": len(texts["speculative"]) if both else 0,
        },
        "concurrency": levels,
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": sum(values) / len(values), "p50": quantile(values, 0.5),
            "p95": quantile(values, 0.95)}  # fmt: skip
