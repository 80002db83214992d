"""What every benchmark writes down, and how it compares."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from pathlib import Path

import torch
import transformers

RESULTS = Path(__file__).parent / "results"


def machine() -> dict:
    """Machine, versions and commit."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x
        ]
        flags = next(x for x in info.read_text().splitlines() if x.startswith("flags")).split()
        extra = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
        cpu = f"{names[0]} ({', '.join(extra)})" if names else cpu
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit.stdout.strip(),
    }


def ratio(one: list[float], other: list[float]) -> dict:
    """Of paired times: the median of one / other with its quartiles."""
    ratios = sorted(a / b for a, b in zip(one, other, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"median": middle, "quartiles": [low, high], "pairs": len(ratios)}


def write(name: str, value: dict) -> None:
    """`results/NAME.json`, with the machine."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **value}, indent=2) + "\n")
    print(f"wrote {path}")
