"""Checkpoints: standard drafter folders with the training state in a folder of its own.

A run folder holds the newest as `last` and those before it as `checkpoints/step-…`. Each lists the
hashes of its files, so that a torn or altered one is known and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from draft_opd.drafters.weights import write_model
from draft_opd.training.optimizer import Optimizer
from draft_opd.utils.errors import UserError
from draft_opd.utils.files import read_json, replace_folder, write_json

STATE = "training"
HASHES = f"{STATE}/files.json"
PROGRESS = f"{STATE}/progress.json"
OPTIMIZER = f"{STATE}/optimizer.safetensors"
NEEDED = {"config.json", "model.safetensors", OPTIMIZER, PROGRESS}
log = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands. Data order, anchors and random states follow from the step alone.

    evaluated: the last step whose held-out τ is known. fingerprints: hashes of target and data.
    traces: those that later steps will replay, by forward; trace_costs: see `rollouts.Rollouts`.
    """

    step: int = 0
    evaluated: int = -1
    start_tau: float | None = None
    tau: float = 0.0
    best_tau: float = -1.0
    best_step: int = 0
    supervised: int = 0
    seconds: float = 0.0
    skipped: int = 0  # steps in a row that were not finite
    fingerprints: dict[str, str] = field(default_factory=dict)
    traces: list = field(default_factory=list)
    trace_costs: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class State:
    """What a checkpoint holds: config.json, the drafter's tensors, the optimiser's, progress."""

    config: dict
    drafter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    progress: Progress

    def write(self, folder: Path) -> None:
        """Into an existing, empty folder, which can then be used as a drafter."""
        dtype = next(t.dtype for t in self.drafter.values() if t.is_floating_point())
        write_model(folder, self.config, self.drafter, dtype)
        (folder / STATE).mkdir()
        save_file(self.optimizer, folder / OPTIMIZER)
        (folder / PROGRESS).write_text(json.dumps(asdict(self.progress)))
        _write_hashes(folder)


def _files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): _hash(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder) != Path(HASHES)
    }


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _write_hashes(folder: Path) -> None:
    (folder / HASHES).write_text(json.dumps(_files(folder), indent=2))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None when its files are what was written."""
    try:
        recorded = read_json(folder / HASHES)
        found = _files(folder)
    except (UserError, OSError) as error:
        return f"{HASHES} cannot be read ({type(error).__name__})"
    if not isinstance(recorded, dict) or not recorded.keys() >= NEEDED:
        return f"{HASHES} does not list its files"
    for name in sorted(recorded.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        # Files that the list does not name are ignored.
        if name in recorded and recorded[name] != found[name]:
            return f"{name} is not what was written"
    return None


class Checkpoints:
    """Those of a run folder. keep: how many before the newest stay."""

    def __init__(self, out: Path, keep: int = 1):
        self.out, self.keep = out, keep
        self.last, self.older = out / "last", out / "checkpoints"
        self._step: int | None = None  # of `last`, where that is sound

    def save(self, state: State) -> None:
        """Makes it the newest: written beside, synced, renamed; then old ones are removed."""
        before = None if self._step is None else self.older / f"step-{self._step:08d}"
        if before is None and self.last.exists():
            before = self.older / "unknown"
        with replace_folder(self.last, keep=before) as folder:
            state.write(folder)
        self._step = state.progress.step
        for folder in self._older()[self.keep :]:
            shutil.rmtree(folder, ignore_errors=True)

    def _older(self) -> list[Path]:
        return sorted(self.older.glob("step-*"), reverse=True)

    def newest(self) -> Path | None:
        """The newest sound one; None where there is none at all.

        Warns of damaged ones that are newer. Raises `UserError` when all are damaged.
        """
        found = [p for p in (self.last, *self._older()) if p.is_dir()]
        damaged = []
        for folder in found:
            problem = damage(folder)
            if problem is None:
                break
            damaged.append(f"'{folder}' ({problem})")
        else:
            if damaged:
                raise UserError(
                    f"no checkpoint can be resumed from: {', '.join(damaged)} damaged; start again "
                    "in another `out`, from a drafter folder if one still loads"
                )
            return None
        if folder != self.last and not self.last.exists():
            log.warning("'%s' is missing; going on from '%s'", self.last, folder)
        elif damaged:
            log.warning("damaged: %s; going on from '%s'", ", ".join(damaged), folder)
        if folder != self.last and self.last.exists():
            aside = self.out / "last.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(self.last, aside)
        if folder == self.last:
            self._step = read_progress(folder).step
        return folder


def read_progress(folder: Path) -> Progress:
    """Raises `UserError` when there is none."""
    try:
        saved = read_json(folder / PROGRESS)
        if "made_of" in saved:  # the name that version 0.1 wrote
            saved["fingerprints"] = saved.pop("made_of")
        return Progress(**saved)
    except (UserError, TypeError) as error:
        raise UserError(f"'{folder}' is not a checkpoint to resume from ({error})") from error


def load_checkpoint(folder: Path, optimizer: Optimizer) -> Progress:
    """Fills the optimiser's state; the drafter's own weights are loaded with the folder."""
    try:
        optimizer.load_state(load_file(folder / OPTIMIZER))
    except Exception as error:
        raise UserError(f"'{folder}' is not a checkpoint to resume from ({error})") from error
    return read_progress(folder)


def save_best(checkpoint: Path, best: Path, progress: Progress) -> None:
    """Copies a checkpoint's drafter to `best`, with its step and τ."""
    with replace_folder(best) as folder:
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(checkpoint / name, folder / name)
        write_json(folder / "best.json", {"step": progress.best_step, "tau": progress.best_tau})


def repair_best(checkpoint: Path | None, best: Path, progress: Progress) -> None:
    """Writes `best` again where a kill came after the best checkpoint and before its copy. Warns where
    it cannot."""
    if not checkpoint or progress.evaluated < 0:
        return
    try:
        step = read_json(best / "best.json")["step"]
    except (UserError, KeyError, TypeError):
        step = None
    if step == progress.best_step:
        return
    if progress.best_step == progress.step == progress.evaluated:
        save_best(checkpoint, best, progress)
        return
    of = "missing or damaged" if step is None else f"of step {step}"
    log.warning("'%s' is %s, the run's best is step %d", best, of, progress.best_step)
