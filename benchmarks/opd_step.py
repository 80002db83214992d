r"""What does a Draft-OPD step cost with a hindsight trace, and what when it decodes live?

    python benchmarks/opd_step.py --drafter runs/demo/sft/last \
        --trajectories runs/demo/data/train --heldout runs/demo/data/heldout

Same prompts, same process, in alternation, batch 1, 8 and 32: trace, branches, forward, backward,
update. Live decodes greedily what hindsight has stored, so both see the same text and rounds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import machine

from draft_opd.training.config import parse_recipe
from draft_opd.training.loop import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="embedded")
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--trajectories", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--objective", default="acceptance_aware")
    parser.add_argument("--name", default="opd_step")
    args = parser.parse_args()
    found = []
    for size in args.batches:
        times: dict[str, list[float]] = {"hindsight": [], "live": []}
        parts: dict[str, list[dict]] = {"hindsight": [], "live": []}
        runs = {}
        with tempfile.TemporaryDirectory() as folder:
            for rollout in times:
                tree = {
                    "target": args.target, "drafter": args.drafter, "steps": 10_000,
                    "out": str(Path(folder) / rollout), "batch_size": size,
                    "data": {"trajectories": args.trajectories, "heldout": args.heldout,
                             "heldout_limit": 1},
                    "opd": {"rollout": rollout, "objective": {"kind": args.objective}},
                    "optim": {"learning_rate": 1e-9},  # both keep the drafter they began with
                }  # fmt: skip
                runs[rollout] = Run(
                    "opd", parse_recipe(tree), after=next(iter(runs.values()), None)
                )
            for step in range(args.repeats + 1):
                for rollout in list(times)[:: 1 if step % 2 else -1]:
                    began = time.perf_counter()
                    runs[rollout]._step(step)
                    seconds = time.perf_counter() - began
                    measured = runs[rollout].clock.take()
                    if step:  # the first one warms up
                        times[rollout].append(seconds)
                        parts[rollout].append(measured)
        row = {
            "batch": size,
            "live_over_hindsight": machine.ratio(times["live"], times["hindsight"]),
            "seconds": {k: sum(v) / len(v) for k, v in times.items()},
            "parts": {
                k: {part: sum(x[part] for x in v) / len(v) for part in v[0]}
                for k, v in parts.items()
            },
        }
        found.append(row)
        r = row["live_over_hindsight"]
        print(f"batch {size}: live / hindsight {r['median']:.1f} {r['quartiles']} {row['parts']}")
    machine.write(args.name, {"arguments": vars(args), "rows": found})


if __name__ == "__main__":
    main()
