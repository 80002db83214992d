"""vLLM: `--speculative-config`, JSON (vllm/config/speculative.py)."""

from __future__ import annotations

import json
from pathlib import Path

from draft_opd.drafters import Drafter


def serve_command(drafter: Drafter, target: str, folder: Path) -> str:
    speculative = {
        "method": drafter.vllm_method,
        "model": str(folder),
        "num_speculative_tokens": drafter.draft_length,
    }
    return f"vllm serve {target} --speculative-config '{json.dumps(speculative)}'"
