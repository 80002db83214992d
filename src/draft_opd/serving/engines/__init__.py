"""How inference engines serve a drafter: a file an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from draft_opd.drafters import Drafter
from draft_opd.serving.engines import deepspec, sglang, vllm, zlab
from draft_opd.utils.errors import UserError

ENGINES: dict[str, Callable[[Drafter, str, Path], str]] = {
    "vllm": vllm.serve_command,
    "sglang": sglang.serve_command,
    "z-lab": zlab.serve_command,
    "deepspec": deepspec.serve_command,
}


def serve_command(drafter: Drafter, target: str, folder: Path, engine: str) -> str:
    """The command by which an engine serves a drafter from `folder`. Raises `UserError` for an
    engine that we do not know."""
    if engine not in ENGINES:
        raise UserError(f"engine '{engine}': choose one of {', '.join(ENGINES)}")
    return ENGINES[engine](drafter, target, folder)
