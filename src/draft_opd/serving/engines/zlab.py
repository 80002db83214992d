"""z-lab's package: a drafter is loaded in Python (dflash/model.py)."""

from __future__ import annotations

from pathlib import Path

from draft_opd.drafters import Drafter


def serve_command(_drafter: Drafter, _target: str, folder: Path) -> str:
    return f'dflash\'s DFlashDraftModel.from_pretrained("{folder}")'
