"""What a run folder says of its run: recipe, how it was made, metrics line by line."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

import yaml

from draft_opd.training.config import Recipe
from draft_opd.training.history import read_metrics
from draft_opd.training.tracking import numbers, open_tracker
from draft_opd.utils.files import append, make_folder, sync, write_json, write_lines, write_text
from draft_opd.utils.machine import machine


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
