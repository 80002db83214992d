"""What a run folder says of its run: recipe, how it was made, metrics line by line."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

import yaml

from draft_opd.errors import UserError
from draft_opd.files import append, make_folder, sync, write_json, write_lines, write_text
from draft_opd.machine import machine
from draft_opd.training.config import Recipe
from draft_opd.training.history import read_metrics
from draft_opd.training.precision import as_resolved
from draft_opd.training.tracking import numbers, open_tracker

MAY_CHANGE = ("out:", "tracker:", "parallel.", "keep_checkpoints:")  # on --resume


def check_folder(recipe: Recipe, resume: bool) -> Recipe:
    """The recipe, on resuming with what the run resolved `auto` to when it began.

    Raises `UserError` where `out` holds a run that this one would not be the rest of.
    """
    out = Path(recipe.out)
    saved = out / "recipe.yaml"
    if saved.exists() and not resume:
        raise UserError(
            f"'{out}' already holds a run: continue it with --resume or set another `out`"
        )
    if (out / "config.json").exists():
        raise UserError(f"'{out}' is a model's folder: set `out` to a folder of the run's own")
    if resume and not saved.exists() and (out / "last").exists():
        raise UserError(
            f"'{out}' has no recipe.yaml, so nothing says what run this is: put it back to resume "
            "it, or set another `out`"
        )
    if resume and saved.exists():
        try:
            before = yaml.safe_load(saved.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            before = None
        if not isinstance(before, dict):
            raise UserError(
                f"'{saved}' is damaged, so nothing says what run this is: put the recipe back to "
                "resume it, or set another `out`"
            )
        recipe = as_resolved(recipe, before)
        now = recipe.model_dump(mode="json")
        changed = [x for x in _differences(before, now) if not x.startswith(MAY_CHANGE)]
        if changed:
            raise UserError(
                f"cannot resume '{out}': the recipe changed: {'; '.join(changed)}. Set it back, or "
                "set another `out`"
            )
    return recipe


def _differences(before: object, now: object, path: str = "") -> list[str]:
    """`key: old -> new` of every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            found
            for key in sorted(set(before) | set(now))
            for found in _differences(
                before.get(key), now.get(key), f"{path}.{key}" if path else key
            )
        ]
    return [] if before == now else [f"{path}: {before} -> {now}"]


class Record:
    """Writes recipe.yaml, run.json and metrics.jsonl, and tells the tracker.

    step, evaluated: those of the last checkpoint; what an earlier try wrote behind it is forgotten.
    """

    def __init__(self, recipe: Recipe, about: dict, step: int, evaluated: int):
        self.out = make_folder(Path(recipe.out))
        self.metrics = self.out / "metrics.jsonl"
        tree = recipe.model_dump(mode="json")
        # First of all: where it does not start, the folder is still no run.
        self.tracker = open_tracker(recipe.tracker, self.out, tree, step)
        write_text(self.out / "recipe.yaml", yaml.safe_dump(tree, sort_keys=False))
        write_json(
            self.out / "run.json", {"kind": "run", "command": sys.argv, **machine(), **about}
        )
        kept = [
            row
            for row in read_metrics(self.metrics)
            if row["step"] <= (evaluated if "tau" in row else step)
        ]
        write_lines(self.metrics, map(json.dumps, kept))

    def line(self, values: dict) -> None:
        """`values` has `step`."""
        with open(self.metrics, "ab", buffering=0) as file:
            append(
                file, f"{json.dumps(values)}\n".encode(), self.metrics, "go on with --resume", False
            )
        if self.tracker:
            self.tracker.log(values["step"], dict(numbers(values)))

    def sync(self) -> None:
        """Waits until the lines so far are on the disk: a checkpoint stands for them."""
        sync(self.metrics)

    def close(self, failed: bool) -> None:
        """Of a run that failed the tracker's own troubles must not hide the reason."""
        if self.tracker:
            with suppress(Exception) if failed else nullcontext():
                self.tracker.close(failed)
