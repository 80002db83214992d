"""One loop for both stages: batches, schedule, held-out τ, metrics, checkpoints, resume."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal

import torch

from draft_opd.decoding.rounds import by_accepted, tau_of
from draft_opd.models.target import Target
from draft_opd.training import nonfinite
from draft_opd.training.batch_size import Rows, fitting
from draft_opd.training.batches import EpochBatches, open_sources
from draft_opd.training.checkpoint import (
    Checkpoints,
    Progress,
    State,
    load_checkpoint,
    repair_best,
    save_best,
)
from draft_opd.training.config import Recipe
from draft_opd.training.distributed import ParallelContext, gather_full_tensors, no_grad_call, reduce_metric
from draft_opd.training.inputs import Inputs, check_folder, read_inputs
from draft_opd.training.optimizer import Optimizer, learning_rate
from draft_opd.training.precision import autocast, resolve_for_run
from draft_opd.training.rollouts import Rollouts, TraceCosts
from draft_opd.training.run_folder import Record, RunResult
from draft_opd.training.setup import (
    check_data,
    check_fingerprints,
    check_shares,
    fingerprints_of,
    first_drafter,
    load_target,
)
from draft_opd.training.stage import StageContext, StepOutput, TrainingStage
from draft_opd.training.stage_opd import OpdStage
from draft_opd.training.stage_sft import SftStage
from draft_opd.training.stopwatch import Stopwatch
from draft_opd.utils.errors import Failure, Stopped, UserError
from draft_opd.utils.files import lock_folder, make_folder, recover_folder

Stage = Literal["sft", "opd"]
STAGES: dict[Stage, Callable[[StageContext], TrainingStage]] = {"sft": SftStage, "opd": OpdStage}
OnMetrics = Callable[[dict], None]
log = logging.getLogger(__name__)


class Run:
    """A stage of training, from recipe to checkpoints. `train()` does it."""

    def __init__(
        self,
        stage: Stage,
        recipe: Recipe,
        *,
        target: Target | None = None,
        after: Run | None = None,
        resume: bool = False,
        on_metrics: OnMetrics | None = None,
        group: ParallelContext | None = None,
        stop: Callable[[], bool] = lambda: False,
        inputs: Inputs | None = None,
    ):
        """after: an earlier run, whose target and feature cache serve again. group: the processes
        that train together (`distributed.distributed_context`). stop: whether to end after the step
        that is running, with everything saved; `train` then raises `Stopped`. inputs: the recipe's,
        where they are read already.

        Raises `UserError` for whatever is wrong with recipe, data, models or run folder."""
        self.stage, self.on_metrics = stage, on_metrics
        self.group = group or ParallelContext()
        self._asked_to_stop, self.stopping = stop, False
        self.out = Path(recipe.out)
        # Before the target: a bad file should not cost a model's loading time.
        if inputs is None:
            inputs = read_inputs(stage, recipe, resume, models=target is None and after is None)
        recipe, self.train_set, self.held_out = inputs.recipe, inputs.train_set, inputs.held_out
        check_shares(recipe, self.train_set, self.held_out, self.group.size)
        self.target = target or (after.target if after else load_target(recipe, self.group))
        check_data(self.train_set, self.held_out, self.target)
        self.recipe, bfloat16_speed = resolve_for_run(recipe, self.target, self.group)
        self._lock: BinaryIO | None = None
        self.checkpoints = Checkpoints(self.out, recipe.keep_checkpoints)
        self.group.barrier()  # all processes have read the folder before the first one changes it
        resume_from = self.group.main_process_first(lambda: self._open_folder(resume))
        self._load_state(resume_from)
        self.sources = open_sources(
            self.recipe.data,
            self.target,
            self.drafter.target_layers,
            self.out,
            self.group,
            after.sources if after else None,
        )
        self.clock = Stopwatch(self.target.device)
        if self.recipe.batch_size == "auto":
            self.recipe = fitting(self.recipe, self.train_set, self._attempt, self.group.world)
        recipe = self.recipe
        self._set_up_stage(recipe, EpochBatches(self.train_set, recipe.batch_size, recipe.seed))
        self._begin_record(resume_from, bfloat16_speed)

    # -- setting up -------------------------------------------------------------------------

    def _open_folder(self, resume: bool) -> Path | None:
        """The checkpoint to go on from. The first process keeps others out of the folder."""
        if self.group.is_main_process:
            self._lock = lock_folder(make_folder(self.out))
            check_folder(self.recipe, resume)  # another one may have come and gone meanwhile
            recover_folder(self.out / "best")
        resume_from = self.checkpoints.newest() if resume else None
        if resume and not resume_from and self.group.is_main_process:
            log.warning("nothing to resume in '%s': beginning at step 0", self.out)
        if resume and not resume_from and (self.out / "best").exists():
            raise UserError(
                f"'{self.out}' holds a run's `best` but no checkpoint to resume from: begin in "
                "another `out`, and keep this one for its drafter"
            )
        return resume_from

    def _load_state(self, resume_from: Path | None) -> None:
        """Drafter, optimiser and progress: of a checkpoint, or those that a run begins with."""
        recipe = self.recipe
        torch.manual_seed(recipe.seed)
        self.drafter = first_drafter(recipe, resume_from, self.target, self.train_set)
        self.num_draft_tokens = self.drafter.checked_length(recipe.draft_length)
        self.wrapped_drafter = self.group.wrap(self.drafter)
        self.optimizer = Optimizer(self.drafter, recipe.optim)
        self.progress = load_checkpoint(resume_from, self.optimizer) if resume_from else Progress()
        if not self.group.all_equal(self.progress.step):
            raise UserError(f"not all processes see the same run folder '{self.out}': share it")
        fingerprints = fingerprints_of(self.target, self.train_set, self.held_out)
        check_fingerprints(self.out, self.progress.fingerprints, fingerprints)
        self.progress.fingerprints = fingerprints

    def _set_up_stage(self, recipe: Recipe, rows: Rows) -> None:
        """rows: the whole batch of a forward, by its index."""
        # Partials instead of bound methods: they avoid a reference cycle, so a discarded run frees
        # its memory at once.
        source, self._rows = self.sources.train, rows
        self.rollouts = Rollouts(
            recipe,
            self.target,
            self.drafter,
            source,
            self._rows,
            self.num_draft_tokens,
            self.group,
            partial(no_grad_call, self.wrapped_drafter, self.group),
            self.clock,
        )
        self.rollouts.load(self.progress.traces)
        self.rollouts.costs = {int(k): TraceCosts(*v) for k, v in self.progress.trace_costs.items()}
        self.rollouts.tau = max(1.0, self.progress.tau)
        self.training: TrainingStage = STAGES[self.stage](
            StageContext(
                recipe,
                self.target,
                self.drafter,
                source,
                self.rollouts,
                self._rows,
                self.num_draft_tokens,
                self.group,
                self.clock,
            )
        )

    def _attempt(self, recipe: Recipe, rows: Rows) -> None:
        """A forward and backward pass beside the room that gradients and moments will take."""
        fresh = recipe.opd.model_copy(update={"trace_every": 1})
        self._set_up_stage(recipe.model_copy(update={"opd": fresh}), rows)
        try:
            _room = [torch.empty_like(p) for p in self.drafter.parameters() for _ in range(3)]
            self._forward(0)[0].backward()
        finally:
            self.optimizer.forget()
            self.clock.take()

    def _begin_record(self, resume_from: Path | None, bfloat16_speed: float | None) -> None:
        about = {
            "stage": self.stage,
            "device": str(self.target.device),
            "processes": self.group.world,
            "bfloat16_speed": bfloat16_speed,
            "drafter_parameters": sum(p.numel() for p in self.drafter.parameters()),
        }
        self.record: Record | None = None
        if self.group.is_main_process:
            self.record = Record(self.recipe, about, self.progress.step, self.progress.evaluated)
            repair_best(resume_from, self.out / "best", self.progress)
        kept = resume_from == self.checkpoints.last
        self._saved = (self.progress.step, self.progress.evaluated) if kept else None

    # -- training ---------------------------------------------------------------------------

    def train(self) -> RunResult:
        """Runs to the last step; on a fresh run step 0 is evaluated first.

        Raises `Stopped` when `stop` says so and `Failure` where it cannot go on.
        """
        try:
            result = self._train()
        except BaseException:
            if self.record:
                self.record.close(failed=True)
            raise
        finally:
            if self._lock:
                self._lock.close()
        if self.record:
            self.record.close(failed=False)
        return result

    def _train(self) -> RunResult:
        p, r = self.progress, self.recipe
        while True:
            last = p.step == r.steps
            better = False
            due = last or p.step % r.evaluation.every == 0
            if due and p.evaluated < p.step and not self._stop_now():
                better = self._evaluate()
            last = last or self._at_plateau()
            stop = self._stop_now()
            if last or better or p.step % r.save_interval == 0 or stop:
                self._save()
            if better and self.group.is_main_process:  # after the checkpoint: `repair_best` needs that one
                save_best(self.out / "last", self.out / "best", p)
            if stop:
                self.group.barrier()  # the main process has written the checkpoint
                raise Stopped(
                    f"stopped at step {p.step} of {r.steps}, saved in '{self.out / 'last'}': go "
                    "on with --resume"
                )
            if last:
                break
            self._next()
        return RunResult(
            self.out, p.start_tau, p.tau, p.best_tau, p.best_step, p.step, p.supervised, p.seconds
        )

    def _stop_now(self) -> bool:
        """With several processes: the flag that was all-reduced after the last step, so that all of
        them stop at the same one."""
        return self.stopping if self.group.world > 1 else self._asked_to_stop()

    def _at_plateau(self) -> bool:
        """Whether held-out τ has not risen for as long as the recipe waits."""
        p, e = self.progress, self.recipe.evaluation
        waited = p.step - p.best_step if p.evaluated == p.step else 0
        return e.patience is not None and waited >= e.patience * e.every

    def _record(self, line: dict) -> None:
        if self.record:
            self.record.line(line)
        if self.on_metrics:
            self.on_metrics(line)

    def _forward(self, index: int) -> StepOutput:
        """This process's part of the index-th forward's loss, and of its metrics."""
        self.drafter.eval()
        prepared = self.training.prepare(index)
        self.drafter.train()
        seed = f"{self.recipe.seed}/{index}"
        with autocast(self.recipe, self.target.device):
            return self.wrapped_drafter(self.training.forward_loss, prepared, seed)

    def _next(self) -> None:
        """The next step and what is kept of it."""
        p, began = self.progress, time.perf_counter()
        with nonfinite.memory_errors(p.step, self.recipe.accumulate, self._rows):
            line = self.step(p.step)
        p.skipped = p.skipped + 1 if "skipped" in line else 0
        p.supervised += line.get("supervised", 0)
        p.step += 1
        self.rollouts.forget(before=p.step * self.recipe.accumulate)
        p.seconds += time.perf_counter() - began
        seconds = {"all": time.perf_counter() - began, **self.clock.take()}
        self._record({"step": p.step, **line, "seconds": seconds})
        if self.group.world > 1:
            self.stopping = self.group.any_rank(self._asked_to_stop())

    def step(self, step: int) -> dict:
        """The update of that step (0-based) from the drafter as it is; returns its figures.

        Raises `Failure` where it is not finite and may not be skipped.
        """
        r = self.recipe
        rate = learning_rate(step, r.steps, r.optim, r.extended_from)
        self.optimizer.set_rate(rate)
        self.rollouts.tau = self.progress.tau
        parts = []
        for index in range(step * r.accumulate, (step + 1) * r.accumulate):
            more = index + 1 < (step + 1) * r.accumulate
            with self.group.no_sync(self.wrapped_drafter) if more else nullcontext():
                loss, figures = self._forward(index)
                with self.clock("backward"):
                    # Gradients are averaged over processes; they should be added.
                    (loss * self.group.size / r.accumulate).backward()
            parts.append(self.group.all_reduce_metrics({"loss": loss.item(), **figures}))
        losses = [x["loss"] for x in parts]
        with self.clock("update"):
            norm = nonfinite.norm_of(list(self.drafter.parameters()), r.optim.clip)
            finite = all(map(math.isfinite, [*losses, norm.item()]))
            if finite:
                self.optimizer.step()
        if not finite:
            return self._not_finite(losses)
        return {**self._figures(parts), "lr": rate, "grad_norm": norm.item()}

    def _figures(self, parts: list[dict]) -> dict:
        """Those of a step: counts are added up over its forwards, the rest is averaged."""
        found = {key: reduce_metric(key, [x[key] for x in parts]) for key in parts[0]}
        return self.training.summarize(found)

    def _not_finite(self, losses: list[float]) -> dict:
        """Keeps the step for replay, then stops or says what the metrics hold of it."""
        r, p = self.recipe, self.progress
        what = nonfinite.describe(losses, list(self.drafter.named_parameters()))
        self.optimizer.forget()
        first = p.step * r.accumulate
        rows = [t for i in range(first, first + r.accumulate) for t in self._rows(i)]
        state, where = self._state(), ""
        if self.group.is_main_process:
            about = {"what": what, "losses": [str(x) for x in losses]}
            where = nonfinite.keep(self.out, self.stage, r, state, rows, about)
        count = p.skipped + 1
        if r.optim.nonfinite == "stop" or count >= nonfinite.IN_A_ROW:
            self.group.barrier()
            row = f" ({count} times in a row: see the first ones)" if count > 1 else ""
            raise Failure(f"step {p.step + 1}: {what}{row}; {where}")
        if self.group.is_main_process:
            log.warning("step %d skipped: %s; %s", p.step + 1, what, where)
        return {"skipped": what}

    # -- saving -----------------------------------------------------------------------------

    def _state(self) -> State:
        self.progress.traces = self.rollouts.state()
        self.progress.trace_costs = {str(k): list(v) for k, v in self.rollouts.costs.items()}
        return State(
            self.drafter.config_dict(),
            gather_full_tensors(self.drafter.tensors()),
            self.optimizer.state(),
            self.progress,
        )

    def _save(self) -> None:
        now = (self.progress.step, self.progress.evaluated)
        if now == self._saved:
            return
        if self.sources.folder is not None:
            self.sources.folder.flush()
        state = self._state()
        if self.record:
            self.record.sync()
            self.checkpoints.save(state)
        self._saved = now

    # -- measuring --------------------------------------------------------------------------

    @torch.no_grad()
    def held_out_counts(self) -> list[int] | None:
        """Rounds of speculative decoding on the held-out texts, by how many tokens they accepted
        (above temperature 0: one draw). None when a stop was asked for meanwhile."""
        self.drafter.eval()
        counts = [0] * (self.num_draft_tokens + 1)
        for number, rows in enumerate(self.group.shard_pieces(self.held_out, self.rollouts.rows_at_once)):
            if self._stop_now():
                return None
            batch = self.sources.held_out.batch(rows)
            seed = number * self.group.size + self.group.rank
            traces = self.rollouts.hindsight(batch, seed)
            found = by_accepted((r for trace in traces for r in trace), self.num_draft_tokens)
            counts = [a + b for a, b in zip(counts, found, strict=True)]
        return self.group.all_reduce_metrics({"counts": counts})["counts"]

    def _evaluate(self) -> bool:
        """Held-out τ at this step; whether it is the best so far."""
        p = self.progress
        counts = self.held_out_counts()
        if counts is None:
            return False
        value = tau_of(counts)
        self._record({"step": p.step, "tau": value})
        p.evaluated, p.tau = p.step, value
        if p.step == 0:
            p.start_tau = value
        if value <= p.best_tau:
            return False
        p.best_tau, p.best_step = value, p.step
        return True
