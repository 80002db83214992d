"""Trajectories from a server: the OpenAI-compatible API of vLLM or SGLang.

The prompt goes through the target's chat template once: here, and its token ids are sent
(`completions`), or there (`chat`), and the ids that come back are compared. Token ids of the answer
are asked for (`return_token_ids`); where a server does not give them, the text is tokenised again,
and a trajectory whose round trip is not exact is dropped.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx2 as httpx

from draft_opd.decoding.sampling import Sampling
from draft_opd.errors import UserError
from draft_opd.rollout.collect import Request, gather, how_made
from draft_opd.rollout.prompts import Prompt
from draft_opd.rollout.trajectory import Trajectory
from draft_opd.text import TargetText

BACKOFF = (0.5, 10.0)  # seconds between tries: the first, the longest
BUSY = (408, 429, 500, 502, 503, 504)  # statuses worth another try
FAILURES = 10  # of one prompt, while others are answered


class Dropped(Exception):
    """An answer that is not a trajectory of this target; the text says why."""


@dataclass
class Server:
    """A running server and how to ask it.

    in_flight: requests at a time. patience: seconds for which a request is repeated while the
    server cannot be reached or is overloaded (it may be restarted in that time).
    """

    url: str
    model: str | None = None
    endpoint: Literal["completions", "chat"] = "completions"
    in_flight: int = 32
    patience: float = 300.0
    timeout: float = 900.0
    api_key: str | None = field(default_factory=lambda: os.environ.get("OPENAI_API_KEY"))
    dropped: Counter[str] = field(default_factory=Counter)
    _last_answer: float = 0.0

    def __post_init__(self):
        self.url = self.url.rstrip("/").removesuffix("/v1")
        if self.endpoint not in ("completions", "chat"):
            raise UserError(f"--endpoint {self.endpoint}: choose completions or chat")
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"--server {self.url}: give a URL, as http://localhost:8000")

    def client(self, kind=httpx.Client):
        """An HTTP client for it; a proxy is for other machines than this one."""
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        here = (httpx.URL(self.url).host or "").strip("[]") in ("localhost", "127.0.0.1", "::1")
        return kind(
            base_url=self.url, headers=headers, timeout=self.timeout, trust_env=not here,
            limits=httpx.Limits(max_connections=self.in_flight),
        )  # fmt: skip

    def wait(self) -> str:
        """`check`, for a server that may be starting: it has `patience` seconds."""
        deadline = time.monotonic() + self.patience
        while True:
            try:
                return self.check()
            except UserError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)

    def check(self) -> str:
        """The name of the model it serves. Raises `UserError` when it does not answer, or serves
        several and none was chosen."""
        try:
            with self.client() as client:
                answer = client.get("/v1/models", timeout=30)
                answer.raise_for_status()
                names = [m["id"] for m in answer.json()["data"]]
        except httpx.HTTPStatusError as error:
            raise UserError(f"server {self.url}/v1/models: {why(error.response)}") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            said = " ".join(str(error).split())[:120] or type(error).__name__
            hint = "is it running there?"
            if "SSL" in said or "certificate" in said:
                hint = "does it speak TLS, with a certificate that this machine trusts?"
            raise UserError(f"server {self.url} does not answer ({said}): {hint}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"server {self.url} is not an OpenAI-compatible API") from error
        if self.model is None and len(names) == 1:
            self.model = names[0]
        if self.model not in names:
            told = f"'{self.model}' is not served" if self.model else "it serves several models"
            raise UserError(f"server {self.url}: {told}; --server-model is one of {names}")
        return self.model

    def answers(
        self,
        text: TargetText,
        *,
        sampling: Sampling,
        max_new_tokens: int,
        seed: int = 0,
        thinking: bool | None = None,
    ):
        """An `Answer` for `gather`. What it drops is counted in `dropped`, by reason."""

        def answer(requests: list[Request], emit: Callable[[list[Trajectory]], None]) -> None:
            asyncio.run(everything(requests, emit))

        async def everything(requests, emit) -> None:
            gate = asyncio.Semaphore(self.in_flight)
            async with self.client(httpx.AsyncClient) as client:

                async def one(request: Request) -> None:
                    async with gate:
                        own_seed = (seed + zlib.crc32(request.id.encode())) % 2**31
                        path, body = self._body(text, request, sampling, max_new_tokens, own_seed)
                        if thinking is not None and self.endpoint == "chat":
                            body["chat_template_kwargs"] = {"enable_thinking": thinking}
                        try:
                            found = await self._post(client, path, body)
                            ids, finish = read_answer(text, request.prompt_ids, found)
                        except Dropped as reason:
                            # Counts and offsets in a server's message would make each its own.
                            self.dropped[re.sub(r"(?<!HTTP )\b\d+", "N", str(reason))] += 1
                            return
                    kind = (request.id, finish, *sampling.filters, own_seed)
                    emit([Trajectory(request.prompt_ids, ids, *kind)])

                tasks = [asyncio.create_task(one(r)) for r in requests]
                try:
                    await asyncio.gather(*tasks)
                finally:
                    for task in tasks:
                        task.cancel()

        return answer

    def _body(self, text, request: Request, sampling: Sampling, longest: int, seed: int):
        room = text.max_positions - len(request.prompt_ids)
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": min(longest, room),
            "seed": seed,
            **said(sampling),
            "skip_special_tokens": False,
            "return_token_ids": True,
        }
        if self.endpoint == "chat":
            return "/v1/chat/completions", {**body, "messages": request.messages}
        return "/v1/completions", {**body, "prompt": request.prompt_ids}

    async def _post(self, client: httpx.AsyncClient, path: str, body: dict) -> dict:
        """The JSON answer; tries again while the server is away or overloaded."""
        pause, began, failures = BACKOFF[0], time.monotonic(), 0
        while True:
            try:
                answer = await client.post(path, json=body)
                if answer.status_code not in BUSY:
                    self._last_answer = time.monotonic()
                    break
                problem = why(answer)
                failures += answer.status_code >= 500
            except httpx.TransportError as error:
                problem = type(error).__name__
            if failures >= FAILURES and self._last_answer > began:
                raise Dropped(problem)  # others are answered: it is this prompt
            if time.monotonic() - max(began, self._last_answer) > self.patience:
                raise UserError(
                    f"server {self.url} has not answered for {self.patience:g} s ({problem}); "
                    "what was collected is kept: run the same command again to go on"
                )
            await asyncio.sleep(pause)
            pause = min(2 * pause, BACKOFF[1])
        if answer.status_code in (400, 413, 422):  # this prompt, perhaps; the others may pass
            raise Dropped(why(answer))
        if answer.status_code != 200:
            raise UserError(f"server {self.url}{path}: {why(answer)}")
        try:
            return answer.json()
        except ValueError:
            raise UserError(f"server {self.url}{path} does not answer in JSON") from None


def said(sampling: Sampling) -> dict[str, float]:
    """Sampling as a request says it, also where it changes nothing: servers take the rest from the
    model's generation_config, and that would change the text."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def gather_from(
    server: Server,
    text: TargetText,
    prompts: list[Prompt],
    out: Path,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    samples: int = 1,
    seed: int = 0,
    thinking: bool | None = None,
    progress: Callable[[int, int, int], None] | None = None,
) -> Path:
    """`gather` with a server that answers. Raises `UserError` when nothing usable came back."""
    about = how_made(sampling, seed, max_new_tokens, samples)
    options = {"sampling": sampling, "max_new_tokens": max_new_tokens, "seed": seed}
    answer = server.answers(text, thinking=thinking, **options)
    path = gather(
        text, prompts, out, answer, about, samples=samples, thinking=thinking, progress=progress
    )
    if server.dropped and not path.stat().st_size:
        reason, count = server.dropped.most_common(1)[0][0], server.dropped.total()
        raise UserError(f"no answer of {server.url} is usable: {count} dropped, {reason}")
    return path


def read_answer(
    text: TargetText, prompt_ids: list[int], answer: dict
) -> tuple[list[int], Literal["stop", "length"]]:
    """(response ids, stop token included; how it ended) from a completion or chat completion.

    Raises `Dropped` where the ids of prompt and response are not certain.
    """
    try:
        choice = answer["choices"][0]
        finish, usage = choice["finish_reason"], answer.get("usage") or {}
        told = choice.get("text")
        if told is None:
            told = choice["message"].get("content") or ""
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(
            "the server's answer is not a completion (no choices with text and finish_reason): is "
            "it an OpenAI-compatible API?"
        ) from error
    if finish not in ("stop", "length"):
        raise Dropped(f"ended by '{finish}'")
    seen = choice.get("prompt_token_ids") or answer.get("prompt_token_ids")
    # Without ids only their number can be compared.
    same = seen == prompt_ids if seen else usage.get("prompt_tokens") == len(prompt_ids)
    if not same:
        raise Dropped("the server saw another prompt (its chat template, or its tokenizer)")
    ids = choice.get("token_ids") or choice.get("response_token_ids")
    stops = text.stop_ids
    if ids:
        ids = list(ids)
        if finish == "stop" and ids[-1] not in stops:
            ids.append(_stop_token(text, choice))
    else:
        ids = text.tokenizer.encode(told, add_special_tokens=False)
        if text.tokenizer.decode(ids, skip_special_tokens=False) != told:
            raise Dropped("its text does not tokenise back to itself")
        if finish == "stop":
            ids.append(_stop_token(text, choice))
        if usage.get("completion_tokens") != len(ids):
            raise Dropped("its text tokenises to another number of tokens than it was made of")
    if not ids or max(ids) >= text.vocab_size:
        raise Dropped("it has token ids that the target does not have" if ids else "it is empty")
    return ids, finish


def _stop_token(text: TargetText, choice: dict) -> int:
    """The token that ended an answer which does not show it."""
    reason = choice.get("stop_reason", choice.get("matched_stop"))
    if reason is None:
        eos = getattr(text.tokenizer, "eos_token_id", None)
        reason = eos if eos in text.stop_ids else None
        if len(text.stop_ids) == 1:
            reason = next(iter(text.stop_ids))
    if reason not in text.stop_ids:
        raise Dropped("it ended by something else than the target's stop tokens")
    return reason


def why(answer: httpx.Response) -> str:
    """Status and message of an error, in one line."""
    try:
        body = answer.json()
        message = body.get("message") or (body.get("error") or {}).get("message") or ""
    except (ValueError, AttributeError):
        message = answer.text
    return f"HTTP {answer.status_code} {' '.join(str(message).split())[:160]}".strip()
