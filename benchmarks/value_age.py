"""How wrong the rounds to go V become while the drafter trains on.

    python benchmarks/value_age.py --plan benchmarks/league_fresh.yaml --start runs/start-10/last

D-PACE as in the plan; V at every position of some training texts by the drafter of step 100, and by those of
1, 10 and 50 steps later. `worth` is V(a) - V(a + 1), which an objective weighs tokens with.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path
from unittest import mock

import machine
import torch
import yaml

from draft_opd.data.trajectory import read_trajectories
from draft_opd.decoding.sampling import Sampling
from draft_opd.losses.rounds_to_go import rounds_to_go
from draft_opd.training.batches import BatchSource
from draft_opd.training.config import load_recipe
from draft_opd.training.optimizer import Optimizer
from draft_opd.training.trainer import Run
from draft_opd.training.values import acceptance_everywhere

FROM, AGES = 100, (1, 10, 50)


def train(plan: dict, start: str):
    """The run, and {step: its drafter after that many steps}."""
    kept, count = {}, 0
    own = Optimizer.step

    def step(optimizer):
        nonlocal count
        own(optimizer)
        count += 1
        if count - FROM in (0, *AGES):
            kept[count] = copy.deepcopy({n: p.detach() for n, p in run.drafter.named_parameters()})

    with tempfile.TemporaryDirectory() as out:
        pairs = {**plan["common"], "seed": 10, "out": f"{out}/run", "drafter": start}
        recipe = load_recipe(plan["recipe"], [f"{k}={json.dumps(v)}" for k, v in pairs.items()], "opd")
        run = Run("opd", recipe)
        with mock.patch.object(Optimizer, "step", step):
            run.train()
    return run, kept


@torch.no_grad()
def values(
    run: Run, weights: dict, texts: list, sharpness: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """V at every position, and what one token there is worth: [positions] each."""
    for name, parameter in run.drafter.named_parameters():
        parameter.copy_(weights[name])
    source, found = BatchSource(run.target, run.drafter.target_layers), []
    for text in texts:
        count = run.drafter.draft_length
        places, alpha = acceptance_everywhere(
            run.target, run.drafter, source.batch([text]), count, Sampling(), sharpness
        )
        v = rounds_to_go(alpha, places.valid)[0]
        n = places.anchors.shape[1]
        found.append(torch.stack([v[:n], v[:n] - v[1 : n + 1]]))
    whole = torch.cat(found, 1)
    return whole[0], whole[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--start", required=True)
    parser.add_argument("--texts", type=int, default=48)
    parser.add_argument("--name", default="value_age")
    args = parser.parse_args()
    plan = yaml.safe_load(args.plan.read_text())
    run, kept = train(plan, args.start)
    texts = read_trajectories(plan["common"]["data.trajectories"], limit=args.texts)
    rows = []
    for kind, sharpness in (("hard acceptance", None), ("q(y)", 1.0)):
        old, old_worth = values(run, kept[FROM], texts, sharpness)
        for age in AGES:
            now, worth = values(run, kept[FROM + age], texts, sharpness)
            rows.append(
                {
                    "acceptance": kind,
                    "age": age,
                    "V": now.mean().item(),
                    "bias": (old - now).mean().item(),
                    "sd": (old - now).std().item(),
                    "worth_sd": worth.std().item(),
                    "worth_change_sd": (old_worth - worth).std().item(),
                    "worth_correlation": torch.corrcoef(torch.stack([old_worth, worth]))[0, 1].item(),
                }
            )
            print({k: round(x, 3) if isinstance(x, float) else x for k, x in rows[-1].items()})
    machine.write(args.name, {"from_step": FROM, "texts": args.texts, "rows": rows})


if __name__ == "__main__":
    main()
