"""`batch_size: auto`: the trajectories of a step in as few forwards as the memory takes.

How a step is split changes which texts stand together, and each forward's mean counts the same: results
differ a little with the memory of the machine. It is decided once, when a run begins; what was found stands
in the run's recipe.yaml, and a resumed run takes it from there.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence

import torch

from draft_opd.data.trajectory import Trajectory
from draft_opd.training.config import AUTO_BATCH, Recipe
from draft_opd.utils.errors import Failure, UserError, is_out_of_memory

Rows = Callable[[int], list[Trajectory]]  # by the forward's index


def splits(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with one forward a step, then with forwards of half as many trajectories, and so on."""
    total = AUTO_BATCH * recipe.accumulate
    size = total
    while True:
        yield recipe.model_copy(update={"batch_size": size, "accumulate": total // size})
        if size % 2:
            return
        size //= 2


def longest_rows(rows: Sequence[Trajectory], count: int) -> Rows:
    """The batch that takes most memory, as every forward's."""
    longest = sorted(rows, key=lambda t: len(t.ids), reverse=True)[:count]
    return lambda _: longest


def fitting(
    recipe: Recipe, rows: Sequence[Trajectory], attempt: Callable[[Recipe, Rows], None], processes: int
) -> Recipe:
    """The first of `splits` whose largest forward `attempt` gets through.

    attempt(recipe, rows): a forward and backward pass. Raises `UserError` with several processes (one
    that runs out of memory would leave the others waiting), `Failure` where one trajectory is too much.
    """
    if processes > 1:
        raise UserError("batch_size: auto is for one process: give a number, and accumulate")
    for candidate in splits(recipe):
        assert isinstance(candidate.batch_size, int)
        try:
            attempt(candidate, longest_rows(rows, candidate.batch_size))
            return candidate
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        gc.collect()  # what the failed forward held
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    longest = max(len(t.ids) for t in rows)
    raise Failure(
        f"batch_size: auto: one text of {longest} tokens is already more than the memory holds: lower "
        "data.max_length or opd.max_anchors (sft.anchors), or set gradient_checkpointing: true"
    )
