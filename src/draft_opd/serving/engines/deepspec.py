"""DeepSpec: its evaluation decodes with a drafter (eval.py, commit afdfa7c)."""

from __future__ import annotations

import shlex
from pathlib import Path

from draft_opd.drafters import Drafter


def serve_command(_drafter: Drafter, target: str, folder: Path) -> str:
    return shlex.join(
        ["python", "eval.py", "--target_name_or_path", target, "--draft_name_or_path", str(folder)]
    )
