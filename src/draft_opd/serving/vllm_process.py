"""vLLM as a process of ours, and the acceptance that it counts itself."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import httpx2 as httpx

from draft_opd.data.openai_client import Server
from draft_opd.utils.errors import UserError

DRAFTS = "vllm:spec_decode_num_drafts_total"
PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
REQUESTS = "vllm:request_success_total"
# What says why an engine did not start.
CAUSES = re.compile(r"((?:\w+Error|\w+Exception): .+)")


@dataclass
class Acceptance:
    """Rounds (drafts) and, offset by offset, how many of them accepted it; requests finished."""

    drafts: int
    by_position: list[int] = field(default_factory=list)
    requests: int = 0

    @property
    def accepted(self) -> int:
        return sum(self.by_position)

    @property
    def tau(self) -> float:
        """Tokens a round, bonus token included."""
        return 1 + self.accepted / self.drafts if self.drafts else 0.0

    def __sub__(self, other: Acceptance) -> Acceptance:
        return self._with(other, -1)

    def __add__(self, other: Acceptance) -> Acceptance:
        return self._with(other, 1)

    def _with(self, other: Acceptance, sign: int) -> Acceptance:
        pairs = zip_longest(self.by_position, other.by_position, fillvalue=0)
        return Acceptance(
            self.drafts + sign * other.drafts,
            [x + sign * y for x, y in pairs],
            self.requests + sign * other.requests,
        )


def read_metrics(server: Server) -> Acceptance:
    """The counters of `/metrics`, summed over engines. Raises `UserError` where there are none."""
    try:
        with server.client() as client:
            answer = client.get("/metrics", timeout=30)
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise UserError(f"server {server.url} shows no /metrics ({type(error).__name__})") from error
    drafts, requests, accepted, seen = 0.0, 0.0, Counter(), False
    try:
        for line in answer.text.splitlines():
            name, _, value = line.rpartition(" ")
            if name.startswith(DRAFTS):
                drafts, seen = drafts + float(value), True
            elif name.startswith(PER_POSITION):
                accepted[int(re.search(r'position="(\d+)"', name)[1])] += float(value)
            elif name.startswith(REQUESTS):
                requests += float(value)
    except (ValueError, TypeError) as error:
        raise UserError(f"server {server.url}: its /metrics are not vLLM's ({line[:80]})") from error
    if not seen:
        raise UserError(
            f"server {server.url} counts no drafts (no {DRAFTS} in /metrics): is it vLLM, started "
            "with --speculative-config?"
        )
    width = max(accepted, default=-1) + 1
    return Acceptance(round(drafts), [round(accepted[k]) for k in range(width)], round(requests))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Engine:
    """vLLM serving `target` with the drafter in `folder`; a context manager.

    command: how to start vLLM's server on this machine, without arguments (`vllm serve`, or
    `PYTHON -m vllm.entrypoints.openai.api_server`); extra: arguments of the user's.
    """

    def __init__(
        self,
        target: str,
        folder: Path,
        method: str,
        num_draft_tokens: int,
        log: Path,
        *,
        command: str = "vllm serve",
        extra: str = "",
        dtype: str | None = None,
        timeout: float = 900.0,
    ):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log, self.timeout = log, timeout
        try:
            words, more = shlex.split(command), shlex.split(extra)
        except ValueError as error:
            raise UserError(f"--engine-command or --engine-args: {error}") from None
        if not words or shutil.which(words[0]) is None:
            raise UserError(
                f"--engine-command '{command}' does not run here: install vLLM, or name it, as "
                "'/path/to/env/bin/vllm serve'"
            )
        speculative = {
            "method": method,
            "model": str(folder.resolve()),
            "num_speculative_tokens": num_draft_tokens,
        }
        self.command: Sequence[str] = [
            *words,
            "--model",
            target,
            "--port",
            str(self.port),
            "--host",
            "127.0.0.1",
            "--speculative-config",
            json.dumps(speculative),
            *(["--dtype", dtype] if dtype else []),
            *more,
        ]
        self._process: subprocess.Popen | None = None
        self._handlers: dict = {}

    def __enter__(self) -> Engine:
        # A SIGTERM would end Python without __exit__, and vLLM would keep the device.
        if threading.current_thread() is threading.main_thread():
            for name in (signal.SIGTERM, signal.SIGHUP):
                self._handlers[name] = signal.signal(name, _leave)
        with self.log.open("wb") as log:
            # A group of its own, so that its workers end with it, and nothing else does.
            self._process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait(self) -> None:
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise EngineFailed(self._why(), self.log)
            try:
                if httpx.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        raise EngineFailed(f"not ready after {self.timeout:.0f} s", self.log)

    def _why(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        lines_without_warnings = [line for line in lines if "WARNING" not in line]
        found = [m[1] for line in lines_without_warnings if (m := CAUSES.search(line))]
        # The first error is the cause; what follows is processes that noticed.
        text = found[0] if found else (lines[-1] if lines else "it said nothing")
        return " ".join(text.split())[:300]

    def __exit__(self, *_) -> None:
        for name, handler in self._handlers.items():
            signal.signal(name, handler)
        if self._process is None:
            return
        for kind, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
            try:
                os.killpg(self._process.pid, kind)
                self._process.wait(patience)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self._process.wait()
        with suppress(ProcessLookupError):  # workers that outlived it
            os.killpg(self._process.pid, signal.SIGKILL)


def _leave(number: int, _frame) -> None:
    raise SystemExit(128 + number)


class EngineFailed(Exception):
    """The engine did not start; says why and where its log is."""

    def __init__(self, why: str, log: Path):
        super().__init__(why)
        self.why, self.log = why, log
