"""Trajectories from servers: prompts are answered by whichever is free, again if need be.

The prompt goes through the target's chat template once: here, and its token ids are sent
(`completions`), or there (`chat`), and the ids that come back are compared. Token ids of the answer
are asked for (`return_token_ids`); where a server does not give them, the text is tokenised again,
and a trajectory whose round trip is not exact is dropped.
"""

from __future__ import annotations

import asyncio
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx2 as httpx

from draft_opd.data.collect import Request, gather, how_made
from draft_opd.data.openai_client import Server, chat_body, error_message, sampling_params
from draft_opd.data.prompts import Prompt
from draft_opd.data.skipped import Filters, Skipped
from draft_opd.data.trajectory import Trajectory
from draft_opd.decoding.sampling import Sampling
from draft_opd.models.target_info import TargetInfo
from draft_opd.utils.errors import UserError

BACKOFF = (0.5, 10.0)  # seconds until a prompt is tried again: the first time, at most
BUSY = (408, 429, 502, 503, 504)  # statuses that say nothing of the prompt
FAILURES = 5  # of one prompt, while others are answered
TIMEOUTS = 2  # of one prompt


class AnswerRejected(Exception):
    """An answer that is not a trajectory of this target; the text says why."""


class InvalidResponse(Exception):
    """Something that is no answer at all, or a server's failure; it may pass."""


class RequestTimeout(Exception):
    """No answer in all the time that the server has for one."""


class ServerUnavailable(Exception):
    """The server cannot be reached, or has too much to do. `wait`: seconds that it asked for."""

    def __init__(self, problem: str, wait: float = 0.0):
        super().__init__(problem)
        self.wait = wait


@dataclass
class Collected:
    """The trajectories' file, and how many prompts have none, by reason."""

    path: Path
    dropped: Counter[str] = field(default_factory=Counter)


def gather_from(
    servers: Server | Sequence[Server],
    text: TargetInfo,
    prompts: list[Prompt],
    out: Path,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    samples: int = 1,
    seed: int = 0,
    thinking: bool | None = None,
    skipped: Skipped | None = None,
    filters: Filters | None = None,
    progress: Callable[[int, int, int], None] | None = None,
) -> Collected:
    """`gather` with servers that answer, each with as many requests as its `in_flight`.

    Raises `UserError` when nothing usable came back, or none of them answers for their `patience`.
    """
    servers = [servers] if isinstance(servers, Server) else list(servers)
    about = how_made(sampling, seed, max_new_tokens, samples)
    asked = _Asking(servers, text, sampling, max_new_tokens, seed, thinking)
    path = gather(
        text,
        prompts,
        out,
        asked.answer,
        about,
        samples=samples,
        thinking=thinking,
        skipped=skipped,
        filters=filters,
        progress=progress,
    )
    if asked.dropped and not path.stat().st_size:
        reason, count = asked.dropped.most_common(1)[0][0], asked.dropped.total()
        raise UserError(f"no answer of {asked.names} is usable: {count} dropped, most because {reason}")
    return Collected(path, asked.dropped)


@dataclass
class _Asking:
    """Requests on their way to servers and back."""

    servers: list[Server]
    text: TargetInfo
    sampling: Sampling
    longest: int
    seed: int
    thinking: bool | None
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def names(self) -> str:
        return ", ".join(s.url for s in self.servers)

    def answer(self, requests: list[Request], emit: Callable[[list[Trajectory]], None]) -> None:
        """An `Answer` for `gather`."""
        asyncio.run(self._all(requests, emit))

    async def _all(self, requests: list[Request], emit) -> None:
        self.emit, self.open = emit, len(requests)
        self.queue: asyncio.Queue[Request] = asyncio.Queue()
        self.done = asyncio.Event()
        self.tries: Counter[str] = Counter()
        self.failures: dict[str, list[float]] = {}  # prompt id -> times of its invalid responses
        self.timeouts: Counter[str] = Counter()
        self.trouble: dict[str, float] = {}  # servers: since when they have not answered a prompt
        self.last_answer = float("-inf")
        for request in requests:
            self.queue.put_nowait(request)
        clients = [s.client(httpx.AsyncClient) for s in self.servers]
        workers = [
            asyncio.create_task(self._work(s, c))
            for s, c in zip(self.servers, clients, strict=True)
            for _ in range(s.in_flight)
        ]
        tasks = [asyncio.create_task(self.done.wait()), *workers]
        try:  # workers end by errors only
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for client in clients:
                await client.aclose()

    async def _work(self, server: Server, client: httpx.AsyncClient) -> None:
        pause = 0.0  # of this worker: its server may be away while others are not
        while True:
            request = await self.queue.get()
            try:
                found = await self._try(server, client, request)
            except RequestTimeout as problem:
                self._late(request, problem)
            except (InvalidResponse, ServerUnavailable) as problem:
                self._failed(server, problem)
                self._again(request, problem)
                pause = min(max(2 * pause, BACKOFF[0]), BACKOFF[1])
                await asyncio.sleep(max(pause, getattr(problem, "wait", 0.0)))
            else:
                pause, self.last_answer = 0.0, time.monotonic()
                self.trouble.pop(server.url, None)
                if isinstance(found, str):
                    self._drop(found)
                else:
                    self.emit([found])
                    self._close()

    def _close(self) -> None:
        self.open -= 1
        if not self.open:
            self.done.set()

    def _drop(self, reason: str) -> None:
        # Numbers become N, so that equal errors are counted under one reason.
        self.dropped[re.sub(r"(?<!HTTP )\b\d+", "N", reason)] += 1
        self._close()

    def _failed(self, server: Server, problem: Exception) -> None:
        """Ends all where every server has been in trouble for longer than it may."""
        now = time.monotonic()
        self.trouble.setdefault(server.url, now)
        if all(now - self.trouble.get(s.url, now) > s.patience for s in self.servers):
            raise UserError(
                f"server {self.names} has not answered for {server.patience:g} s ({problem}); what "
                "was collected is kept: run the same command again to go on"
            )

    def _late(self, request: Request, problem: Exception) -> None:
        self.timeouts[request.id] += 1
        if self.timeouts[request.id] < TIMEOUTS:
            self.queue.put_nowait(request)
        elif self.last_answer > float("-inf"):
            self._drop(str(problem))
        else:
            raise UserError(f"server {self.names}: {problem}, of any prompt")

    def _again(self, request: Request, problem: Exception) -> None:
        """Puts the request back, to be tried later. Drops it after `FAILURES` invalid responses, if
        other prompts were answered since the first of them."""
        if isinstance(problem, InvalidResponse):
            failures = self.failures.setdefault(request.id, [])
            failures.append(time.monotonic())
            if len(failures) >= FAILURES and self.last_answer > failures[0]:
                self._drop(str(problem))  # it is this prompt
                return
        wait = min(BACKOFF[0] * 2 ** self.tries[request.id], BACKOFF[1])
        self.tries[request.id] = min(self.tries[request.id] + 1, 16)
        wait = max(wait, getattr(problem, "wait", 0.0))
        asyncio.get_running_loop().call_later(wait, self.queue.put_nowait, request)

    async def _try(self, server: Server, client, request: Request) -> Trajectory | str:
        """One request: the trajectory, or why its prompt gets none.

        Raises `InvalidResponse`, `ServerUnavailable` or `RequestTimeout` for what may pass, `UserError` for
        what stays wrong.
        """
        own_seed = (self.seed + zlib.crc32(request.id.encode())) % 2**31
        path, body = self._body(server, request, own_seed)
        try:
            answer = await client.post(path, json=body)
        except httpx.ReadTimeout as error:
            raise RequestTimeout(f"no answer in {server.timeout:g} s") from error
        except httpx.DecodingError as error:
            raise InvalidResponse("an answer that cannot be decoded") from error
        except httpx.RequestError as error:
            raise ServerUnavailable(type(error).__name__) from error
        status = answer.status_code
        if status in BUSY:
            raise ServerUnavailable(error_message(answer), _seconds(answer.headers.get("retry-after")))
        if status >= 500:
            raise InvalidResponse(error_message(answer))
        if status in (400, 413, 422):  # this prompt, perhaps; the others may pass
            words, texts = error_message(answer), [m["content"][:20] for m in request.prompt.messages]
            return f"HTTP {status}" if any(x and x in words for x in texts) else words
        if status != 200:
            raise UserError(f"server {server.url}{path}: {error_message(answer)}")
        try:
            ids, finish = read_answer(self.text, request.prompt_ids, answer.json())
        except (ValueError, RecursionError):
            raise InvalidResponse("an answer that is not JSON") from None
        except AnswerRejected as reason:
            return str(reason)
        kind = (request.id, finish, *self.sampling.as_tuple, own_seed)
        return Trajectory(request.prompt_ids, ids, *kind)

    def _body(self, server: Server, request: Request, seed: int) -> tuple[str, dict[str, Any]]:
        room = self.text.max_positions - len(request.prompt_ids)
        body: dict[str, Any] = {
            "model": server.model,
            "max_tokens": min(self.longest, room),
            "seed": seed,
            **sampling_params(self.sampling),
            "skip_special_tokens": False,
            "return_token_ids": True,
        }
        if server.endpoint == "chat":
            given = self.text.chat.arguments(self.thinking)
            return "/v1/chat/completions", {**body, **chat_body(request.prompt, given)}
        return "/v1/completions", {**body, "prompt": request.prompt_ids}


def _seconds(text: str | None) -> float:
    """Of a Retry-After header, at most a minute; 0 where it says a date or nothing."""
    try:
        return min(max(float(text or 0), 0.0), 60.0)
    except ValueError:
        return 0.0


def read_answer(
    text: TargetInfo, prompt_ids: list[int], answer: dict
) -> tuple[list[int], Literal["stop", "length"]]:
    """(response ids, stop token included; how it ended) from a completion or chat completion.

    Raises `AnswerRejected` where the ids of prompt and response are not certain, `InvalidResponse` where it
    is no completion.
    """
    try:
        choice = answer["choices"][0]
        finish, usage = choice["finish_reason"], answer.get("usage") or {}
        answer_text = choice.get("text")
        if answer_text is None:
            answer_text = choice["message"].get("content") or ""
        if not isinstance(answer_text, str) or not isinstance(usage, dict):
            raise TypeError
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InvalidResponse("an answer that is no completion") from error
    if finish not in ("stop", "length"):
        raise AnswerRejected(f"ended by '{finish}'")
    server_prompt_ids = choice.get("prompt_token_ids") or answer.get("prompt_token_ids")
    # Without ids only their number can be compared.
    same = (
        server_prompt_ids == prompt_ids
        if server_prompt_ids
        else usage.get("prompt_tokens") == len(prompt_ids)
    )
    if not same:
        raise AnswerRejected("the server saw another prompt (its chat template, or its tokenizer)")
    ids = choice.get("token_ids") or choice.get("response_token_ids")
    made = usage.get("completion_tokens")
    if ids:
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise AnswerRejected("its token ids are no numbers")
        if isinstance(made, int) and not made - 1 <= len(ids) <= made:
            raise AnswerRejected("it has not as many token ids as it was made of")
        if max(ids) >= text.vocab_size:
            raise AnswerRejected("it has token ids that the target does not have")
        ids = list(ids)
        if finish == "stop":
            ids = _ended(text, choice, ids, made)
    else:
        ids = text.tokenizer.encode(answer_text, add_special_tokens=False)
        if text.tokenizer.decode(ids, skip_special_tokens=False) != answer_text:
            raise AnswerRejected("its text does not tokenise back to itself")
        if finish == "stop":
            ids.append(_stop_token(text, choice))
        if made != len(ids):
            raise AnswerRejected("its text tokenises to another number of tokens than it was made of")
    if not ids:
        raise AnswerRejected("it is empty")
    return ids, finish


def _ended(text: TargetInfo, choice: dict, ids: list[int], made: object) -> list[int]:
    """The ids of an answer that a stop token ended, with that token; nothing that was not generated.

    Raises `AnswerRejected` where something else ended it.
    """
    reason = choice.get("stop_reason", choice.get("matched_stop"))
    if isinstance(reason, str):  # a stop text
        raise AnswerRejected("it ended by something else than the target's stop tokens")
    if ids[-1] in text.stop_ids or ids[-1] == reason:
        return ids
    if made == len(ids):  # all that was generated is here
        raise AnswerRejected("it ended by something else than the target's stop tokens")
    return [*ids, _stop_token(text, choice)]


def _stop_token(text: TargetInfo, choice: dict) -> int:
    """The token that ended an answer which does not show it."""
    reason = choice.get("stop_reason", choice.get("matched_stop"))
    if reason is None:
        eos = getattr(text.tokenizer, "eos_token_id", None)
        reason = eos if eos in text.stop_ids else None
        if len(text.stop_ids) == 1:
            reason = next(iter(text.stop_ids))
    if type(reason) is not int or reason not in text.stop_ids:
        raise AnswerRejected("it ended by something else than the target's stop tokens")
    return reason
