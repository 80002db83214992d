r"""What do the types of Muon's products and of the forward cost, a training step?

    python benchmarks/precision.py --trajectories runs/demo/data/train \
        --heldout runs/demo/data/heldout

On the shipped target, with the demo's drafter and batch, in one process and in alternation: an
update by torch's Muon (bfloat16) and by ours in float32 and bfloat16; a step of SFT with
`precision: float32` and `bfloat16`. Also how many times as fast as float32 the machine multiplies
bfloat16, which is what `auto` goes by.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import machine
import torch

from draft_opd.evaluation.measure import rotated
from draft_opd.training.config import load_recipe
from draft_opd.training.muon import Muon
from draft_opd.training.trainer import Run
from draft_opd.utils.machine import speed_over_float32


def timed(sides: dict, repeats: int) -> dict[str, list[float]]:
    """Seconds of each side, in alternation, after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(-1, repeats):
        for name, work in rotated(list(sides.items()), repeat):
            began = time.perf_counter()
            work()
            if repeat >= 0:
                times[name].append(time.perf_counter() - began)
    return times


def updates(model: torch.nn.Module) -> dict:
    """An update of all matrices of a drafter by each Muon."""
    sides = {}
    for name in ("torch's, bfloat16", "ours, float32", "ours, bfloat16"):
        matrices = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters() if p.ndim == 2]
        for p in matrices:
            p.grad = torch.randn_like(p)
        if name.startswith("torch"):
            made = torch.optim.Muon(matrices, lr=1e-9, adjust_lr_fn="match_rms_adamw")
        else:
            dtype = getattr(torch, name.split()[-1])
            made = Muon(matrices, lr=1e-9, weight_decay=0.1, dtype=dtype)
        sides[name] = made.step
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trajectories", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="precision")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("float32", "bfloat16"):
            pairs = [
                f"precision={kind}",
                f"out={Path(folder) / kind}",
                "steps=1000000",
                f"data.trajectories={args.trajectories}",
                f"data.heldout={args.heldout}",
                "optim.learning_rate=1e-9",
            ]
            recipe = load_recipe("embedded", pairs, "sft")
            runs[kind] = Run("sft", recipe, after=next(iter(runs.values()), None))
        steps = dict.fromkeys(runs, 0)

        def step(kind: str) -> None:
            runs[kind].step(steps[kind] % 8)  # the same batches, remembered after the first time
            steps[kind] += 1

        for kind in runs:
            for _ in range(8):
                step(kind)
        sides = {kind: (lambda kind=kind: step(kind)) for kind in runs}
        groups = {
            "muon": timed(updates(runs["float32"].drafter), args.repeats),
            "sft step": timed(sides, 8 * max(1, args.repeats // 8)),
        }
    device, width = runs["float32"].target.device, runs["float32"].target.hidden_size
    rows = [
        {
            "what": what,
            "side": side,
            "milliseconds": 1000 * statistics.median(seconds),
            "over_first": machine.ratio(seconds, next(iter(group.values()))),
        }
        for what, group in groups.items()
        for side, seconds in group.items()
    ]
    speed = {str(w): speed_over_float32(torch.bfloat16, device, w) for w in (width, 576, 1024)}
    value = {
        "arguments": vars(args),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_over_float32": speed,
        "rows": rows,
    }
    for row in rows:
        print(json.dumps(row))
    print(json.dumps(speed))
    machine.write(args.name, value)


if __name__ == "__main__":
    main()
