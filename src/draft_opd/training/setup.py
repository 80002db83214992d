"""What a run begins with: its data, target and drafter, and whether they belong together."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import torch
from pydantic import ValidationError

from draft_opd.data.trajectory import check_trajectories
from draft_opd.drafters import FAMILIES, Drafter
from draft_opd.losses.config import Heads
from draft_opd.models.hub import EMBEDDED
from draft_opd.models.target import Target
from draft_opd.training.config import AUTO_BATCH, Model, Recipe
from draft_opd.training.distributed import ParallelContext
from draft_opd.training.inputs import Rows
from draft_opd.utils.config import first_problem
from draft_opd.utils.errors import UserError

log = logging.getLogger(__name__)


def check_shares(recipe: Recipe, train_set: Rows, held_out: Rows, processes: int) -> None:
    """Raises `UserError` where some process would have nothing to do."""
    size = recipe.batch_size
    for name, count in (
        ("batch_size", min(AUTO_BATCH if size == "auto" else size, len(train_set))),
        ("data.heldout", len(held_out)),
    ):
        if count < processes:
            raise UserError(
                f"{name}: {count} trajectories cannot be shared by {processes} processes: start "
                "fewer, or raise it"
            )


def check_data(train_set: Rows, held_out: Rows, target: Target) -> None:
    """Raises `UserError` for data of another target."""
    for name, rows in (("trajectories", train_set), ("heldout", held_out)):
        check_trajectories(rows, target, f"data.{name}")


def load_target(recipe: Recipe, group: ParallelContext) -> Target:
    """Whole, or this process's part of it."""
    options = {"trust_remote_code": recipe.trust_remote_code}
    if not group.splits_target:
        return Target.from_pretrained(recipe.target, **options)
    # The whole target may fit only the host's memory, so it is loaded there. The default type on a CPU
    # is float32, so the stored type is asked for.
    stored = group.device.type == "cuda" and recipe.target != EMBEDDED
    target = Target.from_pretrained(
        recipe.target, dtype="auto" if stored else None, device="cpu", prepacked=False, **options
    )
    split_target(target, group)
    return target


def split_target(target: Target, group: ParallelContext) -> None:
    """Leaves every process of a group its part; then all must call upon it equally often."""
    target.fingerprint  # noqa: B018 - it is remembered, while the weights are whole
    group.split_target(target.model, target.decoder, target.config)
    target.sharded = True


def _family(model: Model) -> type[Drafter]:
    if model.family not in FAMILIES:
        raise UserError(f"unknown drafter family '{model.family}'; known: {', '.join(FAMILIES)}")
    return FAMILIES[model.family]


def new_drafter(model: Model, target: Target, counts: torch.Tensor) -> Drafter:
    """An untrained drafter; counts [V] of the target's tokens. Raises `UserError` for a family or
    an option that there is not."""
    family = _family(model)
    with _named_options(model, family):
        return family.create(target, counts, **model.options)


@contextmanager
def _named_options(model: Model, family: type[Drafter]) -> Iterator[None]:
    """Turns pydantic's errors about `model.options` into a `UserError`."""
    try:
        yield
    except ValidationError as error:
        problem = first_problem(error)
        message = problem.message.lower()
        if problem.kind == "extra_forbidden":
            message = f"unknown option; {model.family} has {', '.join(family.options.model_fields)}"
        raise UserError(f"model.options.{problem.key}: {message}") from None


def grown_drafter(model: Model, drafter: Drafter, target: Target) -> Drafter:
    """A drafter to go on from; where the recipe names another family that can begin with it, one of that
    family, whose own parts are new."""
    family = _family(model)
    if drafter.family not in family.taken_from:
        if family is not type(drafter) and "family" in model.model_fields_set:
            log.warning(
                "model.family is %s, but the drafter is one of %s and goes on as that",
                model.family,
                drafter.family,
            )
        return drafter
    with _named_options(model, family):
        grown = family.grow(drafter, target, **model.options)
    unused = sorted(set(model.options) & (set(drafter.options.model_fields) | {"sample_from_anchor"}))
    new = [name for name in grown.state_dict() if name not in drafter.state_dict()]
    parts = {".".join(p for p in name.split(".")[:-1] if p != "layers" and not p.isdigit()) for name in new}
    log.warning(
        "this %s drafter begins with a %s drafter: %d tensors are taken over, %d are new (%s); it drafts %d "
        "tokens a round%s",
        grown.family,
        drafter.family,
        len(drafter.state_dict()),
        len(new),
        ", ".join(sorted(parts)),
        grown.draft_length,
        f". Its body stays as it was, so model.options {', '.join(unused)} are not used" if unused else "",
    )
    grown.bind(target)
    return grown


def first_drafter(recipe: Recipe, resume_from: Path | None, target: Target, train_set: Rows) -> Drafter:
    """The drafter that training begins with: of a checkpoint, of the recipe, or a new one, whose draft
    vocabulary follows the data."""
    folder = str(resume_from) if resume_from else recipe.drafter
    if folder:
        drafter = Drafter.from_pretrained(folder, device=target.device)
        drafter.bind(target)
        if not resume_from:
            drafter = grown_drafter(recipe.model, drafter, target)
    else:
        response_token_ids = [i for t in train_set for i in t.response_ids]
        counts = torch.bincount(torch.tensor(response_token_ids), minlength=target.vocab_size)
        drafter = new_drafter(recipe.model, target, counts)
    drafter.gradient_checkpointing = recipe.gradient_checkpointing
    for key in unused_keys(recipe.heads, drafter):
        log.warning("heads.%s is not used: a %s drafter has no part that it applies to", key, drafter.family)
    return drafter


def unused_keys(heads: Heads, drafter: Drafter) -> list[str]:
    """Keys of `heads` that were set, and that this drafter has no part for."""
    has = {"body_weight": drafter.num_candidates is not None}
    changed = [key for key, field in Heads.model_fields.items() if getattr(heads, key) != field.default]
    return [key for key in changed if not has.get(key, drafter.has_confidence)]


def fingerprints_of(target: Target, train_set: Rows, held_out: Rows) -> dict[str, str]:
    """What a checkpoint belongs to, by hashes."""
    found = {"target": target.fingerprint}
    for name, rows in (("data.trajectories", train_set), ("data.heldout", held_out)):
        digest = sha256()
        for t in rows:
            digest.update(array("q", [len(t.prompt_ids), len(t.ids), *t.ids]).tobytes())
        found[name] = f"{len(rows)} trajectories, {digest.hexdigest()[:16]}"
    return found


def check_fingerprints(out: Path, before: dict[str, str], now: dict[str, str]) -> None:
    """Raises `UserError` where a run is resumed with something else than it began with."""
    for name, saved in before.items():
        if now[name] != saved:
            raise UserError(
                f"cannot resume '{out}': {name} is not what the run began with ({saved} then, "
                f"{now[name]} now): restore it, or set another `out`"
            )
