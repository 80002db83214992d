r"""Tokens a second of SFT and Draft-OPD steps, against the matrix rate, and where the rest goes.

    python benchmarks/train_step.py --drafter runs/demo/sft/last \
        --trajectories runs/demo/data/train --heldout runs/demo/data/heldout

Operations are those of the matrix products and attention of a step, counted as it runs;
`fraction` is what they would take at the matrix rate of this machine (measured in this process, in
the recipe's precision) over what the step took. The profile groups the time of torch's operators;
`outside` is what no operator accounts for: Python.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import limits
import machine
import torch
from torch.utils.flop_counter import FlopCounterMode

from draft_opd.training.config import parse_recipe
from draft_opd.training.precision import autocast
from draft_opd.training.trainer import Run
from draft_opd.utils.machine import synchronized

STAGES = {
    "sft": ("sft", {}),
    "sft, remembered": ("sft", {"data": {"cache_features": "memory"}}),
    "sft, from disk": ("sft", {"data": {"cache_features": "disk"}}),
    "opd, D-PACE": ("opd", {"opd": {"objective": {"kind": "dpace"}}}),
    "opd, the paper's loss": ("opd", {}),
    "opd, D-PACE, remembered": (
        "opd",
        {"opd": {"objective": {"kind": "dpace"}}, "data": {"cache_features": "memory"}},
    ),
}
GROUPS = {
    "matrix products": ("mm", "bmm", "linear", "matmul", "baddbmm"),
    "attention": ("attention",),
    "softmax": ("softmax", "logsumexp"),
    "copies": ("copy_", "cat", "index", "gather", "clone", "fill_", "masked", "scatter", "zero_"),
}


def packed_flops(x, _weight, *_args, out_shape=None, **_kwargs) -> int:
    return 2 * math.prod(out_shape) * x[-1]


def group(name: str) -> str:
    short = name.removeprefix("aten::").removeprefix("mkldnn::")
    for found, words in GROUPS.items():
        if any(word in short for word in words):
            return found
    return "elementwise and others"


def profiled(work) -> dict[str, float]:
    """Shares of a step's time by kind of operator."""
    began = time.perf_counter()
    with torch.profiler.profile() as profile:
        work()
    whole = time.perf_counter() - began
    sums = dict.fromkeys([*GROUPS, "elementwise and others"], 0.0)
    for event in profile.key_averages():
        if event.key.startswith(("aten::", "mkldnn::")):
            sums[group(event.key)] += event.self_cpu_time_total / 1e6
    return {k: v / whole for k, v in sums.items()} | {"outside": 1 - sum(sums.values()) / whole}


def measure(
    common: dict, sides: dict[str, tuple[str, dict]], steps: int, repeats: int, profile: bool = True
) -> dict:
    """Every side's steps in alternation. common: the recipe of all; sides: stage and what differs.
    `over`: against the first side; profile: of one more step a side."""
    runs: dict[str, Run] = {}
    times: dict[str, list[float]] = {side: [] for side in sides}
    parts: dict[str, list[dict]] = {side: [] for side in sides}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for side, (stage, more) in sides.items():
            data = {**common["data"], **more.get("data", {})}
            tree = {**common, **more, "data": data, "out": str(Path(folder) / side), "steps": 1_000_000}
            before = next(iter(runs.values()), None)
            recipe = parse_recipe(tree)
            runs[side] = Run(stage, recipe, target=before and before.target)
            runs[side]._evaluate()  # how the trace is made goes by τ
        device = next(iter(runs.values())).target.device
        rate = limits.matrix_rate(getattr(torch, common["precision"]), device)
        for repeat in range(repeats + 1):
            first = repeat * steps
            for run in runs.values():  # what an earlier epoch would have kept
                if run.sources.train.feature_cache is not None:
                    for step in range(first, first + steps):
                        with autocast(run.recipe, run.target.device):
                            run.sources.train.batch(run._rows(step))
            for side in list(sides)[:: 1 if repeat % 2 else -1]:
                runs[side].clock.take()
                began = synchronized(device)
                for step in range(first, first + steps):
                    runs[side].step(step)
                seconds = (synchronized(device) - began) / steps
                measured = runs[side].clock.take()
                if repeat:
                    times[side].append(seconds)
                    parts[side].append({k: v / steps for k, v in measured.items()})
        for side, run in runs.items():
            custom = {torch.ops.mkldnn._linear_pointwise: packed_flops}
            tokens, supervised = [], []
            with FlopCounterMode(display=False, custom_mapping=custom) as counter:
                for step in range(steps):
                    tokens.append(sum(len(t.ids) for t in run._rows(step)))
                    supervised.append(run.step(step)["supervised"])
            flops = counter.get_total_flops() / steps
            seconds = statistics.median(times[side])
            names = {name for found in parts[side] for name in found}
            rows.append(
                {
                    "side": side,
                    "seconds": seconds,
                    "over": machine.ratio(times[side], times[next(iter(sides))]),
                    "tokens_per_second": statistics.mean(tokens) / seconds,
                    "supervised_per_second": statistics.mean(supervised) / seconds,
                    "gigaflop": flops / 1e9,
                    "fraction": flops / rate / seconds,
                    "parts": {p: statistics.median(x.get(p, 0.0) for x in parts[side]) for p in names},
                    "profile": profiled(lambda run=run: run.step(0)) if profile else None,
                }
            )
    return {"matrix_gigaflops": rate / 1e9, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="embedded")
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--trajectories", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="a measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--name", default="train_step")
    args = parser.parse_args()
    common = {
        "target": args.target,
        "drafter": args.drafter,
        "batch_size": args.batch,
        "precision": args.precision,
        "optim": {"learning_rate": 1e-9},
        "data": {"trajectories": args.trajectories, "heldout": args.heldout, "heldout_limit": 1},
    }
    value = measure(common, STAGES, args.steps, args.repeats)
    for row in value["rows"]:
        print(json.dumps(row))
    machine.write(args.name, {"arguments": vars(args), **value})


if __name__ == "__main__":
    main()
