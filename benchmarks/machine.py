"""What every benchmark writes down, and how it compares."""

from __future__ import annotations

import json
import statistics
import subprocess
from pathlib import Path

import torch

import draft_opd.utils.machine

RESULTS = Path(__file__).parent / "results"


def machine(device: torch.device | None = None) -> dict:
    """Machine, versions and commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {**draft_opd.utils.machine.machine(device), "commit": commit.stdout.strip()}


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
