"""The types that training multiplies in: `auto` is resolved by a measurement, once a run.

What it became stands in the run's recipe.yaml, the measurement in its run.json. A resumed run takes
both from there, so that it trains the same on another machine.
"""

from __future__ import annotations

from pathlib import Path

import torch

from draft_opd.models.target import Target
from draft_opd.training.config import Recipe
from draft_opd.training.distributed import ParallelContext
from draft_opd.utils.errors import UserError
from draft_opd.utils.files import read_json
from draft_opd.utils.machine import speed_over_float32, warn_if_slow

ENOUGH = 1.5  # times the rate of float32: less would be lost again by converting


def resolve(recipe: Recipe, device: torch.device, width: int) -> tuple[Recipe, float | None]:
    """`precision` and `optim.muon_dtype` as types, and how many times as fast as float32 this
    machine multiplies bfloat16 matrices [width, width]: None where nothing was `auto`.

    Muon keeps float32 on every CPU: its matrices are small, and a run can then go on on any other.
    """
    optim, precision = recipe.optim, recipe.precision
    if precision != "auto" and (optim.name != "muon" or optim.muon_dtype != "auto"):
        return recipe, None
    ratio = speed_over_float32(torch.bfloat16, device, width)
    faster = ratio >= ENOUGH
    if precision == "auto":
        precision = "bfloat16" if faster else "float32"
    if optim.muon_dtype == "auto":
        kind = "bfloat16" if faster and device.type != "cpu" else "float32"
        optim = optim.model_copy(update={"muon_dtype": kind})
    return recipe.model_copy(update={"precision": precision, "optim": optim}), ratio


def warn_of(recipe: Recipe, device: torch.device) -> None:
    """`warn_if_slow` for what a recipe asks for."""
    asked = {"precision": recipe.precision}
    if recipe.optim.name == "muon":
        asked["optim.muon_dtype"] = recipe.optim.muon_dtype
    slow = [key for key, value in asked.items() if value == "bfloat16"]
    if slow:
        warn_if_slow(f"{' and '.join(slow)}: bfloat16", torch.bfloat16, device)


def resolve_for_run(recipe: Recipe, target: Target, group: ParallelContext) -> tuple[Recipe, float | None]:
    """`resolve`, the same in every process; of a run that is resumed the measurement that it has."""
    if group.is_main_process:
        warn_of(recipe, target.device)
    before = measured_before(Path(recipe.out))
    resolved, ratio = group.broadcast(resolve(recipe, target.device, target.hidden_size))
    return resolved, before if ratio is None else ratio


def measured_before(out: Path) -> float | None:
    """The ratio that a run was resolved by, from its run.json."""
    try:
        return read_json(out / "run.json")["bfloat16_speed"]
    except (UserError, KeyError, TypeError):
        return None


def autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    """For what a resolved recipe's `precision` covers."""
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16")
