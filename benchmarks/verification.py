r"""What does verifying a block cost, against a single step, and what would be possible?

    python benchmarks/verification.py --target embedded

A forward of the target over 1 to 64 tokens behind a context, with matrices as torch multiplies with
them and as we do on a CPU (prepacked). limit: the longer of what must be read over the bandwidth
and what must be multiplied over the matrix rate, both measured in this process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import limits
import machine
import torch
from torch import nn

from draft_opd.evaluation.draft_length_advice import weights_read
from draft_opd.evaluation.measure import rotated
from draft_opd.models.cpu_linear import PrepackedLinear
from draft_opd.models.target import Target

SIZES = (1, 2, 4, 8, 16, 32, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="embedded")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 768])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype")
    parser.add_argument("--name", default="verification")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    target = Target.from_pretrained(args.target, dtype=args.dtype)
    device, batch = target.device, args.batch
    packed = [m for m in target.model.modules() if type(m) is PrepackedLinear]
    sides = {"as torch multiplies": nn.Linear, "ours": PrepackedLinear}
    sides = sides if packed else {"ours": nn.Linear}
    weights = weights_read(target.model, target.head.weight)
    size = weights * target.dtype.itemsize
    reading = size / limits.bandwidth(target.dtype, device, max(1, round(size / 2**20)))
    rate = limits.matrix_rate(target.dtype, device)
    rows = []
    for context in args.contexts:
        cache = target.cache(context + max(SIZES))
        ids = torch.randint(3, 250, (batch, context), device=device)
        target.trajectories(ids, cache=cache)
        for tokens in SIZES:
            block = torch.randint(3, 250, (batch, tokens), device=device)
            at = torch.arange(context, context + tokens, device=device).expand(batch, -1)
            cache.set_bound(context + tokens)
            times: dict[str, list[float]] = {side: [] for side in sides}
            for repeat in range(-1, args.repeats):
                for side, kind in rotated(list(sides.items()), repeat):
                    for module in packed:
                        module.__class__ = kind
                    with torch.no_grad():
                        if repeat < 0:
                            target.logits(target.extend(block, at, cache).hidden)
                        began = time.perf_counter()
                        target.logits(target.extend(block, at, cache).hidden)
                        if device.type == "cuda":
                            torch.cuda.synchronize()
                    if repeat >= 0:
                        times[side].append(time.perf_counter() - began)
            least = max(reading, 2 * weights * batch * tokens / rate)
            seconds = {side: statistics.median(t) for side, t in times.items()}
            row = {
                "context": context,
                "tokens": tokens,
                "milliseconds": {side: 1000 * s for side, s in seconds.items()},
                "limit_milliseconds": 1000 * least,
                "limit_over_measured": {side: least / s for side, s in seconds.items()},
            }
            if len(sides) > 1:
                row["torch_over_ours"] = machine.ratio(times["as torch multiplies"], times["ours"])
            rows.append(row)
            single = next(r for r in rows if r["context"] == context)["milliseconds"]
            row["over_a_single_step"] = {s: row["milliseconds"][s] / single[s] for s in sides}
            print(json.dumps(row))
    measured = {"reading_milliseconds": 1000 * reading, "gigaflops": rate / 1e9}
    machine.write(args.name, {"arguments": vars(args), "limits": measured, "rows": rows})


if __name__ == "__main__":
    main()
