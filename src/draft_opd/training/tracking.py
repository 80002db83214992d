"""Metrics to a tracker, beside metrics.jsonl: TensorBoard, trackio or Weights & Biases."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from draft_opd.utils.errors import UserError, one_line
from draft_opd.utils.files import read_json, write_json

PROJECT = "draft-opd"


class Tracker(Protocol):
    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


def check_tracker(kind: str) -> None:
    """Raises `UserError` when it is not installed."""
    if kind != "none" and find_spec(kind) is None:
        raise UserError(
            f"tracker: {kind} is not installed: pip install 'draft-opd[{kind}]', or set tracker=none"
        )


def open_tracker(kind: str, out: Path, recipe: dict, step: int) -> Tracker | None:
    """The recipe's `tracker` for the run in `out`, which goes on behind `step`.

    A resumed run goes on in the tracker too: the id of its run is kept in the run folder. (What a
    killed run had logged behind its last checkpoint is purged in TensorBoard and said twice in the
    others; metrics.jsonl is the record.) Raises
    `UserError` when the tracker does not start.
    """
    if kind == "none":
        return None
    try:
        # What they print is about the work; standard output is for results.
        with redirect_stdout(sys.stderr):
            return TRACKERS[kind](out, recipe, step)
    except Exception as error:
        line = one_line(error)
        raise UserError(f"tracker: {kind} does not start ({line}); or set tracker=none") from error


def numbers(line: dict, path: str = "") -> Iterator[tuple[str, float]]:
    """The single numbers of a metrics line, sections as section/name."""
    for key, value in line.items():
        name = f"{path}{key}"
        if isinstance(value, dict):
            yield from numbers(value, f"{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
            yield name, value


def _run_id(out: Path, step: int) -> str:
    """A new id for a new run, the same one for a resumed run."""
    file = out / "tracker.json"
    if not step or not file.exists():
        write_json(file, {"id": f"{out.name}-{secrets.token_hex(4)}"})
    return read_json(file)["id"]


class _TensorBoard:
    def __init__(self, out: Path, recipe: dict, step: int):
        from torch.utils.tensorboard import SummaryWriter

        # What was logged behind the last checkpoint is logged again.
        self.writer = SummaryWriter(out / "tensorboard", purge_step=step + 1)
        if not step:
            self.writer.add_text("recipe", f"```json\n{json.dumps(recipe, indent=2)}\n```")

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self.writer.close()


class _Trackio:
    def __init__(self, out: Path, recipe: dict, step: int):
        import trackio

        self.run = trackio.init(project=PROJECT, name=_run_id(out, step), config=recipe, resume="allow")
        self.finish = trackio.finish

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self, failed: bool) -> None:
        with redirect_stdout(sys.stderr):
            self.finish()


class _Wandb:
    def __init__(self, out: Path, recipe: dict, step: int):
        import wandb

        self.run = wandb.init(
            project=PROJECT,
            id=_run_id(out, step),
            name=out.name,
            config=recipe,
            dir=out,
            resume="allow",
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


TRACKERS = {"tensorboard": _TensorBoard, "trackio": _Trackio, "wandb": _Wandb}
