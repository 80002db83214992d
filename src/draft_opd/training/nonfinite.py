"""A step whose loss or gradient is not finite: what it was, kept so that it can be run again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from draft_opd.data.trajectory import Trajectory
from draft_opd.training.checkpoint import Checkpoints, State
from draft_opd.training.config import Recipe
from draft_opd.training.distributed import gather_full_tensors
from draft_opd.utils.errors import Failure, is_out_of_memory
from draft_opd.utils.files import make_folder, write_json, write_lines, write_text

IN_A_ROW = 10  # skipped steps: then a run that may skip stops as well
KEPT = 3  # folders


def nonfinite_grads(named: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """Parameters whose gradient is not finite."""
    gradients = gather_full_tensors({n: p.grad for n, p in named if p.grad is not None})
    return [n for n, g in gradients.items() if not bool(torch.isfinite(g).all())]


def describe(losses: list[float], named: Iterable[tuple[str, nn.Parameter]]) -> str:
    """Which of a step's losses or gradients are not finite, for a message."""
    bad = [i for i, x in enumerate(losses) if not torch.isfinite(torch.tensor(x))]
    if bad:
        where = f" of forward {bad[0] + 1} of {len(losses)}" if len(losses) > 1 else ""
        return f"the loss{where} is {losses[bad[0]]}"
    names = nonfinite_grads(named)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"the gradient of {', '.join(names[:3]) or 'no single parameter'}{more} is not finite"


def keep(out: Path, stage: str, recipe: Recipe, state: State, rows: list[Trajectory], about: dict) -> str:
    """Writes `out/nonfinite/step-…`: a run folder as the run was before the step, the step's
    trajectories and `about`. Returns what to say of it."""
    step = state.progress.step + 1
    folder = out / "nonfinite" / f"step-{step:08d}"
    rows = list({t.id: t for t in rows}.values())  # an epoch's end and the next one's beginning
    ids = [t.id for t in rows]
    names = f"trajectories {', '.join(ids[:4])}" + (f" and {len(ids) - 4} more" if len(ids) > 4 else "")
    if len(list(folder.parent.glob("step-*"))) >= KEPT and not folder.exists():
        return f"{names} (not saved: '{folder.parent}' holds {KEPT} already)"
    if out.parent.name == "nonfinite":  # it is such a step that is run again
        return f"{names}, as before"
    make_folder(folder)
    optim = recipe.optim.model_copy(update={"nonfinite": "stop"})
    again = recipe.model_copy(update={"out": str(folder), "optim": optim})
    tree = again.model_dump(mode="json")
    write_text(folder / "recipe.yaml", yaml.safe_dump(tree, sort_keys=False))
    write_lines(folder / "batch.jsonl", (json.dumps(asdict(t)) for t in rows))
    write_json(folder / "nonfinite.json", {"step": step, "trajectories": ids, **about})
    Checkpoints(folder).save(state)
    command = f"draft-opd {stage} --config '{folder}/recipe.yaml' --resume"
    return f"{names}; to begin with this step again: {command}"


def norm_of(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Clips gradients to a norm of `limit` unless that is not finite; returns it [0-d]."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    full = gather_full_tensors({"norm": norm})["norm"]
    if bool(torch.isfinite(full)):
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return full


@contextmanager
def memory_errors(step: int, accumulate: int, rows_of: Callable[[int], list[Trajectory]]) -> Iterator[None]:
    """Turns out-of-memory errors of a step (0-based) into a `Failure` that says what to lower. The last
    checkpoint stays."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        forwards = [rows_of(step * accumulate + i) for i in range(accumulate)]
        longest = max(len(t.ids) for rows in forwards for t in rows)
        raise Failure(
            f"step {step + 1} ran out of memory ({max(map(len, forwards))} texts of up to {longest} tokens a "
            "forward): lower batch_size (and raise accumulate), data.max_length or opd.max_anchors "
            "(sft.anchors), or set gradient_checkpointing: true, in a run of its own"
        ) from error
