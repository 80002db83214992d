"""z-lab's package: a drafter is loaded in Python (dflash/model.py)."""

from __future__ import annotations

from pathlib import Path

from draft_opd.drafters import Drafter


def serve_command(drafter: Drafter, _target: str, folder: Path) -> str:
    (name,) = drafter.config_dict()["architectures"]
    return f'dflash\'s {name}.from_pretrained("{folder}")'
