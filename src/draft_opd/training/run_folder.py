"""What a run folder says of its run: recipe, how it was made, metrics line by line; written while
it runs, and read again for reports and `inspect`."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from draft_opd.training.config import Recipe
from draft_opd.training.tracking import numbers, open_tracker
from draft_opd.utils.errors import UserError
from draft_opd.utils.files import append, make_folder, read_json, sync, write_json, write_lines, write_text
from draft_opd.utils.machine import machine


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
        about = read_json(folder / "run.json")
        if not (isinstance(recipe, dict) and {"data", "target", "steps"} <= recipe.keys()):
            raise ValueError("recipe.yaml is no recipe")
        if not {"stage", "drafter_parameters"} <= about.keys():
            raise ValueError("run.json is not what training wrote")
    except (UserError, OSError, ValueError, AttributeError, yaml.YAMLError) as error:
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


@dataclass
class RunResult:
    """Held-out τ before, at the end and at its best; `best` and `last` are drafter folders."""

    out: Path
    start_tau: float | None
    tau: float
    best_tau: float
    best_step: int
    step: int
    supervised: int
    seconds: float

    def as_dict(self) -> dict:
        """For JSON."""
        return {
            "kind": "run",
            "path": str(self.out),
            "best": str(self.best),
            "last": str(self.last),
            **{k: v for k, v in asdict(self).items() if k != "out"},
        }

    @property
    def best(self) -> Path:
        return self.out / "best"

    @property
    def last(self) -> Path:
        return self.out / "last"


class Record:
    """Writes recipe.yaml, run.json and metrics.jsonl, and tells the tracker.

    step, evaluated: those of the last checkpoint; what an earlier try wrote behind it is forgotten.
    """

    def __init__(self, recipe: Recipe, about: dict, step: int, evaluated: int):
        self.out = make_folder(Path(recipe.out))
        self.metrics = self.out / "metrics.jsonl"
        tree = recipe.model_dump(mode="json")
        if recipe.drafter and "family" not in recipe.model.model_fields_set:
            del tree["model"]["family"]  # the drafter's own, which nobody named
        # Before recipe.yaml: if the tracker does not start, the folder is not a run yet.
        self.tracker = open_tracker(recipe.tracker, self.out, tree, step)
        write_text(self.out / "recipe.yaml", yaml.safe_dump(tree, sort_keys=False))
        write_json(self.out / "run.json", {"kind": "run", "command": sys.argv, **machine(), **about})
        kept = [
            row for row in read_metrics(self.metrics) if row["step"] <= (evaluated if "tau" in row else step)
        ]
        write_lines(self.metrics, map(json.dumps, kept))

    def line(self, values: dict) -> None:
        """`values` has `step`."""
        with open(self.metrics, "ab", buffering=0) as file:
            append(file, f"{json.dumps(values)}\n".encode(), self.metrics, "go on with --resume", False)
        if self.tracker:
            self.tracker.log(values["step"], dict(numbers(values)))

    def sync(self) -> None:
        """Waits until the lines so far are on the disk: a checkpoint stands for them."""
        sync(self.metrics)

    def close(self, failed: bool) -> None:
        """After a failed run errors of the tracker are suppressed: they would hide the first error."""
        if self.tracker:
            with suppress(Exception) if failed else nullcontext():
                self.tracker.close(failed)
