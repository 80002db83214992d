"""What the trainer asks of a stage, and what it gives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from draft_opd.drafters.base import Drafter
from draft_opd.models.target import Target
from draft_opd.training.batches import BatchSource
from draft_opd.training.config import Recipe
from draft_opd.training.distributed import ParallelContext
from draft_opd.training.rollouts import Rollouts, Rows
from draft_opd.training.stopwatch import Stopwatch


class StepOutput(NamedTuple):
    """loss (0-d, with gradient) of this process's part of a forward; metrics that add up over
    forwards and processes."""

    loss: Tensor
    metrics: dict


@dataclass
class StageContext:
    """What both stages work with. rows: the whole batch of a forward, by its index."""

    recipe: Recipe
    target: Target
    drafter: Drafter
    source: BatchSource
    rollouts: Rollouts
    rows: Rows
    num_draft_tokens: int
    group: ParallelContext
    clock: Stopwatch


class TrainingStage(Protocol):
    """A way to train. Everything that differs between SFT and Draft-OPD is behind this."""

    def prepare(self, index: int) -> Any:
        """What the index-th forward needs, without gradient; the drafter is in `eval` mode."""

    def forward_loss(self, prepared: Any, seed: str) -> StepOutput:
        """The forward; the drafter is in `train` mode."""

    def summarize(self, metrics: dict) -> dict:
        """A step's metrics, with those that follow from them."""
