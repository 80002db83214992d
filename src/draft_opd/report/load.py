"""Folders of finished work, put together to one report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from draft_opd.evaluation.names import by_name
from draft_opd.report.page import Report, sides_in
from draft_opd.training.run_folder import is_run, lineage, read_history
from draft_opd.utils.errors import UserError

EVALUATION = {"target", "drafter", "temperature", "tasks", "mean", "machine"}
ANALYSIS = {"tau", "share", "forward_kl", "reverse_kl", "anchors"}


def gather(paths: Sequence[str], title: str) -> Report:
    """Folders of `eval`, `analyze`, `sft`, `opd`, or NAME=FOLDER. Raises `UserError` for others.

    The runs behind an evaluation's drafters are found by themselves.
    """
    made = Report(title, "From " + ", ".join(paths) + ".")
    for name, path in by_name(paths).items():
        folder, known = Path(path), False
        if (folder / "eval.json").exists():
            if made.evaluation:
                raise UserError(
                    f"'{folder}' is a second evaluation: `eval` compares drafters when it is given "
                    "several (--drafter A --drafter B)"
                )
            made.evaluation, known = _read(folder / "eval.json", EVALUATION), True
            if (folder / "samples.json").exists():
                made.samples = _read(folder / "samples.json")
            for side in sides_in(made.evaluation):
                if runs := lineage(side["drafter"] or ""):
                    made.training.setdefault(runs[-1].name, runs)
        if (folder / "analysis.json").exists():
            made.analyses[name], known = _read(folder / "analysis.json", ANALYSIS), True
        if is_run(folder):
            run = read_history(folder)
            runs = [*lineage(run.recipe.get("drafter") or ""), run]
            if not any(other[-1].path == folder.resolve() for other in made.training.values()):
                made.training[name] = runs
            known = True
        if not known:
            is_demo = (folder / "summary.json").exists()
            hint = "; a demo has its own report.html" if is_demo else ""
            raise UserError(
                f"'{folder}' holds nothing to report: give folders that eval, analyze, sft or opd wrote{hint}"
            )
    return made


def _read(path: Path, keys: set[str] | None = None):
    """JSON: an object with `keys`, or a list where there are none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' is not readable JSON ({error})") from None
    if not isinstance(value, dict if keys else list):
        raise UserError(f"'{path}' must hold a JSON {'object' if keys else 'list'}")
    if keys and (missing := sorted(keys - value.keys())):
        raise UserError(f"'{path}' lacks {', '.join(missing)}: write it again")
    if keys and not value.get("tasks", True):
        raise UserError(f"'{path}' has no tasks: write it again")
    return value
