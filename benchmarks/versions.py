"""What training steps cost now, and in another checkout of the project.

    git worktree add ../before aae165b
    python benchmarks/versions.py --before ../before --drafter runs/demo/sft/last \\
        --trajectories runs/demo/data/train --heldout runs/demo/data/heldout

Both versions run in processes of their own, in alternation, over the same trajectories from the same drafter:
SFT, D-PACE and the paper's loss with fresh traces.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
SIDES = {"sft": ("sft", "dpace"), "dpace": ("opd", "dpace"), "paper": ("opd", "acceptance_aware")}


def steps(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of single steps of each side; in the process of one version."""
    import torch

    try:
        from draft_opd.training.trainer import Run
    except ImportError:  # before issue 17
        from draft_opd.training.loop import Run
    from draft_opd.training.config import parse_recipe

    torch.set_num_threads(args.threads)
    found, run = {}, None
    with tempfile.TemporaryDirectory() as folder:
        for side, (stage, kind) in SIDES.items():
            tree = {
                "target": args.target,
                "drafter": args.drafter,
                "steps": 1_000_000,
                "out": str(Path(folder) / side),
                "batch_size": args.batch,
                "precision": "float32",
                "data": {"trajectories": args.trajectories, "heldout": args.heldout, "heldout_limit": 1},
                "opd": {"objective": {"kind": kind}},
                "optim": {"learning_rate": 1e-9},  # all keep the drafter they began with
            }
            run = Run(stage, parse_recipe(tree), after=run)
            run._evaluate()
            times = []
            for step in range(args.steps + 2):
                began = time.perf_counter()
                run.step(step)
                times.append(time.perf_counter() - began)
            found[side] = times[2:]  # the first ones warm up, and measure how to trace
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path)
    parser.add_argument("--target", default="embedded")
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--trajectories", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="versions")
    args = parser.parse_args()
    if args.before is None:
        print("RESULT " + json.dumps(steps(args)))
        return
    import machine

    given = [
        x
        for k in ("target", "drafter", "trajectories", "heldout", "batch", "steps", "threads")
        for x in (f"--{k}", str(getattr(args, k)))
    ]
    versions = {"before": args.before.resolve(), "now": HERE}
    medians: dict = {v: {side: [] for side in SIDES} for v in versions}
    for repeat in range(args.repeats):
        for version in list(versions)[:: 1 if repeat % 2 else -1]:
            env = {**os.environ, "PYTHONPATH": str(versions[version] / "src")}
            made = subprocess.run([sys.executable, __file__, *given], env=env, capture_output=True, text=True)
            lines = [x for x in made.stdout.splitlines() if x.startswith("RESULT ")]
            if not lines:
                raise SystemExit(made.stderr[-2000:])
            for side, times in json.loads(lines[0][7:]).items():
                medians[version][side].append(statistics.median(times))
    rows = {
        side: {
            "before_seconds": statistics.median(medians["before"][side]),
            "now_seconds": statistics.median(medians["now"][side]),
            "before_over_now": machine.ratio(medians["before"][side], medians["now"][side]),
            "over_sft": {
                v: statistics.median(a / b for a, b in zip(medians[v][side], medians[v]["sft"], strict=True))
                for v in versions
            },
        }
        for side in SIDES
    }
    for side, row in rows.items():
        print(side, json.dumps(row))
    commit = subprocess.run(
        ["git", "-C", str(args.before), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    about = {k: v for k, v in vars(args).items() if k != "before"}
    machine.write(args.name, {"arguments": about, "before": commit, "rows": rows})


if __name__ == "__main__":
    main()
