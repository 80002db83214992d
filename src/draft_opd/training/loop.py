"""One loop for both stages: batches, schedule, held-out τ, metrics, checkpoints, resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError

from draft_opd.drafters.base import FAMILIES, Drafter
from draft_opd.errors import UserError
from draft_opd.files import recover_folder
from draft_opd.rollout.trace import Traces, tau
from draft_opd.rollout.trajectory import Trajectory, check_trajectories, read_trajectories
from draft_opd.target import Target
from draft_opd.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from draft_opd.training.config import Model, Recipe
from draft_opd.training.data import Batch, BatchSource, batch_at, cut
from draft_opd.training.features import FeatureFolder, about_features
from draft_opd.training.objectives import needs_branches
from draft_opd.training.opd import hindsight_rollout, live_rollout, opd_loss
from draft_opd.training.optimizer import Optimizer
from draft_opd.training.record import Record, check_folder
from draft_opd.training.sft import sft_loss
from draft_opd.training.stopwatch import Stopwatch
from draft_opd.training.tracking import check_tracker

Stage = Literal["sft", "opd"]
FEW = 3.0  # trajectories times τ below which drafting at every position is faster
ROWS = 32  # trajectories that one trace forward looks at: more would only take memory
OnMetrics = Callable[[dict], None]


@dataclass
class RunResult:
    """Held-out τ before, at the end and at its best; `best` and `last` are drafter folders."""

    out: Path
    start_tau: float | None
    tau: float
    best_tau: float
    best_step: int
    step: int
    supervised: int
    seconds: float

    def as_dict(self) -> dict:
        """For JSON."""
        return {
            "kind": "run",
            "path": str(self.out),
            "best": str(self.best),
            "last": str(self.last),
            **{k: v for k, v in asdict(self).items() if k != "out"},
        }

    @property
    def best(self) -> Path:
        return self.out / "best"

    @property
    def last(self) -> Path:
        return self.out / "last"


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Linear warm-up, then cosine to `final_ratio` of the peak, for step 0..steps-1."""
    o = recipe.optim
    warm = max(1, round(o.warmup * steps))
    if step < warm:
        return o.learning_rate * (step + 1) / warm
    part = (step - warm) / max(1, steps - warm)
    return o.learning_rate * (
        o.final_ratio + (1 - o.final_ratio) * (1 + math.cos(math.pi * part)) / 2
    )


def new_drafter(model: Model, target: Target, counts: torch.Tensor) -> Drafter:
    """The drafter that training begins with; counts [V] of the target's tokens. Raises `UserError`
    for a family or an option that there is not."""
    family = FAMILIES.get(model.family)
    if family is None:
        raise UserError(f"unknown drafter family '{model.family}'; known: {', '.join(FAMILIES)}")
    try:
        return family.create(target, counts, **model.options)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"model.options.{key}: {first['msg'].lower()}") from None


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
    ):
        """`after`: an earlier run, whose target and remembered features serve again."""
        self.stage, self.recipe, self.on_metrics = stage, recipe, on_metrics
        self.out = Path(recipe.out)
        check_folder(recipe, resume)
        check_tracker(recipe.tracker)
        if stage == "opd" and not recipe.drafter:
            raise UserError("opd starts from a trained drafter: set `drafter` in the recipe")
        # Trajectories before the target: a bad file should not cost a model's loading time.
        self.train_set = self._read(recipe.data.trajectories, recipe.data.limit)
        self.held_out = self._read(recipe.data.heldout, recipe.data.heldout_limit)
        self.target = (
            target
            or (after and after.target)
            or Target.from_pretrained(recipe.target, trust_remote_code=recipe.trust_remote_code)
        )
        self._check_ids()
        for folder in ("last", "best"):
            recover_folder(self.out / folder)
        resuming = resume and (self.out / "last" / "training").is_dir()
        source = str(self.out / "last") if resuming else recipe.drafter
        torch.manual_seed(recipe.seed)
        if source:
            self.drafter = Drafter.from_pretrained(source, device=self.target.device)
            self.drafter.check_target(self.target)
        else:
            self.drafter = self._create()
        self.drafter.gradient_checkpointing = recipe.gradient_checkpointing
        self.length = self.drafter.checked_length(recipe.draft_length)
        self.optimizer = Optimizer(self.drafter, recipe.optim)
        self.progress = Progress()
        if resuming:
            self.progress = load_checkpoint(self.out / "last", self.optimizer)
        dtype, layers = getattr(torch, recipe.data.cache_dtype), self.drafter.target_layers
        self.features: FeatureFolder | None = None
        if recipe.data.cache_features == "disk":
            folder = Path(recipe.data.features or self.out / "features")
            self.features = FeatureFolder(folder, about_features(self.target, layers, dtype))
        keep = recipe.data.cache_features != "none"
        known = self.features if self.features is not None else {} if keep else None
        self.source = BatchSource(self.target, layers, known, dtype)
        # The yardstick is never rounded: its features stay in the target's own type.
        self.yardstick = BatchSource(self.target, layers, {} if keep else None, self.target.dtype)
        if after is not None:
            self.source.adopt(after.source)
            self.yardstick.adopt(after.yardstick)
        self.clock = Stopwatch(self.target.device)
        self._rollouts: list[tuple[list[Trajectory], Traces]] = []
        about = {
            "stage": stage,
            "device": str(self.target.device),
            "drafter_parameters": sum(p.numel() for p in self.drafter.parameters()),
        }
        self.record = Record(recipe, about, self.progress.step)

    # -- setting up -------------------------------------------------------------------------

    def _read(self, path: str, limit: int | None) -> list[Trajectory]:
        found = read_trajectories(path, limit=limit)
        kept = [t for t in (cut(t, self.recipe.data.max_length) for t in found) if t]
        if not kept:
            raise UserError(
                f"'{path}': max_length {self.recipe.data.max_length} leaves no response token, "
                "so the loss mask would be all zeros"
            )
        if any(not t.prompt_ids for t in kept):
            raise UserError(f"'{path}': a prompt is empty, so the loss mask would be all ones")
        return kept

    def _check_ids(self) -> None:
        asked = self.recipe.sampling.filters
        for name, rows in (("trajectories", self.train_set), ("heldout", self.held_out)):
            check_trajectories(rows, self.target, f"data.{name}")
            for t in rows:
                if (t.temperature, t.top_k, t.top_p) != asked:
                    raise UserError(
                        f"data.{name}: trajectory {t.id} was sampled with (temperature, top_k, "
                        f"top_p) = {(t.temperature, t.top_k, t.top_p)}, the recipe's `sampling` "
                        f"says {asked}: set it to what the data has"
                    )
        seen = {tuple(t.prompt_ids) for t in self.train_set}
        if any(tuple(t.prompt_ids) in seen for t in self.held_out):
            raise UserError("data.heldout shares prompts with data.trajectories: τ would flatter")

    def _create(self) -> Drafter:
        said = [i for t in self.train_set for i in t.response_ids]
        counts = torch.bincount(torch.tensor(said), minlength=self.target.vocab_size)
        return new_drafter(self.recipe.model, self.target, counts)

    # -- training ---------------------------------------------------------------------------

    def train(self) -> RunResult:
        """Runs to the last step; on a fresh run step 0 is evaluated first."""
        try:
            result = self._train()
        except BaseException:
            self.record.close(failed=True)
            raise
        self.record.close(failed=False)
        return result

    def _train(self) -> RunResult:
        r = self.recipe
        if self.progress.step == 0:
            self.progress.extra["start"] = self._evaluate(0)
        last_tau = self.progress.extra.get("tau", 0.0)
        while self.progress.step < r.steps:
            step = self.progress.step
            began = time.perf_counter()
            figures = self._step(step)
            self.progress.step = step + 1
            self.progress.supervised += figures["supervised"]
            self.progress.seconds += time.perf_counter() - began
            seconds = {"all": time.perf_counter() - began, **self.clock.take()}
            self._record({"step": step + 1, **figures, "seconds": seconds})
            done = step + 1 == r.steps
            if done or (step + 1) % r.evaluation.every == 0:
                last_tau = self._evaluate(step + 1)
            if done or (step + 1) % r.save_interval == 0:
                if self.features is not None:
                    self.features.flush()
                save_checkpoint(self.out / "last", self.drafter, self.optimizer, self.progress)
        p = self.progress
        return RunResult(
            self.out, p.extra.get("start"), last_tau, p.best_tau, p.best_step, p.step, p.supervised,
            p.seconds,
        )  # fmt: skip

    def _record(self, line: dict) -> None:
        self.record.line(line)
        if self.on_metrics:
            self.on_metrics(line)

    def _autocast(self):
        enabled = self.recipe.precision == "bfloat16"
        return torch.autocast(self.target.device.type, torch.bfloat16, enabled=enabled)

    def _trajectories(self, index: int) -> list[Trajectory]:
        lengths = [len(t.ids) for t in self.train_set]
        chosen = batch_at(lengths, self.recipe.batch_size, self.recipe.seed, index)
        return [self.train_set[i] for i in chosen]

    def _step(self, step: int) -> dict:
        r = self.recipe
        rate = learning_rate(step, r.steps, r)
        self.optimizer.set_rate(rate)
        parts = []
        for part in range(r.accumulate):
            index = step * r.accumulate + part
            batch_and_trace = self._rollout(index) if self.stage == "opd" else None
            self.drafter.train()
            seed = f"{r.seed}/{index}"
            with self._autocast():
                if batch_and_trace:
                    loss, figures = opd_loss(
                        self.target, self.drafter, *batch_and_trace, r.opd, length=self.length,
                        seed=seed, sampling=r.sampling, clock=self.clock,
                    )  # fmt: skip
                else:
                    with self.clock("target"):
                        batch = self.source.batch(self._trajectories(index))
                    with self.clock("forward"):
                        loss, figures = sft_loss(
                            self.target, self.drafter, batch, anchors=r.sft.anchors,
                            length=self.length, decay=r.sft.decay, seed=seed,
                        )  # fmt: skip
            with self.clock("backward"):
                (loss / r.accumulate).backward()
            parts.append({"loss": loss.item(), **figures})
        with self.clock("update"):
            norm = torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), r.optim.clip)
            if not torch.isfinite(norm):
                raise FloatingPointError(
                    f"step {step + 1}: the gradient is not finite (loss {parts[-1]['loss']})"
                )
            self.optimizer.step()
        total = {key: _together(key, [p[key] for p in parts]) for key in parts[0]}
        return {**total, "lr": rate, "grad_norm": norm.item()}

    def _rollout(self, index: int) -> tuple[Batch, Traces]:
        """Batch and traces for one forward; traces of `trace_every` steps are made together."""
        r = self.recipe
        with_cache = needs_branches(r.opd.objective)
        self.drafter.eval()
        seed = r.seed * 1_000_003 + index
        if r.opd.rollout == "live":
            with self.clock("trace"):
                rows, traces = live_rollout(
                    self.target, self.drafter, self._trajectories(index), self.length,
                    r.sampling, seed,
                )  # fmt: skip
            with self.clock("target"):
                return self.source.batch(rows, with_cache, remember=False), traces
        if r.opd.trace_every == 1:
            with self.clock("target"):
                batch = self.source.batch(self._trajectories(index), with_cache)
            with self.clock("trace"), self._autocast():
                return batch, self._hindsight(batch, seed)
        if not self._rollouts:
            count = r.opd.trace_every * r.accumulate
            indices = range(index, min(index + count, r.steps * r.accumulate))
            groups = [self._trajectories(i) for i in indices]
            joint, traces = [t for g in groups for t in g], []
            for start in range(0, len(joint), ROWS):
                with self.clock("target"):
                    batch = self.source.batch(joint[start : start + ROWS])
                with self.clock("trace"), self._autocast():
                    # Used by later steps, when the drafter is another: what it drafted is kept.
                    traces += self._hindsight(batch, seed + start, whole=with_cache)
            for group in groups:
                self._rollouts.append((group, traces[: len(group)]))
                traces = traces[len(group) :]
        rows, traces = self._rollouts.pop(0)
        with self.clock("target"):
            return self.source.batch(rows, with_cache), traces

    def _hindsight(self, batch: Batch, seed: int, whole: bool = False) -> Traces:
        kind = self.recipe.opd.trace
        if kind == "auto":
            size = len(batch.trajectories) * self.progress.extra.get("tau", 1.0)
            kind = "everywhere" if size < FEW else "walk"
        return hindsight_rollout(
            self.target, self.drafter, batch, self.length, self.recipe.sampling, seed,
            whole, at_once=kind == "everywhere",
        )  # fmt: skip

    # -- measuring --------------------------------------------------------------------------

    @torch.no_grad()
    def held_out_traces(self) -> Traces:
        """Rounds of speculative decoding on the held-out texts (above temperature 0: one draw)."""
        self.drafter.eval()
        traces: Traces = []
        for start in range(0, len(self.held_out), ROWS):
            batch = self.yardstick.batch(self.held_out[start : start + ROWS])
            traces += self._hindsight(batch, start)
        return traces

    def _evaluate(self, step: int) -> float:
        value = tau([r for trace in self.held_out_traces() for r in trace])
        self._record({"step": step, "tau": value})
        self.progress.extra["tau"] = value
        if value > self.progress.best_tau:
            self.progress.best_tau, self.progress.best_step = value, step
            self.drafter.save_pretrained(self.out / "best")
        return value


def _together(key: str, values: list):
    """A figure of several forwards as one: counts are added, the rest is averaged."""
    if isinstance(values[0], list):
        return [sum(column) for column in zip(*values, strict=True)]
    return sum(values) if key in ("supervised", "anchors") else sum(values) / len(values)
