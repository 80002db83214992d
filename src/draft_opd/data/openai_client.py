"""A server with an OpenAI-compatible API, as vLLM and SGLang have: where it is, how it is asked."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Literal

import httpx2 as httpx

from draft_opd.data.prompts import Prompt
from draft_opd.decoding.sampling import Sampling
from draft_opd.utils.errors import UserError, one_line


@dataclass
class Server:
    """A running server and how to ask it.

    in_flight: requests at a time. patience: seconds for which requests are repeated while it cannot
    be reached or is overloaded (it may be restarted in that time). timeout: seconds for an answer.
    """

    url: str
    model: str | None = None
    endpoint: Literal["completions", "chat"] = "completions"
    in_flight: int = 32
    patience: float = 300.0
    timeout: float = 900.0
    api_key: str | None = field(default_factory=lambda: os.environ.get("OPENAI_API_KEY"))

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
            base_url=self.url,
            headers=headers,
            timeout=self.timeout,
            trust_env=not here,
            limits=httpx.Limits(max_connections=self.in_flight),
        )

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
            raise UserError(f"server {self.url}/v1/models: {error_message(error.response)}") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            line = one_line(error, 120) or type(error).__name__
            hint = "is it running there?"
            if "SSL" in line or "certificate" in line:
                hint = "does it speak TLS, with a certificate that this machine trusts?"
            raise UserError(f"server {self.url} does not answer ({line}): {hint}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"server {self.url} is not an OpenAI-compatible API") from error
        if self.model is None and len(names) == 1:
            self.model = names[0]
        if self.model not in names:
            problem = f"'{self.model}' is not served" if self.model else "it serves several models"
            raise UserError(f"server {self.url}: {problem}; --server-model is one of {names}")
        return self.model


def sampling_params(sampling: Sampling) -> dict[str, float]:
    """Every sampling parameter of a request, neutral values too: servers take missing ones from the
    model's generation_config, which would change the text."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def chat_body(prompt: Prompt, given: dict, messages: list[dict] | None = None) -> dict:
    """The part of a chat request that makes its prompt: messages, tools, and what the template is
    given; the prompt's own arguments over `given`."""
    body: dict = {"messages": prompt.messages if messages is None else messages}
    if prompt.tools:
        body["tools"] = prompt.tools
    if kwargs := {**given, **prompt.template_kwargs}:
        body["chat_template_kwargs"] = kwargs
    return body


def error_message(answer: httpx.Response) -> str:
    """Status and message of an error, in one line."""
    try:
        body = answer.json()
        message = body.get("message") or (body.get("error") or {}).get("message") or ""
    except (ValueError, AttributeError):
        message = answer.text
    return f"HTTP {answer.status_code} {one_line(message, 160)}".strip()
