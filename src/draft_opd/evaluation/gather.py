"""Folders of finished work, put together to one report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from draft_opd.errors import UserError
from draft_opd.evaluation.page import Report, read_samples
from draft_opd.training.history import is_run, lineage, read_history


def gather(paths: Sequence[str], title: str) -> Report:
    """Folders of `eval`, `analyze`, `sft`, `opd`. Raises `UserError` for any other."""
    made = Report(title)
    for text in paths:
        folder = Path(text)
        known = False
        if (folder / "eval.json").exists():
            if made.evaluation:
                raise UserError(
                    f"'{text}' is a second evaluation: `eval` compares drafters when it is given "
                    "several (--drafter A --drafter B)"
                )
            made.evaluation, known = _read(folder / "eval.json"), True
            made.samples = read_samples(folder)
        if (folder / "analysis.json").exists():
            made.analyses[folder.name], known = _read(folder / "analysis.json"), True
        if is_run(folder):
            run = read_history(folder)
            made.training[run.name] = [*lineage(run.recipe.get("drafter") or ""), run]
            known = True
        if not known:
            raise UserError(
                f"'{text}' holds nothing to report: give folders that eval, analyze, sft or opd "
                "wrote"
            )
    made.lead = "From " + ", ".join(paths) + "."
    return made


def _read(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' is not readable JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"'{path}' must hold a JSON object")
    return value
