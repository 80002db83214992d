r"""What does a Draft-OPD step cost with a hindsight trace, and what when it decodes live?

    python benchmarks/opd_step.py --drafter runs/demo/sft/last \
        --trajectories runs/demo/data/train --heldout runs/demo/data/heldout

Same prompts, same process, in alternation, at each batch size; trace, branches, forward, backward
and update. Live decodes greedily what hindsight has stored, so all see the same text and rounds.

    live        decodes, then runs the target over the new text
    hindsight   runs the target over the stored text, traces
    remembered  hindsight with the target's features remembered (data.cache_features: memory)
    every N     remembered, and the traces of N steps made together (opd.trace_every: N)
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import machine

from draft_opd.training.config import parse_recipe
from draft_opd.training.trainer import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="embedded")
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--trajectories", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=4, help="a measurement; also the N of every")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--objective", default="dpace")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--name", default="opd_step")
    args = parser.parse_args()
    every = f"every {args.steps}"
    sides = {
        "live": {"opd": {"rollout": "live"}},
        "hindsight": {},
        "remembered": {"data": {"cache_features": "memory"}},
        every: {"data": {"cache_features": "memory"}, "opd": {"trace_every": args.steps}},
    }
    found = []
    for size in args.batches:
        times: dict[str, list[float]] = {side: [] for side in sides}
        parts: dict[str, list[dict]] = {side: [] for side in sides}
        runs: dict[str, Run] = {}
        with tempfile.TemporaryDirectory() as folder:
            for side, options in sides.items():
                tree = {
                    "target": args.target,
                    "drafter": args.drafter,
                    "steps": 1_000_000,
                    "out": str(Path(folder) / side),
                    "batch_size": size,
                    "precision": args.precision,
                    "save_every": args.steps,
                    "data": {
                        "trajectories": args.trajectories,
                        "heldout": args.heldout,
                        "heldout_limit": 1,
                        **options.get("data", {}),
                    },
                    "opd": {"objective": {"kind": args.objective}, **options.get("opd", {})},
                    "optim": {"learning_rate": 1e-9},  # all keep the drafter they began with
                }
                runs[side] = Run("opd", parse_recipe(tree), after=next(iter(runs.values()), None))
                runs[side]._evaluate()  # how the trace is made goes by τ
            for repeat in range(args.repeats + 1):
                first = repeat * args.steps
                for side in ("remembered", every):  # what an earlier epoch would have remembered
                    for step in range(first, first + args.steps):
                        runs[side].sources.train.batch(runs[side]._rows(step))
                for side in list(sides)[:: 1 if repeat % 2 else -1]:
                    began = time.perf_counter()
                    for step in range(first, first + args.steps):
                        runs[side].step(step)
                    seconds = (time.perf_counter() - began) / args.steps
                    measured = runs[side].clock.take()
                    if repeat:  # the first one warms up
                        times[side].append(seconds)
                        parts[side].append({k: v / args.steps for k, v in measured.items()})
        row = {
            "batch": size,
            "live_over": {
                side: machine.ratio(times["live"], times[side]) for side in sides if side != "live"
            },
            "seconds": {side: statistics.median(v) for side, v in times.items()},
            "parts": {
                side: {part: statistics.median(x[part] for x in v) for part in v[0]}
                for side, v in parts.items()
            },
        }
        found.append(row)
        print(f"batch {size}: live / " + json.dumps(row["live_over"]))
    machine.write(args.name, {"arguments": vars(args), "rows": found})


if __name__ == "__main__":
    main()
