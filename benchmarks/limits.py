"""What this machine allows: measured with plain torch, in the process that measures the product.

Rates are the best of several repeats: a limit is what the machine can do, not what it does on
average.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

ROWS = COLUMNS = 2048


def seconds(work: Callable[[], object], repeats: int = 7) -> float:
    """The shortest of several runs, after one that warms up."""
    cuda = torch.cuda.is_available()
    found = []
    for _ in range(repeats + 1):
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found[1:])


def bandwidth(dtype: torch.dtype, device: torch.device, megabytes: int = 512) -> float:
    """Bytes per second that matrix-vector products read, over more than any cache holds."""
    count = max(1, megabytes * 2**20 // (ROWS * COLUMNS * dtype.itemsize))
    matrices = [torch.randn(ROWS, COLUMNS, device=device).to(dtype) for _ in range(count)]
    vector = torch.randn(1, COLUMNS, device=device).to(dtype)

    def read() -> Tensor:
        return [torch.nn.functional.linear(vector, m) for m in matrices][-1]

    return count * ROWS * COLUMNS * dtype.itemsize / seconds(read)


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a large square product."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b)


def limits(dtype: torch.dtype, device: torch.device) -> dict:
    """Both, in GB/s and GFLOP/s."""
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "gigabytes_per_second": bandwidth(dtype, device) / 1e9,
        "gigaflops": matrix_rate(dtype, device) / 1e9,
    }
