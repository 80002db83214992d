"""What this machine allows: measured with plain torch, in the process that measures the product.

Rates are the best of several repeats: a limit is what the machine can do, not what it does on
average.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from draft_opd.models.cpu_linear import prepack

SIZE = 1024


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


def products(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> list[nn.Linear]:
    """The ways there are to multiply with a matrix: torch's, and packed on a CPU."""
    made = [nn.Linear(columns, rows, bias=False, dtype=dtype, device=device) for _ in range(2)]
    prepack(made[1])
    return [m.requires_grad_(False) for m in made]


def bandwidth(dtype: torch.dtype, device: torch.device, megabytes: int = 512) -> float:
    """Bytes per second that matrix-vector products read, of so much memory again and again."""
    count = max(1, megabytes * 2**20 // (SIZE * SIZE * dtype.itemsize))
    matrices = [products(SIZE, SIZE, dtype, device) for _ in range(count)]
    vector = torch.randn(1, SIZE, device=device).to(dtype)
    ways = zip(*matrices, strict=True)
    best = min(seconds(lambda way=way: [m(vector) for m in way]) for way in ways)
    return count * SIZE * SIZE * dtype.itemsize / best


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a large square product."""
    size = 8192 if device.type == "cuda" else SIZE
    x = torch.randn(size, size, device=device).to(dtype)
    ways = products(size, size, dtype, device)
    return 2 * size**3 / min(seconds(lambda way=way: way(x)) for way in ways)


def limits(dtype: torch.dtype, device: torch.device) -> dict:
    """Both, in GB/s and GFLOP/s."""
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "gigabytes_per_second": bandwidth(dtype, device) / 1e9,
        "gigaflops": matrix_rate(dtype, device) / 1e9,
    }
