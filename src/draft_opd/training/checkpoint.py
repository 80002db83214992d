"""Checkpoints: a standard drafter folder with the training state in a folder of its own."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file

from draft_opd.drafters.base import Drafter
from draft_opd.errors import UserError
from draft_opd.files import replace_folder
from draft_opd.training.optimizer import Optimizer

STATE = "training"


@dataclass
class Progress:
    """Where a run stands. Data order, anchors and traces follow from the step alone."""

    step: int = 0
    best_tau: float = -1.0
    best_step: int = 0
    supervised: int = 0
    seconds: float = 0.0
    extra: dict = field(default_factory=dict)


def save_checkpoint(
    folder: Path, drafter: Drafter, optimizer: Optimizer, progress: Progress
) -> None:
    """Replaces `folder` at once; the drafter in it can be used as it is."""
    with replace_folder(folder) as temporary:
        drafter.save_pretrained(temporary)
        (temporary / STATE).mkdir()
        save_file(optimizer.state(), temporary / STATE / "optimizer.safetensors")
        (temporary / STATE / "progress.json").write_text(json.dumps(asdict(progress), indent=2))


def load_checkpoint(folder: Path, optimizer: Optimizer) -> Progress:
    """Fills the optimiser's state; the drafter's own weights are loaded with the folder."""
    try:
        progress = Progress(**json.loads((folder / STATE / "progress.json").read_text()))
        optimizer.load_state(load_file(folder / STATE / "optimizer.safetensors"))
    except Exception as error:
        raise UserError(f"'{folder}' is not a checkpoint to resume from ({error})") from error
    return progress
