"""Commands that train: sft, opd, ablate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from draft_opd.cli.options import Config, Json, Overrides, Resume
from draft_opd.utils.console import Screen, ending, facts


def _train(stage: str, config: Path, overrides: list[str] | None, resume: bool, json: bool) -> None:
    from draft_opd.training.config import load_recipe
    from draft_opd.training.inputs import read_inputs

    recipe = load_recipe(config, overrides or [], stage)
    inputs = read_inputs(stage, recipe, resume)
    # Only now: these load torch, which takes seconds.
    from draft_opd.training.distributed import distributed_context
    from draft_opd.training.trainer import Run

    with distributed_context(recipe.parallel) as group:
        screen = Screen(json, silent=not group.is_main_process)
        seen: dict[str, str] = {}
        asked: list[bool] = []
        with screen.progress(stage, recipe.steps) as update, ending(lambda: asked.append(True)):

            def show(line: dict) -> None:
                names = {"loss": "loss", "tau": "held-out τ"}
                seen.update({n: f"{n} {line[k]:.3f}" for k, n in names.items() if k in line})
                update(line["step"], "  ".join(seen.values()))

            run = Run(
                stage,
                recipe,
                resume=resume,
                group=group,
                on_metrics=show,
                stop=lambda: bool(asked),
                inputs=inputs,
            )
            result = run.train()
        value = result.as_dict()
        screen.result(value, facts(f"{stage}: {result.out}", value))


def sft(config: Config, overrides: Overrides = None, resume: Resume = False, json: Json = False):
    """Stage 1: train a drafter on the target's own text."""
    _train("sft", config, overrides, resume, json)


def opd(config: Config, overrides: Overrides = None, resume: Resume = False, json: Json = False):
    """Stage 2, Draft-OPD: train a drafter where verification rejects it."""
    _train("opd", config, overrides, resume, json)


def ablate(
    config: Annotated[Path, typer.Option("--config", help="Variants and seeds, YAML.")],
    out: Annotated[Path, typer.Option(help="Folder for runs and ablation.json; resumable.")],
    seeds: Annotated[str | None, typer.Option(help="Only these, as 0,1,2.")] = None,
    only: Annotated[str | None, typer.Option(help="Only these variants, comma-separated.")] = None,
    json: Json = False,
) -> None:
    """Compare ways to train: variants × seeds at equal budget, paired by seed, in one table."""
    from draft_opd.pipelines.ablation import Ablation, load_plan, show

    screen = Screen(json)
    plan = load_plan(config).narrowed(seeds, only)
    value = Ablation(plan, out, screen.say).run()
    screen.result(value, show(value["table"], plan.baseline))
