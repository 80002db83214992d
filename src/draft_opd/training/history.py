"""What a training run recorded, read again: for reports and `inspect`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from draft_opd.utils.errors import UserError


@dataclass(frozen=True)
class History:
    """A run folder: its recipe, what made it (run.json) and its metrics, line by line."""

    path: Path
    recipe: dict
    about: dict
    metrics: list[dict]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def taus(self) -> list[tuple[int, float]]:
        """(step, held-out τ), in order."""
        return [(m["step"], m["tau"]) for m in self.metrics if "tau" in m]


def is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").exists()


def read_history(folder: Path) -> History:
    """Raises `UserError` when the folder is damaged; a line torn by a kill ends the metrics."""
    try:
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if not (isinstance(recipe, dict) and {"data", "target", "steps"} <= recipe.keys()):
            raise ValueError("recipe.yaml is no recipe")
        if not {"stage", "drafter_parameters"} <= about.keys():
            raise ValueError("run.json is not what training wrote")
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"run folder '{folder}' is damaged ({error})") from None
    return History(folder, recipe, about, read_metrics(folder / "metrics.jsonl"))


def read_metrics(file: Path) -> list[dict]:
    """Lines with a `step`, up to the first that is none: a kill may have torn it."""
    found = []
    for line in file.read_bytes().splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
            row["step"]
        except (ValueError, TypeError, KeyError):
            break
        found.append(row)
    return found


def lineage(drafter: str) -> list[History]:
    """The runs that made a drafter folder, the first one first; none where it is of elsewhere."""
    found: list[History] = []
    while drafter and is_run(folder := Path(drafter).resolve().parent):
        if any(h.path == folder for h in found):
            break
        try:
            found.insert(0, read_history(folder))
        except UserError:
            break
        drafter = found[0].recipe.get("drafter") or ""
    return found
