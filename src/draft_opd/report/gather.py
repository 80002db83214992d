"""Folders of finished work, put together to one report."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from pydantic import ValidationError

from draft_opd.evaluation.drafter_names import by_name
from draft_opd.evaluation.result import EvaluationResult
from draft_opd.report.page import Report
from draft_opd.training.run_folder import is_run, lineage, read_history
from draft_opd.utils.config import first_problem
from draft_opd.utils.errors import UserError
from draft_opd.utils.files import read_json

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
            made.evaluation, known = read_evaluation(folder / "eval.json"), True
            if (folder / "samples.json").exists():
                made.samples = _read(folder / "samples.json", list)
            for side in made.evaluation.every_side():
                if runs := lineage(side.drafter or ""):
                    made.training.setdefault(runs[-1].name, runs)
        if (folder / "analysis.json").exists():
            made.analyses[name], known = _read(folder / "analysis.json", dict, ANALYSIS), True
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


def read_evaluation(path: Path) -> EvaluationResult:
    """Raises `UserError` for a file that is no eval.json, with the first field that is missing or
    wrong."""
    try:
        return EvaluationResult.model_validate(_read(path, dict))
    except ValidationError as error:
        problem = first_problem(error)
        raise UserError(f"'{path}': {problem.key}: {problem.message}; write it again") from None


def _read(path: Path, kind: type, keys: Collection[str] = ()):
    """JSON: a list, or an object with `keys`."""
    value = read_json(path)
    if not isinstance(value, kind):
        raise UserError(f"'{path}' must hold a JSON {'object' if kind is dict else 'list'}")
    if missing := sorted(key for key in keys if key not in value):
        raise UserError(f"'{path}' lacks {', '.join(missing)}: write it again")
    return value
