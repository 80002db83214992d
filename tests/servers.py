"""Starting `small_server.py`, and asking it."""

import json
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from forked import Process

from draft_opd.serving.vllm_process import free_port


def fetch(url: str) -> dict:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return json.loads(answer.read())


def start(port: int, *planted: str) -> Process:
    process = Process(port, *planted, script=Path(__file__).parent / "small_server.py")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None
        try:
            fetch(f"http://127.0.0.1:{port}/v1/models")
            return process
        except OSError:
            time.sleep(0.1)
    raise TimeoutError("the server did not start")


@contextmanager
def served(*planted: str):
    port = free_port()
    process = start(port, *planted)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
