"""SGLang: `--speculative-*` flags (sglang/srt/server_args.py)."""

from __future__ import annotations

from pathlib import Path

from draft_opd.drafters import Drafter


def serve_command(drafter: Drafter, target: str, folder: Path) -> str:
    flags = drafter.sglang_flags()
    flags = {"algorithm": flags.pop("algorithm"), "draft-model-path": folder, **flags}
    words = " ".join(f"--speculative-{name} {value}" for name, value in flags.items())
    return f"python -m sglang.launch_server --model-path {target} {words}"
