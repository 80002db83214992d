"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds by named part, added up until `take`. On CUDA a part ends when its work has."""

    def __init__(self, device: torch.device | None = None):
        self._cuda = device is not None and device.type == "cuda"
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = self._now()
        try:
            yield
        finally:
            self._seconds[part] = self._seconds.get(part, 0.0) + self._now() - began

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def take(self) -> dict[str, float]:
        """What was measured since the last call."""
        taken, self._seconds = self._seconds, {}
        return taken
