"""What a run is given: recipe, folder, models' paths, trajectories. Checked before torch loads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from draft_opd.data.row_files import rows_behind
from draft_opd.data.trajectory import Trajectory, read_trajectories
from draft_opd.losses.config import Heads
from draft_opd.models.hub import check_models
from draft_opd.training.config import VERSION, Recipe, without_removed_keys
from draft_opd.training.tracking import check_tracker
from draft_opd.utils.errors import UserError

Rows = list[Trajectory]
MAY_CHANGE = ("out:", "tracker:", "parallel.", "keep_checkpoints:", "optim.extension:")  # on --resume


@dataclass
class Inputs:
    """recipe: on resuming, with what the run resolved `auto` to when it began."""

    recipe: Recipe
    train_set: Rows
    held_out: Rows


def read_inputs(stage: str, recipe: Recipe, resume: bool, models: bool = True) -> Inputs:
    """Raises `UserError` for what can be known to be wrong without a model.

    models: look for the target and the drafter too, where they will be loaded.
    """
    recipe = check_folder(recipe, resume)
    check_tracker(recipe.tracker)
    if stage == "opd" and not recipe.drafter:
        raise UserError("opd starts from a trained drafter: set `drafter` in the recipe")
    if models:
        goes_on = resume and (Path(recipe.out) / "last").exists()
        drafters = [recipe.drafter] if recipe.drafter and not goes_on else []
        check_models(recipe.target, *drafters)
    return Inputs(recipe, *read_data(recipe))


def read_data(recipe: Recipe) -> tuple[Rows, Rows]:
    """Trajectories to train on and held-out ones. Raises `UserError` for those that supervise
    nothing or everything, were sampled otherwise than the recipe says, or share prompts."""
    data = recipe.data
    train_set = _read(data.trajectories, data.limit, data.max_length)
    held_out = _read(data.heldout, data.heldout_limit, data.max_length)
    _check_sampling(recipe, train_set, held_out)
    seen = {tuple(t.prompt_ids) for t in train_set}
    if any(tuple(t.prompt_ids) in seen for t in held_out):
        raise UserError(
            "data.heldout shares prompts with data.trajectories, so τ would flatter: collect "
            "other prompts for one of them"
        )
    return train_set, held_out


def check_online(recipe: Recipe) -> None:
    """Raises `UserError` for a recipe that `draft-opd online` cannot begin with."""
    if recipe.online is None:
        raise UserError("the recipe has no section `online`: it names server and prompts")
    if not recipe.drafter:
        raise UserError("the loop starts from a trained drafter: set `drafter` in the recipe")
    check_models(recipe.target, recipe.drafter)
    try:
        next(rows_behind(recipe.online.prompts, 0), None)
    except UserError as error:
        raise UserError(f"online.prompts: {error}") from None


def _read(path: str, limit: int | None, max_length: int | None) -> Rows:
    found = read_trajectories(path, limit=limit)
    kept = [t for t in (truncate(t, max_length) for t in found) if t]
    if not kept:
        raise UserError(
            f"'{path}': max_length {max_length} leaves no response token, so the loss mask would be all zeros"
        )
    return kept


def truncate(trajectory: Trajectory, max_length: int | None) -> Trajectory | None:
    """At most `max_length` tokens; None when nothing of the response is left."""
    room = len(trajectory.response_ids)
    if max_length is not None:
        room = min(room, max_length - len(trajectory.prompt_ids))
    if room < 1:
        return None
    if room == len(trajectory.response_ids):
        return trajectory
    return replace(trajectory, response_ids=trajectory.response_ids[:room], finish_reason="length")


def _check_sampling(recipe: Recipe, train_set: Rows, held_out: Rows) -> None:
    asked = recipe.sampling.as_tuple
    for name, rows in (("trajectories", train_set), ("heldout", held_out)):
        for t in rows:
            if (t.temperature, t.top_k, t.top_p) != asked:
                raise UserError(
                    f"data.{name}: trajectory {t.id} was sampled with (temperature, top_k, "
                    f"top_p) = {(t.temperature, t.top_k, t.top_p)}, the recipe's `sampling` "
                    f"says {asked}: set it to what the data has"
                )


def check_folder(recipe: Recipe, resume: bool) -> Recipe:
    """The recipe, on resuming with what the run resolved `auto` to when it began.

    Raises `UserError` where `out` holds a run that this recipe cannot continue.
    """
    out = Path(recipe.out)
    saved = out / "recipe.yaml"
    if saved.exists() and not resume:
        raise UserError(f"'{out}' already holds a run: continue it with --resume or set another `out`")
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
        before = without_removed_keys(before, f"'{saved}'")
        recipe = as_resolved(recipe, before)
        now = recipe.model_dump(mode="json")
        changed = [x for x in _differences(before, now) if not x.startswith(MAY_CHANGE)]
        if changed:
            raise UserError(
                f"cannot resume '{out}': the recipe changed: {'; '.join(changed)}. Set it back, or "
                "set another `out`"
            )
    return recipe


def as_resolved(recipe: Recipe, before: dict) -> Recipe:
    """A recipe whose `auto` is what the run that is resumed has; `before`: that run's recipe.

    What version 0.1 did not write is added to `before`: its Muon multiplied in bfloat16, and it
    knew no patience.
    """
    before["version"] = VERSION
    before.setdefault("extended_from", [])
    if isinstance(before.get("optim"), dict):
        before["optim"].setdefault("extension", "rewarm")
    opd = before.get("opd")
    if isinstance(opd, dict) and isinstance(opd.get("objective"), dict):
        opd["objective"].setdefault("value_sharpness", 1.0)
        opd["objective"].setdefault("dpace_alpha_end", None)
    before.setdefault("heads", Heads().model_dump())
    if isinstance(before.get("model"), dict):
        before["model"].setdefault("family", recipe.model.family)
    if isinstance(before.get("sft"), dict):
        before["sft"].setdefault("loss", "auto")
    optim, evaluation = before.get("optim"), before.get("evaluation")
    if not isinstance(optim, dict) or not isinstance(evaluation, dict):
        return recipe
    optim.setdefault("muon_dtype", "bfloat16")
    evaluation.setdefault("patience", None)
    update: dict = {"extended_from": before["extended_from"]}
    steps = before.get("steps")
    if isinstance(steps, int) and recipe.steps > steps:  # the run is lengthened
        update["extended_from"] = before["extended_from"] = [*before["extended_from"], steps]
        before["steps"] = recipe.steps
    if recipe.batch_size == "auto":
        update |= {key: before[key] for key in ("batch_size", "accumulate") if key in before}
    if recipe.precision == "auto" and "precision" in before:
        update["precision"] = before["precision"]
    if recipe.optim.muon_dtype == "auto":
        update["optim"] = recipe.optim.model_copy(update={"muon_dtype": optim["muon_dtype"]})
    return recipe.model_copy(update=update)


def _differences(before: object, now: object, path: str = "") -> list[str]:
    """`key: old -> new` of every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            found
            for key in sorted(set(before) | set(now))
            for found in _differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if before == now else [f"{path}: {before} -> {now}"]
