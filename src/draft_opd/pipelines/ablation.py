"""Variants × seeds from one YAML: the same start and budget for each, paired by seed.

    recipe: embedded              # what every run is made from
    common: {data.limit: 1200}    # keys for every run
    seeds: [0, 1, 2]
    start: {steps: 1500}          # the SFT run that all variants of a seed go on from, or a
                                  # finished one: {drafter: "runs/sft-{seed}/last"}
    baseline: sft_continued       # differences are taken to this variant, seed by seed
    variants:
      sft_continued: {stage: sft, set: {sft.anchors: 16}}
      paper: {set: {opd.objective.kind: acceptance_aware}}
      paper_time: {as: paper, budget: seconds}   # as many steps as fit the baseline's seconds
    sweep: {optim.learning_rate: [5e-4, 2e-3]}   # optional: every variant with each value

Rows that are in the results file are not run again, and a run that was killed is resumed.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from draft_opd.hindsight.occupancy import expected_tau
from draft_opd.models.hub import check_models, find_folder
from draft_opd.report.plot_style import COLOURS, GREY, new_axes, svg
from draft_opd.training.config import Recipe, load_recipe
from draft_opd.training.inputs import read_data
from draft_opd.training.trainer import Run, RunResult
from draft_opd.utils.config import first_problem
from draft_opd.utils.console import table
from draft_opd.utils.errors import UserError, one_line
from draft_opd.utils.files import make_folder, read_json, write_json, write_text
from draft_opd.utils.machine import machine

COSTS = ("steps", "supervised", "seconds")
BUDGETS = {"steps": None, "tokens": "supervised", "seconds": "seconds"}


class Variant(BaseModel):
    model_config = ConfigDict(extra="forbid")

    stage: Literal["sft", "opd"] = "opd"
    set: dict[str, Any] = Field(default_factory=dict)
    like: str | None = Field(None, alias="as")
    budget: Literal["steps", "tokens", "seconds"] = "steps"


class Plan(BaseModel):
    model_config = ConfigDict(extra="forbid")

    recipe: str
    common: dict[str, Any] = Field(default_factory=dict)
    seeds: list[int] = Field(min_length=1)
    start: dict[str, Any] = Field(default_factory=dict)
    baseline: str
    variants: dict[str, Variant] = Field(min_length=1)
    sweep: dict[str, list[Any]] = Field(
        default_factory=dict, description="variant V becomes V@value, for each value of each key"
    )
    only: list[str] | None = Field(None, exclude=True, description="run no others")

    def narrowed(self, seeds: str | None, only: str | None) -> Plan:
        """Fewer seeds or variants, as comma-separated lists; raises `UserError`."""
        update: dict[str, Any] = {}
        try:
            if seeds:
                update["seeds"] = [int(s) for s in seeds.split(",")]
        except ValueError:
            raise UserError(f"--seeds {seeds}: give whole numbers, as 0,1,2") from None
        if only:
            for name in only.split(","):
                if name not in self.variants:
                    known = ", ".join(self.variants)
                    raise UserError(f"--only: no variant '{name}'; there are {known}")
            update["only"] = only.split(",")
        return self.model_copy(update=update)

    @model_validator(mode="after")
    def _spread(self) -> Plan:
        """Variants as they are run: one for each value of a swept key."""
        for key, values in self.sweep.items():
            spread = {}
            for name, v in self.variants.items():
                if v.like:
                    raise ValueError(f"variant '{name}': `as` and a sweep do not go together")
                for value in values:
                    spread[f"{name}@{value}"] = v.model_copy(update={"set": {**v.set, key: value}})
            self.variants = spread
        self.sweep = {}
        return self

    @model_validator(mode="after")
    def _references(self) -> Plan:
        for name in (self.baseline, *(v.like for v in self.variants.values() if v.like)):
            if name not in self.variants:
                known = ", ".join(self.variants)
                raise ValueError(f"'{name}' is not one of the variants: {known}")
        for name, v in self.variants.items():
            if v.budget != "steps" and not v.like:
                raise ValueError(f"variant '{name}': a budget of {v.budget} needs `as: VARIANT`")
        return self


def load_plan(path: Path) -> Plan:
    """Reads and checks the YAML; raises `UserError`."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Plan.model_validate(tree)
    except ValidationError as error:
        problem = first_problem(error)
        raise UserError(f"{path}: '{problem.key or 'plan'}': {problem.message}") from None
    except FileNotFoundError:
        raise UserError(f"ablation '{path}' does not exist") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        line = one_line(error)
        raise UserError(f"ablation '{path}' is not readable YAML ({line})") from None


class Ablation:
    """Runs a plan into a folder; `rows` are the results so far."""

    def __init__(self, plan: Plan, out: Path, say: Callable[[str], None] = lambda _: None):
        self.plan, self.out, self.say = plan, make_folder(out), say
        self.file = out / "ablation.json"
        self.rows: list[dict] = []
        self.known = plan.model_dump(by_alias=True)["variants"]
        if self.file.exists():
            self._take_up(read_json(self.file))
        # Before the first hour of training: every recipe must be valid.
        given = "drafter" in plan.start
        if given and len(plan.start) > 1:
            raise UserError("'start': with a drafter there is nothing else to set")
        recipes: list[Recipe] = []
        for seed in plan.seeds:
            if given:
                find_folder(str(self._given(seed)), "start.drafter")
            else:
                recipes.append(self._start_recipe(seed))
            for name in plan.variants:
                recipes.append(self._recipe(name, seed, Path("start"), final=False))
        self._check_inputs(recipes)
        # Rows of an earlier version hold one draw of τ where drafts are sampled.
        exact = not all(r.sampling.takes_argmax for r in recipes)
        if exact and not all(r.get("expected") for r in self.rows):
            raise UserError(f"'{self.file}' holds single draws of τ, not expectations: use another --out")
        self._last: Run | None = None

    @staticmethod
    def _check_inputs(recipes: list[Recipe]) -> None:
        """Every target and every file of trajectories, each once."""
        seen: list = []
        for recipe in recipes:
            if (what := (recipe.target, recipe.data, recipe.sampling)) not in seen:
                check_models(recipe.target)
                read_data(recipe)
                seen.append(what)

    def _take_up(self, before: dict) -> None:
        """Earlier results, if they were made by the same plan."""
        old, new = before["plan"], self.plan.model_dump(by_alias=True)
        both = set(old["variants"]) & set(new["variants"])
        changed = [k for k in ("recipe", "common", "start", "baseline") if old[k] != new[k]]
        changed += [f"variants.{n}" for n in both if old["variants"][n] != new["variants"][n]]
        if changed:
            raise UserError(
                f"'{self.file}' holds results of another plan (changed: {', '.join(changed)}): "
                "use another --out"
            )
        self.rows = before["runs"]
        self.known = {**before["plan"]["variants"], **new["variants"]}

    def _load(self, stage: str, pairs: dict[str, Any]) -> Recipe:
        return load_recipe(self.plan.recipe, [f"{k}={json.dumps(v)}" for k, v in pairs.items()], stage)

    def _start_recipe(self, seed: int) -> Recipe:
        pairs = {**self.plan.common, **self.plan.start, "seed": seed}
        return self._load("sft", {**pairs, "out": str(self.out / f"start-{seed}")})

    def _start(self, seed: int) -> Path:
        """The drafter that a seed's variants begin with: an SFT run's, or one that is there."""
        if "drafter" in self.plan.start:
            return self._given(seed)
        return self._train("sft", self._start_recipe(seed)).last

    def _given(self, seed: int) -> Path:
        return Path(str(self.plan.start["drafter"]).replace("{seed}", str(seed)))

    def _recipe(self, name: str, seed: int, start: Path, final: bool = True) -> Recipe:
        """A variant's recipe. All take their schedule and budget from the recipe's stage `opd`."""
        variant = self.plan.variants[name]
        origin = self.plan.variants[variant.like] if variant.like else variant
        pairs = {**self.plan.common, **origin.set, **(variant.set if variant.like else {})}
        pairs |= {"seed": seed, "drafter": str(start), "out": str(self.out / f"{name}-{seed}")}
        recipe = self._load("opd", pairs)
        unit = BUDGETS[variant.budget]
        if unit:
            paid = self._row(self.plan.baseline, seed)
            price = self._row(variant.like, seed)
            if final and not (paid and price):
                raise UserError(
                    f"variant '{name}' is measured by '{self.plan.baseline}' and '{variant.like}', "
                    f"which have no result for seed {seed}: run them first"
                )
            if paid and price:
                steps = round(recipe.steps * paid[unit] / price[unit])
                recipe = recipe.model_copy(update={"steps": max(1, steps)})
        return recipe

    def _row(self, name: str, seed: int) -> dict | None:
        return next((r for r in self.rows if (r["variant"], r["seed"]) == (name, seed)), None)

    def _train(self, stage: str, recipe: Recipe) -> RunResult:
        self._last = Run(stage, recipe, after=self._last, resume=Path(recipe.out).exists())
        return self._last.train()

    def run(self) -> dict:
        """Runs what is missing, seed by seed, and returns what `ablation.json` holds."""
        # Variants that are measured by another one's cost come after it.
        order = sorted(
            self.plan.only or self.plan.variants,
            key=lambda n: self.plan.variants[n].budget != "steps",
        )
        for seed in self.plan.seeds:
            missing = [n for n in order if self._row(n, seed) is None]
            if not missing:
                continue
            start = self._start(seed)
            self.say(f"seed {seed}, from {start}")
            for name in missing:
                recipe = self._recipe(name, seed, start)
                done = self._train(self._stage(name), recipe)
                tau = self._expected_tau(recipe, done)
                self.rows.append(
                    {
                        "variant": name,
                        "seed": seed,
                        "start": done.start_tau,
                        "tau": tau,
                        "expected": not recipe.sampling.takes_argmax,
                        "best": done.best_tau,
                        "steps": done.step,
                        "supervised": done.supervised,
                        "seconds": round(done.seconds, 1),
                    }
                )
                start_tau = done.start_tau or 0.0
                self.say(f"  {name}: τ {start_tau:.3f} -> {tau:.3f} in {done.seconds:.0f} s")
                write_json(self.file, self.report())
        write_text(self.out / "ablation.svg", plot(self.rows, self.plan.baseline))
        return self.report()

    def _expected_tau(self, recipe: Recipe, done: RunResult) -> float:
        """Held-out τ at the end; computed exactly where drafts are sampled, as the run has one draw of it."""
        run = self._last
        if recipe.sampling.takes_argmax or run is None:
            return done.tau
        run.drafter.eval()
        return expected_tau(
            run.target, run.drafter, run.held_out, draft_length=recipe.draft_length, sampling=recipe.sampling
        )

    def _stage(self, name: str) -> str:
        variant = self.plan.variants[name]
        return self.plan.variants[variant.like].stage if variant.like else variant.stage

    def report(self) -> dict:
        """Plan, machine, rows, and the table."""
        return {
            "plan": {**self.plan.model_dump(by_alias=True), "variants": self.known},
            "machine": machine(),
            "table": summarise(self.rows, self.plan.baseline),
            "runs": self.rows,
        }


def summarise(rows: list[dict], baseline: str) -> list[dict]:
    """One entry a variant, best first: τ (mean, spread) and the difference to the baseline in
    percent, paired by seed (mean, spread, and on how many seeds it is positive)."""
    table = []
    for name in dict.fromkeys(r["variant"] for r in rows):
        mine = [r for r in rows if r["variant"] == name]
        taus = [r["tau"] for r in mine]
        gains = _gains(rows, name, baseline)
        table.append(
            {
                "variant": name,
                "seeds": len(mine),
                "tau": statistics.mean(taus),
                "tau_sd": _spread(taus),
                "gain_percent": statistics.mean(gains) if gains else None,
                "gain_sd": _spread(gains),
                "wins": sum(g > 0 for g in gains),
                **{k: statistics.mean(r[k] for r in mine) for k in COSTS},
            }
        )
    return sorted(table, key=lambda row: -row["tau"])


def _gains(rows: list[dict], name: str, baseline: str) -> list[float]:
    """Percent to the baseline, on the seeds that both have."""
    base = {r["seed"]: r["tau"] for r in rows if r["variant"] == baseline}
    mine = [r for r in rows if r["variant"] == name and r["seed"] in base]
    return [100 * (r["tau"] / base[r["seed"]] - 1) for r in mine]


def _spread(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def plot(rows: list[dict], baseline: str) -> str:
    """Differences to the baseline as SVG: a dot a seed, a bar for the mean, best on top."""
    names = [r["variant"] for r in reversed(summarise(rows, baseline)) if r["variant"] != baseline]
    figure, axes = new_axes(f"τ, % to {baseline}", "", height=0.8 + 0.25 * len(names), width=7)
    for y, name in enumerate(names):
        gains = _gains(rows, name, baseline)
        axes.plot(gains, [y] * len(gains), "o", color=COLOURS[0], alpha=0.45, markersize=4)
        if gains:
            axes.plot([statistics.mean(gains)], [y], "|", color=COLOURS[1], markersize=12, mew=2)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    return svg(figure)


def show(rows: list[dict], baseline: str):
    """The table on screen."""

    def signed(value: float | None, spread: float | None) -> str:
        if value is None:
            return ""
        return f"{value:+.1f}" + (f" ± {spread:.1f}" if spread is not None else "")

    return table(
        "",
        ["variant", "τ", "sd", f"% to {baseline}", "wins", "steps", "supervised", "seconds"],
        [
            [
                r["variant"],
                r["tau"],
                r["tau_sd"],
                signed(r["gain_percent"], r["gain_sd"]),
                f"{r['wins']}/{r['seeds']}",
                round(r["steps"]),
                round(r["supervised"]),
                round(r["seconds"]),
            ]
            for r in rows
        ],
    )
