"""Do two processes train what one trains, and how much sooner?

    python benchmarks/parallel.py --data runs/demo/data --drafter runs/demo/sft/last

Two gloo processes of one thread against one process of one thread, the same recipe (batches of 9,
so shares are uneven), taking turns: relative differences of each step's loss and gradient norm, and
of held-out τ, and the ratio of a step's seconds. Differences grow with the steps, as rounding does
in any training: they are given for the first step, and the largest of all. Muon orthogonalises in
bfloat16, which makes more of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import machine

COMMON = ["opd", "opd.objective.kind=acceptance_aware", "opd.trace_every=1"]
SIDES = {
    "SFT, DDP": ["sft"],
    "Draft-OPD (the paper's loss), DDP": COMMON,
    "the same, Muon": [*COMMON, "optim.name=muon"],
    "Draft-OPD (D-PACE, traces of 5 steps), DDP": ["opd", "opd.objective.kind=dpace", "opd.trace_every=5"],
    "Draft-OPD (the paper's loss), drafter and target sharded (FSDP2)": [
        *COMMON,
        "parallel.drafter=shard",
        "parallel.target=shard",
    ],
}


def run(count: int, args: argparse.Namespace, side: list[str], out: Path) -> list[dict]:
    """Metrics of a run in `count` processes."""
    stage, *pairs = side
    drafter = [f"drafter={args.drafter}"] if stage == "opd" else []
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
        "-m",
        "draft_opd",
        stage,
        "--config",
        "embedded:dflash",
        f"data.trajectories={args.data}/train",
        f"data.heldout={args.data}/heldout",
        "data.heldout_limit=32",
        "data.limit=400",
        "data.cache_features=none",
        "batch_size=9",
        "optim.name=adamw",
        "optim.learning_rate=5e-4",
        f"steps={args.steps}",
        f"out={out}",
        f"evaluation.every={args.steps}",
        *drafter,
        *pairs,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def differences(one: list[dict], two: list[dict], key: str) -> list[float]:
    pairs = [(a[key], b[key]) for a, b in zip(one, two, strict=True) if key in a]
    return [abs(a - b) / abs(a) for a, b in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="runs/demo/data")
    parser.add_argument("--drafter", default="runs/demo/sft/last")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    found = {}
    for name, side in SIDES.items():
        times: dict[int, list[float]] = {1: [], 2: []}
        rows: dict[int, list[dict]] = {}
        for repeat in range(args.repeats):
            for count in (1, 2) if repeat % 2 else (2, 1):
                with tempfile.TemporaryDirectory() as out:
                    rows[count] = run(count, args, side, Path(out) / "run")
                seconds = [m["seconds"]["all"] for m in rows[count] if "seconds" in m]
                times[count].append(statistics.median(seconds))
        value = {}
        for key in ("loss", "grad_norm", "tau"):
            found_here = differences(rows[1], rows[2], key)
            value[key] = {"first": found_here[0], "largest": max(found_here)}
        counted = [m["supervised"] for m in rows[1] if "supervised" in m]
        value["supervised_equal"] = counted == [m["supervised"] for m in rows[2] if "supervised" in m]
        value["seconds_a_step"] = times
        value["one_over_two"] = machine.ratio(times[1], times[2])
        found[name] = value
        print(
            f"{name}: loss {value['loss']['first']:.1e} at first, {value['loss']['largest']:.1e} "
            f"at most in {args.steps} steps; gradient norm {value['grad_norm']['largest']:.1e}; "
            f"τ {value['tau']['largest']:.1e}; {value['one_over_two']['median']:.2f} times as fast",
            flush=True,
        )
    machine.write("parallel", {"steps": args.steps, "sides": found})


if __name__ == "__main__":
    main()
