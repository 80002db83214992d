"""The phases of scripts/evidence.py that train: SFT to its plateau, what more brings, what steps cost."""

from __future__ import annotations

from pathlib import Path

import train_step
import yaml
from phases import Phase, Setup, table

from draft_opd.pipelines.ablation import Ablation, Plan
from draft_opd.training.config import parse_recipe
from draft_opd.training.trainer import Run

SFT_RATE, LEAGUE_RATE = 3e-3, 5e-4
MAIN = {"dpace": "dpace", "paper": "acceptance_aware"}
EAGLE3 = {"draft_length": 7}


def recipe(setup: Setup, out: str, steps: int, rate: float, **more) -> dict:
    size = setup.size
    return {
        "target": setup.target_name,
        "out": out,
        "steps": steps,
        "batch_size": size.batch,
        "data": {
            "trajectories": "data/train",
            "heldout": "data/heldout",
            "heldout_limit": size.heldout,
            "cache_features": "device",
        },
        "model": {"family": "dflash", "options": size.drafter},
        "sft": {"anchors": 32},
        "optim": {"name": "muon", "learning_rate": rate},
        "evaluation": {"every": size.every},
        **more,
    }


def plateau(setup: Setup, out: str, steps: int, **more) -> dict:
    """SFT until two measurements in a row bring no new best."""
    tree = recipe(setup, out, steps, SFT_RATE, **more)
    tree["evaluation"]["patience"] = 2
    run = Run("sft", parse_recipe(tree), target=setup.target, resume=Path(out).exists())
    taus: list[list] = []
    run.on_metrics = lambda line: "tau" in line and taus.append([line["step"], line["tau"]])
    result = run.train()
    value = {k: v for k, v in result.as_dict().items() if k not in ("path", "kind")}
    return {**value, "taus": taus}


def league(setup: Setup, name: str, start: str, kinds: dict[str, str], seeds: list[int]) -> dict:
    """Objectives against continued SFT, all from the drafter `start`."""
    steps, path = setup.size.league_steps, Path(f"{name}.yaml")
    tree = recipe(setup, "x", steps, LEAGUE_RATE, opd={"trace_every": 10})
    tree["evaluation"]["every"] = steps
    path.write_text(yaml.safe_dump(tree))
    variants = {"sft_continued": {"stage": "sft"}}
    variants |= {n: {"set": {"opd.objective.kind": k}} for n, k in kinds.items()}
    plan = Plan.model_validate(
        {
            "recipe": str(path),
            "seeds": seeds,
            "start": {"drafter": start},
            "baseline": "sft_continued",
            "variants": variants,
        }
    )
    value = Ablation(plan, Path(name), print).run()
    rows = [[r["variant"], r["tau"], r["gain_percent"], r["gain_sd"], r["seconds"]] for r in value["table"]]
    columns = ["variant", "τ", "% to sft_continued", "sd of it", "seconds"]
    return {"league": value["table"], "runs": value["runs"], "table": table(columns, rows)}


class Sft(Phase):
    name, title = "sft", "SFT to its plateau (ends after two measurements without a new best)"

    def run(self) -> dict:
        value = plateau(self.setup, "sft", self.size.sft_steps)
        return {**value, "table": table(["step", "held-out τ"], value["taus"])}


class League(Phase):
    name, title = "league", "From the plateau, seed 0: what more training brings"

    def run(self) -> dict:
        return league(self.setup, self.name, "sft/best", MAIN, [0])


class Steps(Phase):
    name, title = "steps", "What a step costs: against one of SFT, and as a fraction of the matrix rate"

    def run(self) -> dict:
        size, dpace = self.size, {"objective": {"kind": "dpace"}}
        common = recipe(self.setup, "x", 1, 1e-9, drafter="sft/best")
        common["precision"] = "bfloat16" if self.setup.device.type == "cuda" else "float32"
        sides = {
            "SFT": ("sft", {}),
            "D-PACE, fresh traces": ("opd", {"opd": dpace}),
            "D-PACE, traces of 10 steps": ("opd", {"opd": {**dpace, "trace_every": 10}}),
            "the paper's loss": ("opd", {}),
            "D-PACE, live": ("opd", {"opd": {**dpace, "rollout": "live"}}),
        }
        value = train_step.measure(common, sides, size.steps, size.step_repeats, profile=False)
        rows = [
            [r["side"], 1000 * r["seconds"], r["over"]["median"], r["parts"].get("trace"), r["fraction"]]
            for r in value["rows"]
        ]
        columns = ["step", "ms", "over SFT", "of it trace, s", "of the matrix rate"]
        return {**value, "table": table(columns, rows)}


class Seeds(Phase):
    name, title = "seeds", "The same, two more seeds"

    def run(self) -> dict:
        return league(self.setup, self.name, "sft/best", MAIN, [1, 2])


class Objectives(Phase):
    name, title = "objectives", "The other objectives, seed 0"

    def run(self) -> dict:
        return league(self.setup, self.name, "sft/best", {kind: kind for kind in self.size.objectives}, [0])


class Eagle3(Phase):
    name, title = "eagle3", "EAGLE-3: SFT, then what more training brings, seed 0"

    def run(self) -> dict:
        model = {"family": "eagle3", "options": EAGLE3}
        value = plateau(self.setup, "eagle3_sft", self.size.sft_steps // 2, model=model)
        return {"sft": value, **league(self.setup, self.name, "eagle3_sft/best", MAIN, [0])}
