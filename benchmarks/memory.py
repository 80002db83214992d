"""Does a long run's memory stay what it is?

    python benchmarks/memory.py --data runs/demo/data --drafter runs/demo/sft/last --steps 2000

Resident memory (of /proc, so Linux) and the number of live Python objects and tensors at every
25th step of whole runs, each a process of its own: SFT, Draft-OPD with the paper's loss, with
D-PACE and traces of ten steps, and with live rollouts. Printed: the means of the second and the
last quarter of the steps, and the slope of a line through the second half, in KiB a step. malloc
keeps what was freed in pieces; `trimmed` is what is left at the end when it gives them back
(malloc_trim), and after a tenth of the steps, in a run of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import machine

SIDES = {
    "sft": ("sft", ["optim.learning_rate=1e-3"]),
    "opd, the paper's loss": ("opd", ["opd.objective.kind=acceptance_aware"]),
    "opd, D-PACE, trace_every 10": ("opd", ["opd.objective.kind=dpace", "opd.trace_every=10"]),
    "opd, live": ("opd", ["opd.objective.kind=dpace", "opd.rollout=live", "opd.trace_every=1"]),
}


def resident() -> float:
    """KiB."""
    with open("/proc/self/status") as file:
        return float(next(x for x in file if x.startswith("VmRSS")).split()[1])


def measure(args: argparse.Namespace) -> None:
    """In the process that is measured: prints rows of step, KiB, objects, tensors; and the KiB
    that are left at the end."""
    import torch

    from draft_opd.training.config import load_recipe
    from draft_opd.training.trainer import Run

    stage, pairs = SIDES[args.side]
    drafter = [f"drafter={args.drafter}"] if stage == "opd" else []
    found = []
    with tempfile.TemporaryDirectory() as out:
        recipe = load_recipe(
            "embedded:dflash",
            [
                f"data.trajectories={args.data}/train",
                f"data.heldout={args.data}/heldout",
                "data.heldout_limit=8",
                "data.limit=400",
                "data.cache_features=none",
                "batch_size=2",
                "opd.max_anchors=8",
                "sft.anchors=8",
                "opd.trace_every=1",
                f"steps={args.steps}",
                f"evaluation.every={max(1, args.steps // 8)}",
                f"out={out}/run",
                *drafter,
                *pairs,
            ],
            stage,
        )

        def look(line: dict) -> None:
            if "loss" in line and line["step"] % 25 == 0:
                objects = gc.get_objects()
                tensors = sum(type(x) is torch.Tensor for x in objects)
                found.append([line["step"], resident(), len(objects), tensors])

        Run(stage, recipe, on_metrics=look).train()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    print(json.dumps({"rows": found, "trimmed": resident()}))


def summary(rows: list[list[float]]) -> dict:
    quarter = len(rows) // 4
    half = rows[len(rows) // 2 :]
    value = {"steps": rows[-1][0], "rows": rows}
    for i, name in ((1, "KiB"), (2, "objects"), (3, "tensors")):
        second, last = rows[quarter : 2 * quarter], rows[-quarter:]
        line = statistics.linear_regression([r[0] for r in half], [r[i] for r in half])
        value[name] = {
            "second_quarter": statistics.mean(r[i] for r in second),
            "last_quarter": statistics.mean(r[i] for r in last),
            "slope_a_step": line.slope,
        }
    return value


def run(args: argparse.Namespace, side: str, steps: int) -> dict:
    """`measure` in a process of its own."""
    options = [f"--{k}={getattr(args, k)}" for k in ("data", "drafter")]
    done = subprocess.run(
        [sys.executable, __file__, *options, f"--steps={steps}", "--side", side],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="runs/demo/data")
    parser.add_argument("--drafter", default="runs/demo/sft/last")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--side", help="the measured part")
    args = parser.parse_args()
    if args.side:
        measure(args)
        return
    found = {}
    for side in SIDES:
        began = time.perf_counter()
        short = run(args, side, args.steps // 10)
        long = run(args, side, args.steps)
        found[side] = summary(long["rows"])
        memory = found[side]["KiB"]
        memory["trimmed"] = {"a_tenth": short["trimmed"], "all": long["trimmed"]}
        print(
            f"{side}: {memory['second_quarter'] / 1024:.1f} -> {memory['last_quarter'] / 1024:.1f} "
            f"MiB, {memory['slope_a_step']:+.2f} KiB a step; trimmed {short['trimmed'] / 1024:.1f} "
            f"after a tenth, {long['trimmed'] / 1024:.1f} at the end; tensors "
            f"{found[side]['tensors']['slope_a_step']:+.4f} a step "
            f"({time.perf_counter() - began:.0f} s)",
            flush=True,
        )
        machine.write("memory", {"sides": found})


if __name__ == "__main__":
    main()
