"""What a figure was measured on, how fast this machine multiplies, how many threads pay."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import transformers

SLOW = 0.5  # times the speed of float32: below that a processor emulates a type
# Logits that are computed at once. On a CPU they should stay in its caches.
CPU_LOGITS = 1 << 22
log = logging.getLogger(__name__)


def machine(device: torch.device | None = None) -> dict:
    """Processor, versions, and the device that was used (default: the best there is)."""
    cuda = torch.cuda.is_available() if device is None else device.type == "cuda"
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


@cache
def _logits(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_LOGITS
    # By the memory that there is, not by what is free: then a run's pieces, and its last bits, stay.
    # A logit takes up to 16 bytes on its way to a gradient: a 32nd of an 80 GB card is 160 M logits.
    return max(1 << 24, torch.cuda.get_device_properties(device).total_memory // (32 * 16))


def logits_at_once(device: torch.device, vocabulary: int) -> int:
    """Rows of logits [rows, vocabulary] that are worth computing together on a device, at least 16."""
    return max(16, _logits(device) // vocabulary)


def synchronized(device: torch.device) -> float:
    """A time in seconds, with nothing running on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def product_seconds(dtype: torch.dtype, device: torch.device, rows: int, width: int) -> float:
    """The shortest time of a few products [rows, width] x [width, width]."""
    x = torch.ones(rows, width, dtype=dtype, device=device)
    weight = torch.ones(width, width, dtype=dtype, device=device)
    best, began = float("inf"), time.perf_counter()
    for attempt in range(20):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        best = min(best, now - start) if attempt else best  # the first one warms up
        if attempt > 1 and now - began > 0.02:
            break
    return best


@cache
def speed_over_float32(dtype: torch.dtype, device: torch.device, width: int = 1024) -> float:
    """How many times as fast as float32 this machine multiplies matrices [width, width] of a type.

    Measured once a process, with 512 rows. A CPU that emulates 16 bit has about 0.03.
    """
    width = min(width, 1024 if device.type == "cpu" else 4096)
    rows = 512 if device.type == "cpu" else 4096
    with torch.inference_mode():
        one, other = (product_seconds(d, device, rows, width) for d in (torch.float32, dtype))
    return one / other


def warn_if_slow(asked: str, dtype: torch.dtype, device: torch.device) -> None:
    """One warning where a CPU emulates the type that was asked for, in the user's words."""
    if device.type != "cpu" or dtype == torch.float32:
        return
    ratio = speed_over_float32(dtype, device)
    if ratio < SLOW:
        name = str(dtype).removeprefix("torch.")
        log.warning(
            "%s: this CPU multiplies %s at %.2f times the speed of float32; float32 is faster here",
            asked,
            name,
            ratio,
        )


def tune_num_threads(work: Callable[[], object], repeats: int = 3) -> int:
    """Sets and returns the number of torch's CPU threads that does `work` fastest.

    torch's threads wait for each other by spinning, so that on a machine with other work to do two
    can be many times slower than one. Tries 1, 2, 4 … up to what torch would take, in alternation;
    more threads must pay at least a tenth to be chosen.
    """
    most = torch.get_num_threads()
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n < most] + [most]
    best = dict.fromkeys(counts, float("inf"))
    for _ in range(repeats):
        for count in counts:
            torch.set_num_threads(count)
            began = time.perf_counter()
            work()
            best[count] = min(best[count], time.perf_counter() - began)
    chosen = counts[0]
    for count in counts[1:]:
        if best[count] < 0.9 * best[chosen]:
            chosen = count
    torch.set_num_threads(chosen)
    return chosen


def _cpu() -> str:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return name
    lines = [line.split(":", 1) for line in info.read_text().splitlines() if ":" in line]
    found = {key.strip(): value.strip() for key, value in lines}
    known = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in found.get("flags", "").split()]
    return found.get("model name", name) + (f" ({', '.join(known)})" if known else "")
