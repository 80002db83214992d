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

from draft_opd.data.openai_client import Server, chat_body, error_message, sampling_params
from draft_opd.data.prompts import Prompt
from draft_opd.data.tasks import Task
from draft_opd.decoding.sampling import Sampling
from draft_opd.evaluation.result import Lossless, ServedLevel, ServedRate, Sides, Spread, TaskResult
from draft_opd.evaluation.statistics import quantile
from draft_opd.serving.vllm_process import Acceptance, read_metrics
from draft_opd.utils.errors import UserError, one_line


@dataclass
class Reply:
    """One answer: all of its text, the part that is no thinking, how many tokens it was made of,
    seconds to the first and to the last."""

    text: str
    content: str
    tokens: int
    first: float
    seconds: float


async def _ask(client: httpx.AsyncClient, body: dict, url: str) -> Reply:
    """Streams one chat completion. Raises `UserError` for anything that is none."""
    began, first, text, content = time.perf_counter(), None, [], []
    tokens, ended = None, False
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                raise UserError(f"server {url}: {error_message(answer)}")
            async for line in answer.aiter_lines():
                data = line.removeprefix("data:").strip()
                ended = ended or data == "[DONE]"
                if not line.startswith("data:") or ended:
                    continue
                part = json.loads(data)
                if part.get("error"):
                    told = one_line(part["error"], 160)
                    raise UserError(f"server {url}: {told}")
                for choice in part.get("choices") or ():
                    delta = choice.get("delta") or {}
                    # A reasoning parser sends thinking in a field of its own: one of these, or both.
                    thought = delta.get("reasoning") or delta.get("reasoning_content") or ""
                    answered = delta.get("content") or ""
                    if thought or answered:
                        first = first or time.perf_counter() - began
                        text.append(thought + answered)
                        content.append(answered)
                tokens = (part.get("usage") or {}).get("completion_tokens", tokens)
    except httpx.HTTPError as error:
        raise UserError(f"server {url} broke off ({type(error).__name__})") from error
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"server {url} does not stream chat completions ({error})") from error
    seconds = time.perf_counter() - began
    if not ended:
        raise UserError(f"server {url} broke off in the middle of an answer")
    if not isinstance(tokens, int):
        raise UserError(f"server {url} does not say how many tokens it made (stream_options)")
    return Reply("".join(text), "".join(content), tokens, first or seconds, seconds)


def ask_all(
    server: Server,
    prompts: Sequence[Prompt],
    in_flight: int,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    template_kwargs: dict | None = None,
    seed: int = 0,
) -> tuple[list[Reply], float]:
    """All prompts (and the turns behind them), `in_flight` at a time: replies in the prompts'
    order, and seconds in all."""
    common = {
        "model": server.model,
        "max_tokens": max_new_tokens,
        "seed": seed,
        "stream": True,
        "stream_options": {"include_usage": True},
        **sampling_params(sampling),
    }
    given = template_kwargs or {}

    async def everything() -> list[list[Reply]]:
        gate = asyncio.Semaphore(in_flight)
        async with server.client(httpx.AsyncClient) as client:

            async def one(prompt: Prompt) -> list[Reply]:
                async with gate:
                    messages, replies = list(prompt.messages), []
                    for more in (None, *prompt.later):
                        if more is not None:
                            messages += [
                                {"role": "assistant", "content": replies[-1].content},
                                {"role": "user", "content": more},
                            ]
                        body = {**common, **chat_body(prompt, given, messages)}
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
) -> TaskResult:
    """A task on a server; options as in `ask_all`.

    baseline: a server of the target alone. The two are asked one after the other at each level of
    concurrency, so each has the machine to itself if the other is idle. Prompts are asked again
    until there are twice as many as the level, so that it is reached; one request warms up.
    The figures beside `concurrency` are those of the first level; texts are compared there (in 16
    bit they may differ by near-ties).
    """
    levels: list[ServedLevel] = []
    texts, counts = {}, None
    sides = {"speculative": server, **({"target": baseline} if baseline else {})}
    for which in sides.values():
        ask_all(which, task.prompts[:1], 1, **{**options, "max_new_tokens": 8})
    for i, in_flight in enumerate(concurrency):
        rates, counted = {}, {}
        times = -(-2 * in_flight // len(task.prompts)) if 2 * in_flight > len(task.prompts) else 1
        for side, which in sides.items():
            before = counters(which) if side == "speculative" else None
            replies, seconds = ask_all(which, task.prompts * times, in_flight, **options)
            tokens = sum(r.tokens for r in replies)
            rates[side] = ServedRate(
                requests=len(replies),
                tokens=tokens,
                tokens_per_second=tokens / seconds,
                mean_in_flight=sum(r.seconds for r in replies) / seconds,
                seconds_per_request=_spread([r.seconds for r in replies]),
                milliseconds_to_first_token=_spread([1000 * r.first for r in replies]),
            )
            if i == 0:
                texts[side] = [r.text for r in replies]
            if before is not None:
                since = read_metrics(which) - before
                if since.requests > len(replies):
                    raise UserError(
                        f"server {server.url} answered {since.requests} requests where "
                        f"{len(replies)} were ours: measure it while nobody else uses it"
                    )
                counted = {"rounds": since.drafts, "tau": since.tau or None}
                counts = counts or since
        if baseline:
            speeds = [rates[side].tokens_per_second for side in ("speculative", "target")]
            counted["speedup"] = speeds[0] / speeds[1]
        levels.append(ServedLevel(in_flight=in_flight, **rates, **counted))
        if progress:
            progress(task.name, i + 1, len(concurrency))
    first = levels[0]
    both = baseline is not None and options["sampling"].greedy
    drafts = counts.drafts if counts else 0
    since_start = None if drafts else average(server)
    source = since_start and "SGLang's average since its start"
    return TaskResult(
        task=task.name,
        prompts=len(task.prompts),
        responses=len(texts["speculative"]),
        tokens=first.speculative.tokens,
        rounds=drafts or None,
        tau=counts.tau if drafts else since_start,
        tau_from="vLLM's counters over the first level" if drafts else source,
        tau_per_response=None,
        acceptance_by_position=[n / drafts for n in counts.by_position] if drafts else [],
        tokens_per_second=Sides(
            target=first.target and first.target.tokens_per_second,
            speculative=first.speculative.tokens_per_second,
        ),
        speedup=first.speedup,
        lossless=Lossless(
            matched=sum(a == b for a, b in zip(*texts.values(), strict=True)) if both else None,
            of=len(texts["speculative"]) if both else 0,
        ),
        concurrency=levels,
    )


def _spread(values: list[float]) -> Spread:
    return Spread(mean=sum(values) / len(values), p50=quantile(values, 0.5), p95=quantile(values, 0.95))
