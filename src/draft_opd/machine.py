"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import transformers


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


def _cpu() -> str:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return name
    lines = [line.split(":", 1) for line in info.read_text().splitlines() if ":" in line]
    found = {key.strip(): value.strip() for key, value in lines}
    known = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
             if f in found.get("flags", "").split()]  # fmt: skip
    return found.get("model name", name) + (f" ({', '.join(known)})" if known else "")
